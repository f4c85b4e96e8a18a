"""The proofs hold, and each of them can fail: with an engine that breaks its promise the figure is not 0."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import time
from itertools import count
from mmap import mmap
from types import SimpleNamespace

import psutil
import pytest
from served import heed_ctrl_c
from typer.testing import CliRunner

from whisper_fast import Engine, conversation, journal, lanes
from whisper_fast.cli.app import app
from whisper_fast.errors import Overloaded
from whisper_fast.journal import Journal
from whisper_fast.lab import prove
from whisper_fast.lab.prove import crash, overload, proved
from whisper_fast.lab.prove.crash import Crash
from whisper_fast.lab.prove.duplicates import Duplicates
from whisper_fast.lab.prove.isolation import PLACES, Isolation
from whisper_fast.lab.prove.order import Order, Wait
from whisper_fast.lab.prove.overload import Overload
from whisper_fast.lab.prove.points import POINTS
from whisper_fast.lab.prove.simulation import Simulation
from whisper_fast.lanes import Lanes
from whisper_fast.memory import MemoryStore, segment
from whisper_fast.models.embedder import StaticEmbedder
from whisper_fast.turns import Turns

FORGETFUL = """
from whisper_fast.journal import Journal
from whisper_fast.lab.prove.victim import main
async def nothing(self): return []
Journal.unfinished = nothing
main()
"""
REPEATING = """
from whisper_fast import journal
from whisper_fast.lab.prove.victim import main
complete = journal.Journal.complete
async def twice(self, entry, *stores, sent):
    done = await complete(self, entry, *stores, sent=sent)
    await self._database.write(lambda c: c.execute(
        "INSERT INTO conversation SELECT user, platform, channel, scope, turn + 1000000, at, text, reply "
        "FROM conversation WHERE turn = ?", (entry.id,)).get)
    return done
journal.Journal.complete = twice
main()
"""
SILENT = """
import asyncio
from whisper_fast.engine import Engine
from whisper_fast.lab.prove.victim import main
async def never(self, message, **_): await asyncio.Event().wait()
Engine.submit = never
main()
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(overload, "CALM", 0.2)


def run(proof):
    shown = []
    figures = asyncio.run(proved(proof, lambda share, words: shown.append(share)))
    assert figures == figures | json.loads(json.dumps(figures))
    assert shown
    assert all(0 <= share <= 1.05 for share in shown)
    return SimpleNamespace(**figures)


def test_fifty_kills_lose_nothing_and_double_nothing():
    found = run(proof := Crash(50, seed=1))
    assert (found.kills, found.lost, found.duplicated) == (50, 0, 0)
    assert found.accepted > 200
    assert len(found.at) > len(POINTS) / 2
    assert not proof.broken()


@pytest.mark.parametrize(("victim", "figure"), [(FORGETFUL, "lost"), (REPEATING, "duplicated")])
def test_an_engine_that_forgets_or_repeats_is_found_out(victim, figure):
    found = run(proof := Crash(6, seed=2, victim=(sys.executable, "-P", "-c", victim)))
    assert getattr(found, figure) > 0
    assert proof.broken()


def test_order_holds():
    found = run(proof := Order(50, 12, seed=1))
    assert (found.messages, found.inversions, found.starved) == (600, 0, 0)
    assert found.worst_wait_ratio > 0
    assert found.failed > 0
    assert not proof.broken()


def all_at_once(all_lanes, user):
    for place in all_lanes._lanes[user]:
        if place.task is None and place.work is not None:
            place._slot = False
            all_lanes._run(place)


def test_lanes_that_reorder_are_found_out(monkeypatch):
    monkeypatch.setattr(Lanes, "_advance", all_at_once)
    assert run(proof := Order(10, 12)).inversions > 0
    assert proof.broken()


def test_a_queue_that_lets_the_same_ones_by_again_and_again_is_found_out(monkeypatch):
    monkeypatch.setattr(lanes, "FairQueue", Favourites)
    monkeypatch.setattr(Engine, "_slots", lambda _: 4)  # so that most of them wait
    found = run(proof := Order(40, 20, seed=1))
    assert found.starved > 0
    assert found.inversions == 0
    [wrong] = proof.broken()
    assert wrong.startswith("starved")


class Favourites:
    """A queue of turns in which the user whose name comes last goes first."""

    remembered, oldest = 0, None

    def __init__(self):
        self.waiting_ones = {}
        self.numbers = count(1)

    def __len__(self):
        return len(self.waiting_ones)

    def push(self, place, user, **_):
        number = next(self.numbers)
        self.waiting_ones[number] = place
        return number

    def pop(self):
        return self.waiting_ones.pop(max(self.waiting_ones, key=lambda one: (self.waiting_ones[one].user, one)))

    def remove(self, number):
        self.waiting_ones.pop(number, None)

    def waiting(self):
        return {0: len(self)}

    def clear(self):
        self.waiting_ones.clear()


def test_a_wait_counts_the_calls_for_others_and_no_pause():
    wait = Wait()
    wait.sent(10)
    wait.sent(15)
    wait.asked(30, first=True)
    assert wait.longest == 20
    wait.failed()
    wait.sent(40)
    wait.asked(900, first=False)
    wait.asked(915, first=True)
    assert wait.longest == 20
    wait.asked(940, first=True)
    assert (wait.longest, wait.since) == (25, None)


def test_isolation_holds():
    found = run(proof := Isolation(50, 4000, seed=1))
    assert (found.recalls, found.leaks) == (4000, 0)
    assert found.memories_found > 4000
    assert all(found.looked_at.values())
    assert not proof.broken()


def test_a_memory_that_tells_private_things_in_public_is_found_out(monkeypatch):
    monkeypatch.setattr(segment, "may_see", lambda asking, told: True)
    assert {"recalls", "prompts"} <= run(proof := Isolation(20, 1000)).leaked.keys()
    assert proof.broken()


def test_a_memory_that_mixes_users_is_found_out(monkeypatch):
    recall, calls = MemoryStore.recall, count()

    async def mixed(self, user, *rest, **more):
        return await recall(self, "u1" if next(calls) % 100 == 0 else user, *rest, **more)

    monkeypatch.setattr(MemoryStore, "recall", mixed)
    assert run(proof := Isolation(20, 1000)).leaked["recalls"] > 0
    assert proof.broken()


@pytest.mark.parametrize("name", ["whisper_fast.turns", "uvicorn.error", "a.bot"])
@pytest.mark.parametrize("level", [logging.DEBUG, logging.ERROR])
def test_words_in_a_traceback_and_of_any_logger_are_found_out(monkeypatch, name, level):
    failed, log = Turns._failed, logging.getLogger(name)

    async def telling(self, around, error):
        log.log(level, "a message failed", exc_info=ValueError(around.first.message.text))
        await failed(self, around, error)

    monkeypatch.setattr(Turns, "_failed", telling)
    assert run(proof := Isolation(20, 400)).leaked.keys() == {"logs"}
    assert proof.broken()


def test_a_cache_that_mixes_places_is_found_out(monkeypatch):
    newest = conversation.newest

    def mixed(connection, key, count, longest):
        return newest(connection, (f"u{(int(key[0][1:]) + 1) % 5}", *key[1:]), count, longest)

    monkeypatch.setattr(conversation, "newest", mixed)
    assert run(Isolation(5, 3000)).leaked["caches"] > 0


def test_a_memory_that_is_kept_for_somebody_else_is_found_out(monkeypatch):
    get = MemoryStore.caches

    def swapped(self):
        caches = get(self)
        names = caches["segments"].keys()
        whole = {name: caches["segments"].get(name) for name in names}
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            caches["segments"].put(name, whole[other])
        return caches

    monkeypatch.setattr(MemoryStore, "caches", swapped)
    assert run(Isolation(5, 400)).leaked["caches"] > 0


def test_a_batch_that_mixes_its_items_is_found_out(monkeypatch):
    embed = StaticEmbedder.embed

    def mixed(self, texts):
        return embed(self, texts)[::-1]

    monkeypatch.setattr(StaticEmbedder, "embed", mixed)
    assert run(Isolation(20, 400)).leaked["batches"] > 0


def test_duplicates_get_the_same_answer():
    found = run(proof := Duplicates(2000, seed=1))
    assert (found.deliveries, found.duplicates, found.lost) == (2000, 0, 0)
    assert found.redelivered > 300
    assert not proof.broken()


def test_a_journal_that_does_not_know_its_ids_is_found_out(monkeypatch):
    insert, numbers = journal.insert, count()

    def always_new(connection, message, body, age):
        entry = insert(connection, message, body, age)
        connection.execute("UPDATE journal SET channel = ? WHERE id = ?", (f"c{next(numbers)}", entry.id))
        return entry

    monkeypatch.setattr(journal, "insert", always_new)
    assert run(proof := Duplicates(600)).duplicates > 0
    assert proof.broken()


def short(proof):
    proof._seconds |= {"before": 0.5, "peak": 1.0, "after": 0.5}
    return proof


def test_a_flood_is_shed_and_loses_nothing():
    found = run(short(Overload(2, seed=1)))
    assert found.lost == 0
    assert found.accepted > 200
    assert found.shed > 500
    assert found.before_ms.keys() == found.flood_ms.keys() == found.after_ms.keys() == {"p50", "p99"}
    assert None not in (found.goodput_share, found.shed_p99_ms, found.after_ratio, found.rss_grown_mb)


GOOD = {
    Overload: {
        "goodput_share": 0.97, "shed_p99_ms": 0.1, "lost": 0, "accepted": 1500, "shed": 4500, "after_ratio": 1.02,
        "rss_grown_mb": 12.0,
    },
    Crash: {"kills": 50, "accepted": 900, "heard": 800, "lost": 0, "duplicated": 0},
    Duplicates: {"deliveries": 10, "heard": 8, "redelivered": 2, "duplicates": 0, "lost": 0},
    Isolation: {
        "leaks": 0, "memories_found": 7,
        "looked_at": dict.fromkeys(PLACES, 1),
    },
    Simulation: {"seeds": 10, "messages": 100, "answered": 90, "broken": 0},
}  # fmt: skip


@pytest.mark.parametrize("proof", GOOD)
def test_good_figures_are_good(proof):
    assert proof.judge(GOOD[proof]) == []


@pytest.mark.parametrize(
    ("proof", "figure", "value"),
    [
        (Overload, "goodput_share", 0.89),
        (Overload, "goodput_share", None),
        (Overload, "shed_p99_ms", 1013.0),
        (Overload, "shed_p99_ms", None),
        (Overload, "after_ratio", 2.5),
        (Overload, "after_ratio", None),
        (Overload, "rss_grown_mb", 162.0),
        (Overload, "lost", 1),
        (Overload, "shed", 0),
        (Overload, "accepted", 0),
        (Crash, "lost", 1),
        (Crash, "duplicated", None),
        (Crash, "accepted", 0),
        (Crash, "heard", 0),
        (Duplicates, "redelivered", 0),
        (Duplicates, "heard", 0),
        (Isolation, "memories_found", 0),
        (Isolation, "looked_at", {**GOOD[Isolation]["looked_at"], "prompts": 0}),
        (Simulation, "answered", 0),
        (Simulation, "messages", 0),
    ],
)
def test_a_figure_that_breaks_the_promise_is_named(proof, figure, value):
    [wrong] = proof.judge({**GOOD[proof], figure: value})
    assert figure in wrong


def test_of_a_run_that_was_cut_short_only_what_went_wrong_counts():
    figures = {**GOOD[Overload], "goodput_share": None, "shed": 0, "lost": 0}
    assert Overload.judge(figures, whole=False) == []
    assert Overload.judge({**figures, "lost": 2}, whole=False) == ["lost is 2, not 0"]


def test_an_engine_that_refuses_everything_is_found_out(monkeypatch):
    async def refuse(self, *_, **__):
        raise Overloaded("no", retry_after=1.0)

    monkeypatch.setattr(Engine, "submit", refuse)
    run(proof := short(Overload(1)))
    assert {"accepted", "goodput_share", "after_ratio"} <= set(" ".join(proof.broken()).split())


def test_refusals_that_wait_and_memory_that_grows_are_found_out(monkeypatch):
    submit, kept = Turns.submit, []

    async def slow(self, message, **more):
        try:
            return await submit(self, message, **more)
        except Overloaded:
            kept.append(mmap(-1, 400_000))  # fresh pages, whatever earlier tests have left to be used again
            kept[-1].write(bytes(400_000))
            await asyncio.sleep(0.05)
            raise

    monkeypatch.setattr(Turns, "submit", slow)
    run(proof := short(Overload(1)))
    for pages in kept:
        pages.close()
    assert {"shed_p99_ms", "rss_grown_mb"} <= set(" ".join(proof.broken()).split())


def test_an_engine_that_never_accepts_has_proved_nothing(monkeypatch):
    monkeypatch.setattr(crash, "PATIENCE", 0.3)
    run(proof := Crash(4, seed=1, victim=(sys.executable, "-P", "-c", SILENT)))
    assert proof.broken() == ["nothing was proved: accepted is 0", "nothing was proved: heard is 0"]


def test_a_memory_that_finds_nothing_has_proved_nothing(monkeypatch):
    async def nothing(self, questions, **_):
        return [[] for _ in questions]

    monkeypatch.setattr(MemoryStore, "recall_many", nothing)
    run(proof := Isolation(20, 1000))
    assert "nothing was proved: memories_found is 0" in proof.broken()


def test_a_journal_that_does_not_record_is_found_out(monkeypatch):
    async def forget(self, *_):
        pass

    monkeypatch.setattr(Journal, "record", forget)
    assert run(proof := short(Overload(1))).lost > 0
    assert proof.broken()


# ---- the command


def test_a_broken_promise_ends_the_command_with_1_and_says_how_to_see_it_again(monkeypatch):
    monkeypatch.setattr(Lanes, "_advance", all_at_once)
    ended = CliRunner().invoke(app, ["prove", "order", "--users", "10", "--messages", "12", "--seed", "5", "--json"])
    assert ended.exit_code == 1
    assert json.loads(ended.stdout)["inversions"] > 0
    assert "whisper-fast prove order --users 10 --messages 12 --seed 5" in " ".join(ended.stderr.split())


def test_a_promise_kept_ends_with_0_and_one_object():
    ended = CliRunner().invoke(app, ["prove", "order", "--users", "5", "--messages", "3", "--json"])
    assert ended.exit_code == 0
    assert ended.stdout.count("\n") == 1
    assert json.loads(ended.stdout)["messages"] == 15


def test_a_proof_that_cannot_go_on_prints_its_figures_and_how_to_see_it_again(monkeypatch):
    async def ill(self, *_, **__):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(Engine, "submit", ill)
    ended = CliRunner().invoke(app, ["prove", "order", "--users", "5", "--messages", "3", "--seed", "4", "--json"])
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    assert (found["messages"], found["partial"]) == (0, True)
    assert found["error"].startswith("KeyError: 'nobody thought of this' (test_prove.py:")
    told = " ".join(ended.stderr.split())
    assert "nobody thought of this" in told
    assert "whisper-fast prove order --users 5 --messages 3 --seed 4" in told


def test_a_day_that_cannot_be_lived_is_filed_under_its_seed(monkeypatch):
    live = prove.simulation.simulate

    def ill(seed, folder):
        if seed == 12:
            raise ZeroDivisionError("nobody thought of this day")
        return live(seed, folder)

    monkeypatch.setattr(prove.simulation, "simulate", ill)
    ended = CliRunner().invoke(app, ["prove", "simulation", "--seeds", "4", "--seed", "10", "--json"])
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    assert (found["seeds"], found["broken"]) == (4, 1)
    assert "nobody thought of this day" in found["found"]["12"]["raised"]
    assert "whisper-fast prove simulation --seeds 1 --seed 12" in " ".join(ended.stderr.split())


def test_ctrl_c_prints_what_was_counted_so_far():
    command = [sys.executable, "-P", "-m", "whisper_fast", "prove", "crash", "--kills", "100000", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heed_ctrl_c, **pipes) as process:
        try:
            wait_for_child(process.pid)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert json.loads(out)["partial"] is True
    assert "Traceback" not in err


def wait_for_child(pid):
    """Return once the process has a child: the proof is under way."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if psutil.Process(pid).children():
            return
        time.sleep(0.02)
    raise AssertionError("the proof did not start")


# ---- the figures of the promises


@pytest.mark.soak
def test_a_thousand_kills():
    found = run(Crash(1000))
    assert (found.kills, found.lost, found.duplicated) == (1000, 0, 0)


@pytest.mark.soak
def test_a_million_messages_in_order():
    found = run(Order(500, 2000))
    assert (found.messages, found.inversions, found.starved) == (1_000_000, 0, 0)


@pytest.mark.soak
def test_ten_million_recalls():
    found = run(Isolation(1000, 10_000_000))
    assert (found.recalls, found.leaks) == (10_000_000, 0)


@pytest.mark.soak
def test_a_million_deliveries():
    found = run(Duplicates(1_000_000))
    assert (found.deliveries, found.duplicates, found.lost) == (1_000_000, 0, 0)


@pytest.mark.soak
def test_ten_minutes_of_flood():
    run(proof := Overload(600))
    assert proof.broken() == []
