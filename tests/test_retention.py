"""How long the journal keeps what is finished: by age, and by size as it is on the disk."""

from __future__ import annotations

import asyncio
import time

import pytest
from scripted import ScriptedLLM, quick, said

from whisper_fast import Engine, Settings, clock, retention
from whisper_fast.lab.audit import audit

YEAR = 365 * 86_400


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


async def answered(engine, count, **fields):
    for n in range(count):
        await engine.respond(said("ada", "x" * 100, id=f"{n}", **fields))


async def test_finished_entries_go_by_age_and_a_jumping_clock_ages_nothing(settings):
    ahead = 0.0
    wall = 0.0
    with clock.replaced(monotonic=lambda: time.monotonic() + ahead, wall=lambda: time.time() + wall):
        async with Engine.open(settings, llm=quick()) as engine:
            await answered(engine, 10)
            await engine.submit(said("bob", "held", id="held"))
            for wall in (YEAR, -YEAR, 0.0):  # noqa: B007 - the clock above reads it
                assert await engine._retention.sweep() == 0
            ahead = settings.journal_max_age_hours * 3600 - 60
            await engine.respond(said("ada", "young", id="young"))
            assert await engine._retention.sweep() == 0
            ahead += 120
            assert await engine._retention.sweep() == 11
        ahead = 0.0
        async with Engine.open(settings, llm=quick()) as engine:  # a restart goes on counting where the last one was
            assert engine._journal.age > settings.journal_max_age_hours * 3600 - 61
            assert await engine._retention.sweep() == 0
            assert (await engine.respond(said("ada", "young", id="young"))).text
            assert engine.stats()["accepted"] == 0


async def test_finished_entries_go_by_size_the_oldest_first_and_what_is_open_stays(settings):
    gate = asyncio.Event()

    async def answer(messages):
        if "never" in messages[-1]["content"]:
            await gate.wait()
        return "y" * 1000

    settings = Settings(data_dir=settings.data_dir, journal_max_bytes=20_000)
    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        await engine.submit(said("eve", "never", id="never"))
        await answered(engine, 100)
        assert await engine._retention.sweep()
        assert 12_000 < await engine._database.read(retention.size) <= 20_000
        left = await engine._database.read(
            lambda c: [row[0] for row in c.execute("SELECT message_id FROM journal ORDER BY id")]
        )
        gate.set()
    assert left[0] == "never"
    assert left[1:] == [f"{n}" for n in range(101 - len(left), 100)]


async def test_what_was_written_and_is_gone_again_does_not_count(settings):
    """A message is cut to its ids once it is remembered, and delivered again it adds nothing."""
    settings = settings.model_copy(update={"journal_max_bytes": 100_000})
    async with Engine.open(settings, llm=ScriptedLLM(lambda _: "yes")) as engine:
        assert await engine._retention.sweep() == 0
        for n in range(60):
            await engine.respond(said("ada", "x" * 4000, id=f"{n}", remember=False))
        for _ in range(60):
            await engine.respond(said("ada", "x" * 4000, id="0", remember=False))
        await asyncio.sleep(0)
        assert engine._journal.written > 400_000
        assert await engine._retention.sweep() == 0
        assert (await engine.respond(said("ada", "x", id="59"))).text
        assert engine.stats()["accepted"] == 60


async def test_held_replies_go_by_size_when_nothing_else_is_left(settings):
    settings = settings.model_copy(update={"journal_max_bytes": 20_000})
    async with Engine.open(settings, llm=ScriptedLLM(lambda _: "y" * 1000)) as engine:
        for n in range(60):  # nobody takes these replies
            await engine.submit(said("ada", "hello", id=f"held {n}"))
        await engine.respond(said("ada", "hello", id="done"))
        async with asyncio.timeout(20):
            while audit(settings.data_dir)["open"]:
                await asyncio.sleep(0.01)
        assert audit(settings.data_dir)["held"] == 60
        await engine._retention.sweep()
        assert await engine._database.read(retention.size) <= 20_000
        names = "SELECT message_id FROM journal ORDER BY id"
        left = await engine._database.read(lambda c: [row[0] for row in c.execute(names)])
    assert left == [f"held {n}" for n in range(60 - len(left), 60)]
