"""Whole days in virtual time: every promise kept, the same day each time, and broken engines found out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from random import Random

import pytest
from typer.testing import CliRunner

from whisper_fast import journal
from whisper_fast.cli.app import app
from whisper_fast.journal import Journal
from whisper_fast.lab.faulty_disk import memory_folder
from whisper_fast.lab.simulation import simulate
from whisper_fast.lab.simulation.loop import Stalled, VirtualLoop
from whisper_fast.lab.simulation.plan import Plan
from whisper_fast.lab.simulation.verdict import Verdict
from whisper_fast.lanes import Lanes
from whisper_fast.memory import MemoryStore, segment
from whisper_fast.message import Message
from whisper_fast.store.writer import Writer

SEEDS = 1000


@pytest.fixture
def folder():
    with memory_folder() as place:
        yield place / "day"


@pytest.fixture
def days(folder):
    """Live days until one of them finds the figure; return what it found."""

    def find(figure, seeds=60):
        for seed in range(seeds):
            found = simulate(seed, folder).broken
            if figure in found:
                return found[figure]
        raise AssertionError(f"{seeds} days, and no {figure}")

    return find


@pytest.mark.parametrize("part", range(10))
def test_a_thousand_days(folder, part):
    for seed in range(part * SEEDS // 10, (part + 1) * SEEDS // 10):
        verdict = simulate(seed, folder)
        assert not verdict.broken, f"whisper-fast prove simulation --seeds 1 --seed {seed}"


@pytest.mark.soak
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_days(folder, part):
    for seed in range(10_000 + part * 500, 10_000 + (part + 1) * 500):
        assert not simulate(seed, folder).broken, f"whisper-fast prove simulation --seeds 1 --seed {seed}"


def test_the_days_hold_what_they_should():
    acts, crashes, policies = set(), 0, set()
    for seed in range(200):
        plan = Plan(seed)
        acts |= {act.kind for act in plan.acts}
        crashes += len(plan.crashes)
        policies.add(plan.policy)
    assert acts == {"respond", "stream", "abandon", "fault", "cut", "jump", "flag", "forget", "hint"}
    assert crashes > 200
    assert policies == {"queue", "merge", "interrupt", "drop"}


def test_order_is_judged_within_the_life_of_a_process():
    verdict = Verdict(0)
    message = Message(user="u0", text="hello", id="m0")
    verdict.born()
    verdict.answered(message, "hi", 3)
    verdict.born()
    verdict.answered(message, "hi", 0)
    assert not verdict.inversions
    verdict.answered(message, "hi", 2)
    verdict.answered(message, "hi", 1)
    assert verdict.inversions == ["m0"]


def test_the_same_seed_is_the_same_day_in_any_process(folder):
    first = [simulate(seed, folder).digest for seed in range(12)]
    assert first == [simulate(seed, folder).digest for seed in range(12)]
    assert len(set(first)) == 12
    code = (
        "import sys; from pathlib import Path; from whisper_fast.lab.simulation import simulate\n"
        "print(*(simulate(seed, Path(sys.argv[1])).digest for seed in range(12)))"
    )
    command = [sys.executable, "-P", "-c", code, str(folder)]
    done = subprocess.run(command, env={"PYTHONHASHSEED": "4711"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == first


# ---- it can fail


def test_a_start_that_forgets_what_was_open(monkeypatch, days):
    async def nothing(self):
        return []

    monkeypatch.setattr(Journal, "unfinished", nothing)
    assert days("lost")


def test_a_writer_that_tells_before_it_has_committed(monkeypatch, days):
    def hasty(self, group):
        connection = self._opened.connection
        connection.execute("BEGIN IMMEDIATE")
        for write in group:
            write.result = write.job(connection)
        connection.execute("COMMIT" if self.commits % 3 else "ROLLBACK")

    monkeypatch.setattr(Writer, "_commit", hasty)
    assert days("lost")


def test_a_journal_that_does_not_know_its_ids(monkeypatch, days):
    insert = journal.insert

    def always_new(connection, message, body, age):
        entry = insert(connection, message, body, age)
        connection.execute("UPDATE journal SET channel = 'n' || id WHERE id = ?", (entry.id,))
        return entry

    monkeypatch.setattr(journal, "insert", always_new)
    assert days("changed")
    assert days("twice")


def test_lanes_that_reorder(monkeypatch, days):
    def all_at_once(lanes, user):
        for place in lanes._lanes[user]:
            if place.task is None and place.work is not None:
                place._slot = False
                lanes._run(place)

    monkeypatch.setattr(Lanes, "_advance", all_at_once)
    assert days("inversions")


def test_a_memory_that_tells_private_things_in_public(monkeypatch, days):
    monkeypatch.setattr(segment, "may_see", lambda asking, told: True)
    assert days("leaks")


def test_a_forget_that_leaves_the_memories(monkeypatch, days):
    async def nothing(self, user):
        pass

    monkeypatch.setattr(MemoryStore, "forget", nothing)
    monkeypatch.setattr("whisper_fast.engine.forget_user", lambda connection, user, upto: None)
    assert days("remembered")


def test_a_broken_day_ends_the_command_with_1_and_its_seed(monkeypatch):
    monkeypatch.setattr(segment, "may_see", lambda asking, told: True)
    ended = CliRunner().invoke(app, ["prove", "simulation", "--seeds", "30", "--json"])
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    assert found["broken"] > 0
    [first, *_] = found["found"]
    assert f"whisper-fast prove simulation --seeds 1 --seed {first}" in " ".join(ended.stderr.split())


# ---- the loop


def looped(main, delay=lambda: 0.5):
    loop = VirtualLoop(100.0, delay, lambda: True)
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()


def test_an_hour_is_over_at_once_and_timers_keep_their_order():
    async def main(loop):
        order = []
        random = Random(1)

        async def wait(seconds):
            await asyncio.sleep(seconds)
            order.append(seconds)

        await asyncio.gather(*(wait(random.uniform(0, 3600)) for _ in range(50)))
        assert order == sorted(order)
        assert loop.time() == pytest.approx(100.0 + order[-1])

    looped(main)


def test_what_a_thread_would_do_comes_later_and_errors_too():
    async def main(loop):
        assert await asyncio.to_thread(lambda: 7) == 7
        assert loop.time() == pytest.approx(100.5)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    looped(main)


def test_waiting_for_what_never_comes_is_an_error():
    async def main(loop):
        await loop.create_future()

    with pytest.raises(Stalled):
        looped(main)
