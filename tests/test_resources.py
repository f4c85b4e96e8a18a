"""What the bottleneck finder reads and how it judges: made-up readings, the probe, and an engine that counts."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from math import inf

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scripted import quick, said

from whisper_fast import Engine, Settings
from whisper_fast.llm import SimulatedLLM
from whisper_fast.monitor import LoopWatch, Probe, finder
from whisper_fast.monitor.advice import SAYS, advice
from whisper_fast.monitor.bottleneck import blamed, confidence
from whisper_fast.monitor.resources import Reading, Station

# ---- the judgement, on made-up readings


def reading(turns=10.0, users=10.0, **stations):
    """A reading in which nothing happens, but for the stations that are given."""
    idle = {
        "turns": Station(inf, turns),
        "slots": Station(60, 0.0),
        "users": Station(inf, users),
        "retries": Station(inf),
        "sender": Station(inf),
        "disk": Station(1),
        "loop": Station(1),
        "reads": Station(2),
        "threads": Station(4),
        "processes": Station(2),
        "memory": Station(1000),
        "interpreter": Station(1),
        "llm m": Station(50),
        "cache recall": Station(inf),
        "batch embedding": Station(4),
    }
    given = {name.replace("_", " "): station for name, station in stations.items()}
    pools = ("processes", "threads")
    through = {"a": pools, "t": ("threads",), "recall": ("cache recall", "reads"), "e": ("batch embedding", *pools)}
    return Reading(1.0, 20, idle | given, {}, through)


def first(given):
    held = blamed(given)
    return held.ranks[0][0], held.ranks[0][1] / max(held.total, given.stations["turns"].busy)


def test_who_waits_for_a_slot_waits_for_what_those_wait_who_have_one():
    at_model = reading(slots=Station(8, 8.0, 2.0), llm_m=Station(8, 8.0))
    at_component = reading(slots=Station(8, 8.0, 2.0), component_a=Station(inf, 8.0))
    assert first(at_model) == ("llm m", 1.0)
    assert first(at_component) == ("component a", 1.0)


def test_a_pool_gets_what_waits_for_it_and_the_component_what_runs():
    held = blamed(reading(slots=Station(60, 10.0), component_t=Station(inf, 10.0), threads=Station(2, 2.0, 8.0)))
    assert held == {"threads": pytest.approx(8.0), "component t": pytest.approx(2.0)}


def test_threads_that_fight_for_the_interpreter_are_not_too_few():
    given = reading(slots=Station(60, 10.0), component_t=Station(inf, 10.0), threads=Station(2, 2.0, 8.0))
    given.stations["interpreter"] = Station(1, 1.0)
    assert first(given) == ("interpreter", 1.0)


def test_what_is_surely_in_threads_is_nobody_elses_call():
    given = reading(
        slots=Station(60, 10.0), component_t=Station(inf, 5.0), component_a=Station(inf, 5.0), threads=Station(5, 5.0)
    )
    assert blamed(given) == {"component t": pytest.approx(5.0), "component a": pytest.approx(5.0)}


@pytest.mark.parametrize(
    ("running", "lingers"), [(1.0, 6.0), (4.0, 0.0)], ids=["one batch runs", "as many run as may"]
)
def test_items_linger_only_while_a_further_batch_might_run(running, lingers):
    batch = Station(4, running, 8.0, 2.0)
    held = blamed(reading(slots=Station(60, 10.0), component_e=Station(inf, 10.0), batch_embedding=batch))
    assert held.get("batch embedding", 0.0) == pytest.approx(lingers)
    assert held.total == pytest.approx(10.0)


@pytest.mark.parametrize(("evicted", "blame"), [(100.0, "cache recall"), (0.0, "reads")])
def test_a_load_is_the_caches_fault_as_far_as_it_put_something_out(evicted, blame):
    cache = Station(inf, 10.0, done=100.0, overflow=evicted)
    given = reading(slots=Station(60, 10.0), component_recall=Station(inf, 10.0), cache_recall=cache)
    assert first(given) == (blame, 1.0)
    squeezed = given._replace(squeezed=frozenset({"recall"}))
    assert first(squeezed)[0] == ("memory" if evicted else "reads")


def test_one_user_is_to_blame_only_beyond_the_mean():
    alone = reading(turns=30.0, users=10.0, slots=Station(60, 10.0), llm_m=Station(50, 10.0))
    flood, all_alike = dict(alone.stations), dict(alone.stations)
    flood["users"] = Station(inf, 10.0, 20.0)  # the longest lane holds all 20 that wait
    all_alike["users"] = Station(inf, 10.0, 2.0)  # each of them waits behind one of ten
    assert first(alone._replace(stations=flood))[0] == "one user"
    assert first(alone._replace(stations=all_alike)) == ("llm m", pytest.approx(1.0))


@pytest.mark.parametrize(
    ("error", "blame"), [("LLMRateLimited", "llm limit m"), ("LLMUnavailable", "llm m"), ("StoreFull", "disk")]
)
def test_turns_between_two_tries_wait_for_what_failed(error, blame):
    given = reading(retries=Station(inf, 10.0), llm_m=Station(50, overflow=3.0))._replace(errors={error: 5.0})
    assert first(given) == (blame, 1.0)


def test_messages_that_are_refused_for_memory_count_though_no_turn_is_under_way():
    assert first(reading(turns=0.0, users=0.0, memory=Station(1000, 999, 1.0, overflow=50.0)))[0] == "memory"


NAMES = sorted(reading().stations) + [f"component {name}" for name in ("a", "t", "recall", "e", "stranger")]
NUMBERS = st.floats(0, 1e6, allow_nan=False)
STATIONS = st.builds(Station, st.sampled_from([0.0, 1.0, 4.0]), *[NUMBERS] * 5)


@examples(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), STATIONS), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_whatever_is_read_shares_are_shares_and_every_resource_has_its_sentence(given, held, others, late):
    one = reading()
    one.stations.update(given)
    one.stations["loop"] = one.stations["loop"]._replace(busy=held)
    one.stations["interpreter"] = Station(1, others)
    one = one._replace(late=late, errors={"LLMTimeout": 1.0, "odd": 2.0})
    blame = blamed(one)
    assert all(0 < turns < inf for turns in blame.values())
    ranks = [turns for _, turns in blame.ranks]
    assert ranks == sorted(ranks, reverse=True)
    for name, turns in blame.ranks:
        assert "Without that a turn would take up to" in advice(name, turns / blame.total, one)
        assert name in SAYS or name.partition(" ")[0] in SAYS


@given(NUMBERS, NUMBERS, NUMBERS)
def test_confidence_is_between_0_and_1_and_grows_with_what_was_seen(one, other, seen):
    more, less = max(one, other), min(one, other)
    assert 0.0 <= confidence(more, less, seen) <= 1.0
    assert confidence(more, less, 2 * seen) >= confidence(more, less, seen)
    assert confidence(more, more, seen) == 0.0


# ---- the probe


async def test_the_probe_sees_a_callback_that_sleeps_and_a_loop_at_rest():
    watch = LoopWatch()
    probe = Probe(watch)
    watch.start()
    probe.start()
    try:
        while not watch.lag.count:
            await asyncio.sleep(0.01)
        probe.wake()
        while probe.visits.all < 3:
            await asyncio.sleep(0.2)
        before = probe.visits
        while probe.visits.all < before.all + 3:
            time.sleep(0.05)  # in a callback, without the interpreter
        assert probe.visits.since(before).held > 0
        probe.sleep()
    finally:
        probe.stop()
        watch.stop()
    assert before.all - before.held > 0


# ---- in the engine


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path, process_pool_size=1, thread_pool_size=2)


async def test_an_engine_at_rest_finds_nothing_and_one_at_work_says_all_of_it(settings, monkeypatch):
    monkeypatch.setattr(finder, "SECONDS", 0.2)
    monkeypatch.setattr(finder, "REST", 0.02)
    async with Engine.open(settings, llm=SimulatedLLM(latency=0.6)) as engine:
        assert engine.stats()["bottleneck"]["resource"] == ""
        answers = [asyncio.create_task(engine.respond(said(f"u{n}", "hello"))) for n in range(10)]
        async with asyncio.timeout(30):
            while not engine.stats()["bottleneck"]["resource"]:
                await asyncio.sleep(0.02)
        found = engine.stats()["bottleneck"]
        await asyncio.gather(*answers)
    assert found["resource"] == "llm simulated"
    assert 0 < found["confidence"] <= 1
    assert 0 < found["share"] <= 1
    assert found["ranking"][0]["resource"] == found["resource"]
    json.dumps(found)


@pytest.mark.parametrize("off", ["bottleneck_detection_enabled", "performance_monitoring_enabled"])
async def test_switched_off_there_is_no_task_and_no_thread(settings, off):
    async with Engine.open(settings.model_copy(update={off: False}), llm=quick()) as engine:
        await engine.respond(said("ada", "hello"))
        assert "bottleneck" not in engine.stats()
        assert "bottleneck" not in {task.get_name() for task in asyncio.all_tasks()}
        assert "interpreter-probe" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("parallel", [True, False])
async def test_whatever_happens_to_turns_no_count_is_left(settings, parallel):
    """Components that fail, are late, and are cancelled; every gauge is back where it was."""
    settings = settings.model_copy(update={"component_deadline": 0.02, "feature_parallel": parallel})

    async def fails(_):
        await asyncio.sleep(0.001)
        raise ValueError("no")

    async def late(_):
        await asyncio.sleep(10)

    async with Engine.open(settings, llm=quick()) as engine:
        engine.component("fails", fails)
        engine.component("late", late)
        engine.component("blocks", lambda _: time.sleep(0.001))
        turns = [asyncio.create_task(engine.respond(said(f"u{n % 5}", f"hello {n}"))) for n in range(20)]
        await asyncio.sleep(0)
        assert engine._lanes.longest >= 1
        await asyncio.gather(*turns)
        async with asyncio.timeout(10):
            while engine._lanes.places or engine._database.waiting or engine._executor.threads.busy:
                await asyncio.sleep(0.01)
        assert engine._pipeline.gathering() == {}
        assert engine._database.reading == engine._outbox.sending == 0
        assert not engine._database.writing
        assert engine._executor.threads.done > 0
        assert engine._lanes.longest == engine._lanes.users == 0


async def test_who_waits_for_several_components_is_shared_among_them(settings):
    gate = asyncio.Event()

    async def waits(_):
        await gate.wait()

    async with Engine.open(settings.model_copy(update={"component_deadline": 30.0}), llm=quick()) as engine:
        engine.component("one", waits)
        engine.component("two", waits)
        turns = [asyncio.create_task(engine.respond(said(f"u{n}", "hello"))) for n in range(4)]
        async with asyncio.timeout(10):
            while engine._pipeline.gathering() != {"one": 2.0, "two": 2.0}:
                await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*turns)
