"""The watch on the event loop: it finds the line that holds it, and blames nobody for a machine that slept."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted import quick, said

from whisper_fast import Engine, Settings, clock
from whisper_fast.door.metrics import Requests, exposition, registry
from whisper_fast.monitor import LoopWatch
from whisper_fast.monitor.loop import BEAT, CALM, LIMIT, LINES, REST, UNKNOWN, name_of, owner


async def sleeps(_):
    time.sleep(0.3)


async def spins(_):
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass


async def calls_c_that_lets_go(_):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 600_000)


async def calls_c_that_keeps_the_interpreter(_):
    sum(range(30_000_000))


BLOCKING = [sleeps, spins, calls_c_that_lets_go]


def settings(tmp_path, **others):
    return Settings(data_dir=tmp_path, process_pool_size=1, thread_pool_size=1, component_deadline=30, **others)


async def beats(watch, count):
    """Wait until the watch has seen `count` further beats."""
    until = watch.lag.count + count
    while watch.lag.count < until:
        await asyncio.sleep(0.005)


def threads():
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("component", BLOCKING)
async def test_the_line_of_a_component_that_holds_the_loop_is_named(tmp_path, component):
    async with Engine.open(settings(tmp_path), llm=quick()) as engine:
        engine.component("weather", component)
        await engine.respond(said("ada", "hello"))
        await beats(engine.record.loop, 2)
        stats = engine.stats()["loop"]
        text, _ = exposition(registry(engine.stats, Requests(), engine.record), "")
    worst = stats["lines"][0]
    assert worst["line"].startswith(f"{component.__name__} (test_loop_watch.py:")
    lines = range(component.__code__.co_firstlineno + 1, component.__code__.co_firstlineno + 4)
    assert int(worst["line"].rpartition(":")[2].rstrip(")")) in lines
    assert worst["blocks"] == 1
    assert worst["seconds"] >= LIMIT
    assert stats["lag_max"] >= LIMIT
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    blocks = {s.labels["line"]: s.value for s in families["whisper_fast_loop_blocks"].samples if "_total" in s.name}
    assert blocks[worst["line"]] == 1
    assert families["whisper_fast_loop_lag_seconds"].type == "histogram"
    assert "loop-watch" not in threads()


async def test_a_call_that_keeps_the_interpreter_is_found_when_it_returns():
    watch = LoopWatch()
    watch.start()
    await beats(watch, 2)
    await calls_c_that_keeps_the_interpreter(None)
    await beats(watch, 2)
    watch.stop()
    assert any(line.startswith("calls_c_that_keeps_the_interpreter (") for line, _ in watch.blocks.items())


async def test_a_block_is_logged_once_in_a_while_and_counted_each_time(caplog):
    watch = LoopWatch()
    watch.start()
    for _ in range(2):
        await sleeps(None)
        await beats(watch, 2)
    watch.stop()
    ((line, counter),) = ((line, c) for line, c in watch.blocks.items() if line.startswith("sleeps"))
    assert counter.value == 2
    assert sum(line in record.getMessage() for record in caplog.records) == 1


async def test_a_loop_that_is_well_blames_nobody():
    watch = LoopWatch()
    watch.start()
    watch.start()  # once is enough
    assert threads().count("loop-watch") == 1
    await beats(watch, 5)
    watch.stop()
    watch.stop()
    assert "loop-watch" not in threads()
    seen = watch.lag.count
    watch.start()  # and it can begin again
    await beats(watch, 1)
    watch.stop()
    assert watch.lag.count > seen


async def test_beats_are_rare_at_rest_and_quick_again_when_there_is_work():
    watch = LoopWatch()
    watch.start()
    while watch._calm <= CALM:
        await asyncio.sleep(REST)
    assert watch._pause == REST
    watch.wake()
    assert watch._pause == BEAT
    assert watch._due - clock.monotonic() <= BEAT
    watch.wake()
    await sleeps(None)
    await beats(watch, 1)
    watch.stop()
    watch.wake()  # too late: nothing begins again
    assert watch._handle is None
    assert any(line.startswith("sleeps") for line, _ in watch.blocks.items())


async def test_a_machine_that_slept_is_nobodys_fault(monkeypatch):
    watch, slept = LoopWatch(), [0.0]
    monkeypatch.setattr(clock, "monotonic", lambda: time.monotonic() + slept[0])
    watch.start()
    await beats(watch, 2)
    slept[0] = 3600.0
    while not watch.pauses.value:
        await asyncio.sleep(0.005)
    await beats(watch, 2)
    watch.stop()
    assert watch.lag.largest < 3000
    assert not [line for line, _ in watch.blocks.items() if watch.seconds[line].value > 3000]


async def test_without_monitoring_nobody_watches(tmp_path):
    async with Engine.open(settings(tmp_path, performance_monitoring_enabled=False), llm=quick()) as engine:
        assert "loop-watch" not in threads()
        assert "loop" not in engine.stats()


async def test_an_engine_that_fails_to_open_leaves_no_watch(tmp_path):
    with pytest.raises(ZeroDivisionError):
        async with Engine.open(settings(tmp_path), llm=quick()):
            _ = 1 / 0
    assert "loop-watch" not in threads()


async def test_a_loop_that_is_found_at_rest_is_counted_and_not_logged(caplog):
    watch, me = LoopWatch(), threading.get_ident()
    watch.start()
    await beats(watch, 2)
    look = threading.Timer(0.05, lambda: watch._blame(me, watch._due))
    look.start()
    await asyncio.sleep(0.5)  # the loop rests while the other thread looks
    look.join()
    watch.stop()
    assert watch.blocks[UNKNOWN].value >= 1
    assert UNKNOWN not in caplog.text


def test_a_hundred_thousand_lines_stay_bounded():
    watch = LoopWatch()
    for number in range(100_000):
        watch.blocks.inc(f"f ({number}.py:1)")
        watch._tell(f"f ({number}.py:1)") if number < 3 * LINES else None
    assert len(watch.blocks.items()) <= LINES + 1
    assert len(watch._logged) <= LINES


def test_the_standard_library_is_passed_over():
    import json
    import sys

    seen = []

    class Odd(dict):
        def items(self):
            seen.append(name_of(owner(sys._getframe(1))))  # json's own frame: its caller is to blame
            return super().items()

    json.dumps(Odd(a=1), indent=1)
    assert seen[0].startswith("test_the_standard_library_is_passed_over (test_loop_watch.py:")
