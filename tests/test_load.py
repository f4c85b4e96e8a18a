"""Load: what it counts, that each figure is measured, and that a fault would be counted."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import wraps

import apsw
import numpy as np
import pytest
import virtual

from whisper_fast import clock
from whisper_fast.errors import LLMError, LLMUnavailable, Overloaded, SettingsError
from whisper_fast.lab.faulty import FaultyLLM
from whisper_fast.lab.load import FAULTS, EngineTarget, Metered, Patience, Run, SequentialTarget, ServerTarget, Target
from whisper_fast.lab.replay import Replay
from whisper_fast.lab.traffic import Arrival, Length, Sessions, Traffic, arrivals
from whisper_fast.llm import SimulatedLLM
from whisper_fast.store.files import DATABASE
from whisper_fast.ticket import Ticket

KEYS = {
    "turns", "turns_per_s", "errors", "shed", "lost", "duplicated", "out_of_order", "in_flight_peak", "added_ms",
    "total_ms", "cpu_us_per_turn", "cpu_utilization", "rss_peak_mb", "goodput_per_s", "turns_per_cpu_s", "cores",
}  # fmt: skip
SHORT = Patience(idle=0.5, whole=30.0)
CALM = Patience(idle=10.0, whole=30.0)


def once(test):
    """Run a test on one loop only: it takes seconds, and the loop's kind changes nothing that it looks at."""

    @wraps(test)
    def run(*args, **fixtures):
        with asyncio.Runner() as runner:
            return runner.run(test(*args, **fixtures))

    return run


async def ran(traffic, target, arrivals=None, **options):
    run = Run(traffic, arrivals or Sessions(traffic), target, **{"patience": SHORT, **options})
    await run.run()
    return run


class Fake(Target):
    """Answers after `seconds(now)`, in whatever time the loop lives."""

    name = "fake"
    promises = ("lost", "out_of_order")

    def __init__(self, seconds=lambda now: 0.0, model=0.0):
        self.seconds = seconds
        self.model = model
        self.began = clock.monotonic()

    @asynccontextmanager
    async def open(self):
        self.began = clock.monotonic()
        yield self

    async def answer(self, message, accepted):
        accepted()
        await asyncio.sleep(self.seconds(clock.monotonic() - self.began))
        return ()

    def model_seconds(self, message):
        return self.model


def in_virtual_time(main):
    async def replaced(now):
        with clock.replaced(monotonic=now, wall=now):
            return await main()

    return virtual.run(replaced)


# against what is known by calculation


def stalled(now):
    """The server answers in 10 ms, but between the seconds 10 and 12 to nobody."""
    return (12.0 - now if 10.0 <= now < 12.0 else 0.0) + 0.01


@pytest.mark.parametrize("closed", [False, True])
def test_a_server_that_stalls_two_seconds_in_twenty_is_told_by_its_true_p99(closed):
    """One in ten waits 0 to 2 s, so that one in a hundred waits longer than 1.8 s; a closed loop never sees that."""
    traffic = Traffic(users=100, period=0.1, seconds=20.0, gaps="constant", closed=closed, session=0)
    run = in_virtual_time(lambda: ran(traffic, Fake(stalled)))
    p99 = run.figures()["total_ms"]["p99"]
    if closed:
        assert p99 < 1000
    else:
        assert p99 == pytest.approx(1810, rel=0.01)
        exact = [stalled(arrival.at) for arrival in arrivals(Sessions(traffic))]
        assert p99 == pytest.approx(1000 * np.percentile(exact, 99), rel=0.002)
    assert run.figures()["lost"] == 0


def test_total_and_added_are_told_apart_and_so_is_the_wait_for_ones_own_reply():
    kept = [Arrival(0.0, 0, 0), Arrival(1.0, 0, 1), Arrival(1.0, 1, 0)]
    times = iter([2.0, 2.0, 0.25])  # the second message waits 1 s for the first reply
    target = Fake(lambda now: next(times), 0.25)
    run = in_virtual_time(lambda: ran(Traffic(2, 1.0, 5.0), target, Replay(kept, 5.0), patience=CALM))
    figures = run.figures()
    assert figures["total_ms"]["max"] == pytest.approx(2000)
    assert figures["total_ms"]["p50"] == pytest.approx(2000, rel=0.001)
    assert figures["added_ms"]["max"] == pytest.approx(1750)
    assert figures["added_ms"]["p50"] == pytest.approx(750, rel=0.001)
    assert figures["in_flight_peak"] == 3


def test_goodput_counts_the_answers_within_the_objective():
    kept = [Arrival(n / 10, n, 0) for n in range(10)]
    run = in_virtual_time(
        lambda: ran(Traffic(1, 1.0, 5.0), Fake(lambda now: now, 0.1), Replay(kept, 5.0), objective=0.35)
    )
    assert run.figures()["goodput_share"] == 0.5  # 0 to 0.4 s, of which 0.1 is the model's
    unknown = Fake(lambda now: now, None)
    run = in_virtual_time(lambda: ran(Traffic(1, 1.0, 5.0), unknown, Replay(kept, 5.0), objective=0.35))
    assert run.figures()["goodput_share"] == 0.4
    assert run.figures()["added_ms"] == {}
    assert run.figures()["objective"] == {"seconds": 0.35, "of": "total"}


def test_a_reply_that_overtakes_an_earlier_one_is_counted():
    kept = [Arrival(0.0, 0, 0), Arrival(0.1, 0, 1), Arrival(0.2, 1, 0)]
    times = iter([1.0, 0.1, 0.1])
    run = in_virtual_time(lambda: ran(Traffic(2, 1.0, 5.0), Fake(lambda now: next(times)), Replay(kept, 5.0)))
    assert run.figures()["out_of_order"] == 1
    assert run.broken == ["out_of_order"]


def test_what_never_answers_is_lost_and_what_is_only_slow_is_unanswered():
    traffic = Traffic(users=1500, period=1.0, seconds=10.0)
    count = iter(range(10**6))
    run = in_virtual_time(lambda: ran(traffic, Fake(lambda now: 1e9 if next(count) % 10_000 == 5_000 else 0.1)))
    figures = run.figures()
    assert figures["sent"] > 10_000
    assert figures["lost"] == figures["unanswered"] == 1
    assert figures["total_ms"]["max"] > 500  # they count with the time that was waited for them
    assert run.broken == ["lost"]
    traffic = Traffic(users=50, period=1.0, seconds=10.0)
    waits = Patience(idle=100.0, whole=20.0)
    slow = in_virtual_time(lambda: ran(traffic, Fake(lambda now: 60.0), patience=waits))
    assert slow.figures()["lost"] == 0
    assert slow.figures()["unanswered"] == slow.figures()["sent"]


async def test_errors_and_refusals_are_counted_by_kind():
    failures = iter(
        [Overloaded("full"), LLMUnavailable("dead", status=500), LLMUnavailable("busy", status=503), KeyError()]
    )

    class Failing(Fake):
        async def answer(self, message, accepted):
            accepted()
            if (error := next(failures, None)) is not None:
                raise error
            return ("recall", "emotion")

    kept = [Arrival(n / 100, n, 0) for n in range(5)]
    figures = (await ran(Traffic(1, 1.0, 5.0), Failing(), Replay(kept, 5.0))).figures()
    assert figures["errors_by_kind"] == {"LLMUnavailable": 1, "KeyError": 1}
    assert figures["shed_by_kind"] == {"Overloaded": 1, "LLMUnavailable": 1}
    assert (figures["errors"], figures["shed"], figures["turns"], figures["sent"]) == (2, 2, 1, 5)
    assert figures["lost"] == 1  # nobody answered for the KeyError
    assert figures["incomplete"] == 1
    assert figures["missing_by_component"] == {"recall": 1, "emotion": 1}


# against the engine


def engine(folder, latency=0.1, **options):
    prepare = options.pop("prepare", lambda engine: None)
    return EngineTarget(folder, Metered(latency, **options), 1000, prepare)


async def test_a_run_on_the_engine_has_all_figures_and_loses_nothing(tmp_path):
    traffic = Traffic(users=40, period=0.5, seconds=1.0, seed=1)
    run = await ran(traffic, engine(tmp_path), patience=CALM)
    figures = run.figures()
    assert set(figures) >= KEYS
    assert figures["turns"] == figures["sent"] == len(list(arrivals(Sessions(traffic))))
    assert not any(figures[name] for name in ("errors", "shed", "lost", "duplicated", "out_of_order", "unanswered"))
    assert not run.broken
    assert not figures["partial"]
    assert figures["total_ms"]["p50"] >= 100
    assert 0 < figures["added_ms"]["p50"] <= figures["added_ms"]["p99"] <= figures["added_ms"]["max"]
    assert figures["in_flight_peak"] > 1
    assert figures["cpu_us_per_turn"] > 0
    assert figures["rss_peak_mb"] > 10
    assert len(run.samples) >= 1


@once
async def test_with_the_models_time_doubled_the_total_doubles_and_the_added_time_does_not(tmp_path):
    traffic = Traffic(users=200, period=5.0, seconds=0.8, seed=2, session=0)
    single = (await ran(traffic, engine(tmp_path / "1", 0.7), patience=CALM)).figures()
    double = (await ran(traffic, engine(tmp_path / "2", 1.4), patience=CALM)).figures()
    assert double["total_ms"]["p50"] - single["total_ms"]["p50"] == pytest.approx(700, abs=200)
    assert abs(double["added_ms"]["p50"] - single["added_ms"]["p50"]) < 200


@once
async def test_a_slow_component_is_seen_in_the_added_time(tmp_path):
    async def slow(turn):
        await asyncio.sleep(0.8)
        return "late"

    traffic = Traffic(users=200, period=5.0, seconds=0.8, seed=2, session=0)
    fast = (await ran(traffic, engine(tmp_path / "1", 0.1), patience=CALM)).figures()
    slowed = engine(tmp_path / "2", 0.1, prepare=lambda engine: engine.component("slow", slow, deadline=5.0))
    held = (await ran(traffic, slowed, patience=CALM)).figures()
    for name in ("added_ms", "total_ms"):
        assert held[name]["p50"] - fast[name]["p50"] == pytest.approx(800, abs=200)


class Dropping(EngineTarget):
    """An engine with a bug: it promises one message in `every` and forgets it at once."""

    calls = 0
    every = 100

    async def answer(self, message, accepted):
        self.calls += 1
        if self.calls % self.every == self.every // 2:
            accepted()
            await Ticket(message.id).reply()
        return await super().answer(message, accepted)


@once
async def test_a_message_that_the_engine_drops_is_told(tmp_path):
    traffic = Traffic(users=100, period=0.5, seconds=0.5, session=0)
    run = await ran(traffic, Dropping(tmp_path, Metered(0.0), 100), patience=Patience(1.0, 60.0))
    assert run.figures()["lost"] == run.figures()["unanswered"] == 1
    assert run.broken == ["lost"]


@pytest.mark.soak
def test_a_bug_that_drops_one_message_in_ten_thousand_is_told(tmp_path):
    traffic = Traffic(users=3000, period=10.0, seconds=65.0)
    target = Dropping(tmp_path, Metered(0.05), 3000)
    target.every = 10_000
    with asyncio.Runner() as runner:
        figures = runner.run(ran(traffic, target, patience=Patience(20.0, 120.0))).figures()
    assert 15_000 < figures["sent"] < 24_000
    assert figures["lost"] == round(figures["sent"] / 10_000)


@pytest.mark.parametrize("bug", ["unwritten", "forgotten", "doubled"])
async def test_what_the_disk_does_not_confirm_is_told(tmp_path, bug):
    """The reply came, but the journal lost the entry or its reply, or the turn is stored twice."""
    spoil = {
        "unwritten": "DELETE FROM journal WHERE message_id = '0-3-0'",
        "forgotten": "UPDATE journal SET state = 0 WHERE message_id = '0-3-0'",
        "doubled": "INSERT INTO conversation SELECT user, platform, channel, scope, turn + 1000, at, text, reply "
        "FROM conversation WHERE user = 'user-3' LIMIT 1",
    }

    class Spoilt(EngineTarget):
        @asynccontextmanager
        async def open(self):
            async with super().open():
                yield self
            connection = apsw.Connection(str(self.folder / DATABASE))
            connection.execute(spoil[bug])
            connection.close()

    kept = [Arrival(n / 100, n, 0) for n in range(6)]
    run = await ran(Traffic(1, 1.0, 5.0), Spoilt(tmp_path, Metered(0.01), 10), Replay(kept, 5.0), patience=CALM)
    assert run.figures()["duplicated" if bug == "doubled" else "lost"] == 1


@once
async def test_a_message_that_was_accepted_and_failed_is_no_lost_one(tmp_path):
    run = await ran(Traffic(20, 0.5, 0.5), engine(tmp_path, 0.01, faults=0.5, seed=3), patience=Patience(20.0, 60.0))
    figures = run.figures()
    assert figures["lost"] == 0
    assert figures["turns"] + figures["errors"] + figures["shed"] == figures["sent"]


@once
async def test_the_sequential_way_is_measured_in_the_same_terms(tmp_path):
    traffic = Traffic(users=12, period=1.0, seconds=1.0)
    target = SequentialTarget(tmp_path, Metered(0.05), 12)
    run = await ran(traffic, target, patience=CALM)
    figures = run.figures()
    assert set(figures) >= KEYS
    assert figures["target"] == "sequential"
    assert figures["turns"] == figures["sent"] > 0
    assert figures["lost"] == figures["duplicated"] == 0


@once
async def test_a_backlog_of_the_sequential_way_is_left_when_patience_ends(tmp_path):
    traffic = Traffic(users=60, period=1.0, seconds=0.5)
    target = SequentialTarget(tmp_path, Metered(0.2), 60)
    figures = (await ran(traffic, target, patience=Patience(5.0, 0.5))).figures()
    assert figures["unanswered"] > 0
    assert figures["lost"] == 0
    assert figures["turns"] + figures["unanswered"] == figures["sent"]


async def test_a_folder_that_holds_a_database_is_refused(tmp_path):
    await ran(Traffic(1, 0.1, 0.2), engine(tmp_path, 0.0))
    with pytest.raises(SettingsError, match="holds a database"):
        engine(tmp_path)


# against a server


@once
async def test_a_server_is_measured_over_http():
    traffic = Traffic(users=20, period=0.5, seconds=0.5)
    async with FaultyLLM(SimulatedLLM(0.1)) as server:
        run = await ran(traffic, ServerTarget(server.url, model_seconds=0.1), patience=CALM)
        sent = run.figures()
        assert sent["turns"] == sent["sent"] == server.requests["/v1/chat/completions"]
        assert sent["duplicated"] is None
        assert sent["added_ms"]["p50"] < sent["total_ms"]["p50"] - 99
        assert not run.broken
        server.draw = lambda: "rate_limited" if len(server.seen) % 2 else "error"
        failed = (await ran(traffic, ServerTarget(server.url))).figures()
        assert failed["shed_by_kind"].keys() == {"LLMRateLimited"}
        assert failed["errors_by_kind"].keys() == {"LLMUnavailable"}
        server.draw = lambda: "hang" if len(server.seen) % 10 == 5 else None
        lost = (await ran(traffic, ServerTarget(server.url), patience=Patience(1.0, 30.0))).figures()
        assert lost["lost"] == lost["unanswered"] > 0


async def test_an_address_where_nobody_is_ends_the_run_at_once():
    run = Run(Traffic(1, 1.0, 1.0), Sessions(Traffic(1, 1.0, 1.0)), ServerTarget("http://127.0.0.1:9"))
    with pytest.raises(LLMUnavailable, match="nobody answers"):
        await run.run()
    assert run.figures()["sent"] == 0
    with pytest.raises(SettingsError):
        ServerTarget("not an address")


@once
async def test_a_run_that_is_cancelled_keeps_what_it_counted(tmp_path):
    traffic = Traffic(users=50, period=0.5, seconds=60.0)
    run = Run(traffic, Sessions(traffic), engine(tmp_path, 0.05))
    enough = asyncio.Event()
    running = asyncio.create_task(run.run(lambda run: enough.set() if run.tally.answered > 20 else None))
    await enough.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    figures = run.figures()
    assert figures["partial"]
    assert figures["turns"] > 20
    assert figures["lost"] == 0
    assert not run.broken


# the model


async def test_the_model_says_what_it_took_and_takes_as_long_as_a_replayed_request():
    model = Metered(0.03, 5)
    said = [{"role": "user", "content": "hello"}]
    model.expect("hello")
    await model.chat(said)
    assert model.took("hello") == pytest.approx(0.03)
    assert model.took("hello") == 0.0
    await model.chat(said)  # nobody asked for this one
    assert model.took("hello") == 0.0
    model.expect("hello", Length(prompt=40, answer=30))
    begun = clock.monotonic()
    answer = await model.chat(said)
    assert clock.monotonic() - begun >= 0.5
    assert model.took("hello") == pytest.approx(40 / 4000 + 30 / 60)
    assert len(answer.text) == 4 * 30


async def test_of_calls_at_the_same_time_the_one_that_ends_first_counts():
    model = Metered(lambda rng: 0.0)
    model.expect("hi")
    model._expected["hi"][1].extend([(10.0, 60.0), (12.0, 15.0)])  # a slow call, and the one that hedged it
    assert model.took("hi") == 5.0


async def test_a_share_of_the_calls_suffers():
    model, said, seen = Metered(0.0, faults=0.5, seed=1), [{"role": "user", "content": "hi"}], []
    for _ in range(200):
        try:
            await model.chat(said)
        except LLMError as error:
            seen.append(type(error).__name__)
    kinds = len(FAULTS) - 1  # a slow call is no error
    assert 50 < len(seen) < 100
    assert len(set(seen)) == kinds
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(SettingsError, match="faults"):
            Metered(0.0, faults=wrong)
