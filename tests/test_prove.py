"""The proofs hold, and each of them can fail: with an engine that breaks its promise the figure is not 0."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from itertools import count
from types import SimpleNamespace

import psutil
import pytest
from served import heed_ctrl_c
from typer.testing import CliRunner

from whisper_fast import journal
from whisper_fast.cli.app import app
from whisper_fast.journal import Journal
from whisper_fast.lab.prove import overload, proved
from whisper_fast.lab.prove.crash import Crash
from whisper_fast.lab.prove.duplicates import Duplicates
from whisper_fast.lab.prove.isolation import Isolation
from whisper_fast.lab.prove.order import Order
from whisper_fast.lab.prove.overload import Overload
from whisper_fast.lab.prove.points import POINTS
from whisper_fast.lanes import Lanes
from whisper_fast.memory import MemoryStore, segment

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
    assert found.failed > 0
    assert not proof.broken()


def all_at_once(lanes, user):
    for place in lanes._lanes[user]:
        if place.task is None and place.work is not None:
            place._slot = False
            lanes._run(place)


def test_lanes_that_reorder_are_found_out(monkeypatch):
    monkeypatch.setattr(Lanes, "_advance", all_at_once)
    assert run(proof := Order(10, 12)).inversions > 0
    assert proof.broken()


def test_isolation_holds():
    found = run(proof := Isolation(50, 4000, seed=1))
    assert (found.recalls, found.leaks) == (4000, 0)
    assert found.memories_found > 4000
    assert all(found.looked_at[place] > 0 for place in ("prompts", "replies", "streams", "errors", "logs"))
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


def test_a_flood_is_shed_and_loses_nothing():
    found = run(proof := Overload(2, seed=1))
    assert found.lost == 0
    assert found.goodput_share > 0.5
    assert found.shed > 500
    assert proof.broken() == (found.goodput_share < overload.ENOUGH)


def test_a_journal_that_does_not_record_is_found_out(monkeypatch):
    async def forget(self, *_):
        pass

    monkeypatch.setattr(Journal, "record", forget)
    assert run(proof := Overload(1)).lost > 0
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
    assert not proof.broken()
