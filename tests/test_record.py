"""The record of the turns: how long each stage takes, which were slow and where, and nothing of what was said."""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from whisper_fast import Engine, Message, Settings, clock
from whisper_fast.door.metrics import Requests, exposition, registry
from whisper_fast.llm import SimulatedLLM
from whisper_fast.message import Turn
from whisper_fast.monitor import Record
from whisper_fast.monitor.record import LATEST, PERIOD, SLOWEST

LAPS = ["journal", "lane", "gather", "llm", "record", "remember"]


@pytest.fixture
async def engine(tmp_path):
    settings = Settings(data_dir=tmp_path, thread_pool_size=2, process_pool_size=1)
    async with Engine.open(settings, llm=SimulatedLLM(latency=0.02)) as engine:
        yield engine


def told(number, text="hello"):
    return Message(user="secret-name", text=text, id=f"m{number}", channel="c")


async def recorded(engine, message):
    """Answer a message; return its waterfall, which is whole when the turn is remembered."""
    await engine.respond(message)
    await engine.drain(5.0)
    return engine.record.find(message.id)


def metrics(engine):
    text, _ = exposition(registry(engine.stats, Requests(), engine.record), "")
    return text.decode()


# ---- one turn


async def test_a_waterfall_holds_every_stage_one_after_the_other(engine):
    waterfall = await recorded(engine, told(1))
    stages = {stage.name: stage for stage in waterfall.stages}
    assert set(stages) >= {*LAPS, "emotion", "embedding", "recall", "conversation"}
    laps = [stages[name] for name in LAPS]
    for before, after in pairwise(laps):
        assert after.start == pytest.approx(before.start + before.seconds)
    assert laps[-1].start + laps[-1].seconds <= waterfall.seconds
    gather = stages["gather"]
    for name in ("emotion", "embedding", "recall", "conversation"):
        assert gather.start <= stages[name].start
        assert stages[name].start + stages[name].seconds <= gather.start + gather.seconds
    assert stages["llm"].seconds >= 0.02
    assert [stage.start for stage in waterfall.stages] == sorted(stage.start for stage in waterfall.stages)


async def test_a_streamed_turn_shows_its_first_token(engine):
    assert "".join([piece async for piece in engine.stream(told(1))])
    await engine.drain(5.0)
    stages = {stage.name: stage for stage in engine.record.find("m1").stages}
    assert stages["llm"].start <= stages["first_token"].start
    assert stages["first_token"].seconds <= stages["llm"].seconds


async def test_a_component_that_is_late_is_counted_and_named(engine):
    async def weather(_):
        await asyncio.Event().wait()

    engine.component("weather", weather, deadline=0.001)
    waterfall = await recorded(engine, told(1))
    assert waterfall.partial == ("weather",)
    assert 'whisper_fast_missing_total{component="weather"} 1.0' in metrics(engine)


async def test_a_component_that_writes_nonsense_into_the_timings_fails_no_message(engine):
    def vandal(turn):
        turn.timings["llm"] = "fast"
        turn.timings["mine"] = -1.0

    engine.component("vandal", vandal)
    assert (await engine.respond(told(1))).text
    await engine.drain(5.0)
    assert engine.stats()["answered"] == 1
    assert engine.stats()["failed"] == 0


async def test_the_reply_does_not_change_after_it_was_given(engine):
    reply = await engine.respond(told(1))
    before = dict(reply.timings)
    await engine.drain(5.0)
    assert reply.timings == before
    assert "remember" not in before


# ---- what is shown


async def test_the_page_of_metrics_tells_each_stage_and_nothing_of_the_user(engine):
    engine.record.stages.observe('quo"ted\nname', 1.0)
    await recorded(engine, told(1, text="secret words"))
    text = metrics(engine)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["whisper_fast_stage_seconds"].samples
    counts = {s.labels["stage"]: s.value for s in samples if s.name.endswith("_count")}
    assert counts["llm"] == counts["total"] == 1
    assert counts['quo"ted\nname'] == 1
    buckets = [s for s in samples if s.labels["stage"] == "llm" and s.name.endswith("_bucket")]
    assert [s.value for s in buckets] == sorted(s.value for s in buckets)
    assert buckets[-1].labels["le"] == "+Inf"
    assert buckets[-1].value == 1
    assert not re.search("secret|m1", text)


async def test_an_error_is_counted_by_its_class(tmp_path):
    class Broken(SimulatedLLM):
        async def chat(self, *_, **__):
            raise ValueError("no")

    async with Engine.open(Settings(data_dir=tmp_path), llm=Broken()) as engine:
        await engine.submit(told(1))
        while not engine.stats()["failed"]:
            await asyncio.sleep(0)
        assert 'whisper_fast_turn_errors_total{error="ValueError"}' in metrics(engine)


async def test_without_monitoring_nothing_is_recorded(tmp_path):
    settings = Settings(data_dir=tmp_path, performance_monitoring_enabled=False)
    async with Engine.open(settings, llm=SimulatedLLM(latency=0.0)) as engine:
        assert (await engine.respond(told(1))).text
        assert engine.record is None
        assert "stage" not in metrics(engine)


# ---- what is kept


def ended(record, number, seconds):
    turn = Turn(told(number))
    turn.started -= seconds
    turn.timings["llm"] = float(seconds)
    record.ended(turn)


def test_the_slowest_are_kept_and_the_latest_can_be_found():
    record = Record()
    for number in range(2000):
        ended(record, number, (number * 7919) % 1000)
    slowest = record.slowest()
    assert len(slowest) == SLOWEST
    assert [round(one.seconds) for one in slowest] == sorted((round(one.seconds) for one in slowest), reverse=True)
    assert round(slowest[0].seconds) == 999
    assert round(slowest[-1].seconds) == 1000 - SLOWEST // 2  # each number of seconds came twice
    assert record.find("m1999") is not None
    assert record.find(f"m{1999 - LATEST}") is None
    assert record.find(slowest[0].id) is slowest[0]


def test_what_was_slow_is_forgotten_after_two_periods():
    now = 1000.0
    with clock.replaced(monotonic=lambda: now, wall=lambda: now):
        record = Record()
        ended(record, 1, 50)
        now += PERIOD + 1
        ended(record, 2, 3)
        assert [one.id for one in record.slowest()] == ["m1", "m2"]
        now += PERIOD + 1
        assert [one.id for one in record.slowest()] == ["m2"]
        now += 3 * PERIOD
        assert record.slowest() == []
