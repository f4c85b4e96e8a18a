"""The demonstration and what it stands on: the sequential way, the kill -9, the audit."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import closing

import apsw
import pytest

from whisper_fast.cli import measure
from whisper_fast.engine import Engine
from whisper_fast.lab import audit, power_cut, users
from whisper_fast.lab.demo import Plan, demo, lab_settings
from whisper_fast.lab.reference import Sequential
from whisper_fast.llm import SimulatedLLM
from whisper_fast.store.files import DATABASE

SIDE = {"turns", "seconds", "turns_per_s", "added_ms"}


async def test_demo_measures_both_sides_and_loses_nothing():
    plan = Plan(users=12, llm_latency=0.02, memories=5)
    shown = []
    result = await demo(plan, lambda side, figures: shown.append((side, len(figures.total))))
    assert set(result["sequential"]) == set(result["engine"]) == SIDE
    assert result["sequential"]["turns"] == result["engine"]["turns"] == 12
    rates = [result[side]["turns_per_s"] for side in ("engine", "sequential")]
    assert result["speedup"] == pytest.approx(rates[0] / rates[1], rel=0.01)
    assert result["accepted"] > result["kills"] > 0
    assert result["lost"] == result["duplicated"] == 0
    assert shown == [(side, n) for side in ("sequential", "engine") for n in range(1, 13)]


async def test_the_sequential_way_leaves_the_rows_that_the_engine_leaves(tmp_path):
    model = SimulatedLLM(latency=0.0)
    messages = [users.message(user, number) for number in range(2) for user in range(4)]
    async with Sequential.open(lab_settings(tmp_path / "bot", 4), model) as bot:
        theirs = [await bot.respond(message) for message in messages]
    async with Engine.open(lab_settings(tmp_path / "engine", 4), llm=model) as engine:
        ours = [await engine.respond(message) for message in messages]
    assert [reply.id for reply in theirs] == [reply.id for reply in ours]
    assert rows(tmp_path / "bot") == rows(tmp_path / "engine")


def rows(folder):
    """What is stored, without what time and source say."""
    connection = apsw.Connection(str(folder / DATABASE))
    try:
        memories = connection.execute("SELECT user, id, scope, text, embedder, vector, scale FROM memory").fetchall()
        said = connection.execute("SELECT user, platform, channel, scope, text FROM conversation").fetchall()
        journal = connection.execute("SELECT message_id, state FROM journal").fetchall()
    finally:
        connection.close()
    return sorted(memories), sorted(said), sorted(journal)


async def test_the_sequential_way_commits_every_write_by_itself(tmp_path):
    async with Sequential.open(lab_settings(tmp_path, 6), SimulatedLLM(latency=0.0)) as bot:
        await asyncio.gather(*(bot.respond(users.message(user, 0)) for user in range(6)))
        assert bot.database.commits == bot.database.writes == 6 * 5


async def test_a_second_answer_is_counted_whoever_asks(tmp_path):
    """Another turn with the same words of the same user, under a number of its own."""
    message = users.message(0, 0)
    async with Engine.open(lab_settings(tmp_path, 4), llm=SimulatedLLM(latency=0.0)) as engine:
        await engine.respond(message)
    assert audit.audit(tmp_path)["duplicated"] == 0
    with closing(apsw.Connection(str(tmp_path / DATABASE))) as connection:
        connection.execute(
            "INSERT INTO conversation SELECT user, platform, channel, scope, turn + 1000, at, text, 'another' "
            "FROM conversation"
        )
    assert audit.audit(tmp_path)["duplicated"] == 1
    assert audit.Ledger().duplicated(tmp_path) == 1
    promised = {"accepted": {message.id}, "answered": {message.id}}
    assert power_cut.compared(tmp_path, promised) == {"lost": 0, "twice": 1, "damaged": 0}


async def test_what_is_missing_or_doubled_is_counted(tmp_path):
    messages = [users.message(user, 0) for user in range(4)]
    async with Engine.open(lab_settings(tmp_path, 4), llm=SimulatedLLM(latency=0.0)) as engine:
        await asyncio.gather(*map(engine.respond, messages))
    promised = [message.id for message in messages]
    assert (audit.lost(tmp_path, promised), audit.duplicated(tmp_path)) == (0, 0)
    connection = apsw.Connection(str(tmp_path / DATABASE))
    connection.execute("DELETE FROM journal WHERE message_id = ?", (promised[0],))
    connection.execute("UPDATE journal SET state = 0 WHERE message_id = ?", (promised[1],))
    connection.execute(
        "INSERT INTO conversation SELECT user, platform, channel, scope, turn + 1000, at, text, reply "
        "FROM conversation WHERE user = 'user-2'"
    )
    connection.close()
    assert (audit.lost(tmp_path, promised), audit.duplicated(tmp_path)) == (2, 1)


def test_the_command_prints_one_object_wherever_it_is_called(tmp_path):
    (tmp_path / "whisper_fast").mkdir()
    (tmp_path / "whisper_fast" / "__init__.py").write_text("raise ImportError('the folder, not the package')")
    command = [sys.executable, "-P", "-m", "whisper_fast", "demo", "--quick", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["lost"] == 0


@pytest.mark.parametrize("figure", measure.MUST_BE_ZERO)
def test_a_figure_that_must_be_zero_ends_the_command_with_1(figure):
    with pytest.raises(measure.typer.Exit) as ended:
        measure.finish({figure: 1}, as_json=True)
    assert ended.value.exit_code == 1


def test_a_demo_that_accepted_nothing_ends_with_1():
    with pytest.raises(measure.typer.Exit) as ended:
        measure.finish({"accepted": 0, "lost": 0}, as_json=True)
    assert ended.value.exit_code == 1
