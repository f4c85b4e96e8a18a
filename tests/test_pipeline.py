"""Components run together, each with its deadline and its fallback; the turn says what is missing."""

import asyncio
import logging
import threading
import time

import pytest

from whisper_fast.components import Component, user_component
from whisper_fast.errors import SettingsError
from whisper_fast.executor import Executor
from whisper_fast.message import Message, Turn
from whisper_fast.pipeline import Pipeline


@pytest.fixture(params=[True, False], ids=["parallel", "sequential"])
async def pipeline(request):
    async with Executor(threads=2, processes=1) as executor:
        pipeline = Pipeline(executor, parallel=lambda: request.param)
        yield pipeline
        await pipeline.close()


def turn():
    return Turn(Message(user="u", text="hello"))


def value_after(seconds, value):
    async def component(_):
        await asyncio.sleep(seconds)
        return value

    return component


async def test_values_timings_and_nothing_missing(pipeline):
    async def at_once(found):
        return found.message.text.upper()

    pipeline.add(Component("at_once", at_once, deadline=1))
    pipeline.add(Component("later", value_after(0.002, "later"), deadline=1))
    pipeline.add(Component("blocking", lambda _: threading.current_thread().name, deadline=1))
    await pipeline.run(found := turn())
    assert found["at_once"] == "HELLO"
    assert found["later"] == "later"
    assert found.partial == []
    assert set(found.timings) == {"at_once", "later", "blocking"}


async def test_one_that_needs_another_starts_without_a_barrier():
    order = []

    def noting(name, seconds):
        async def component(found):
            order.append(f"{name} begins")
            await asyncio.sleep(seconds)
            order.append(f"{name} ends")
            return name

        return component

    async with Executor(threads=1, processes=1) as executor:
        pipeline = Pipeline(executor, parallel=lambda: True)
        pipeline.add(Component("slow", noting("slow", 0.05), deadline=1))
        pipeline.add(Component("embedding", noting("embedding", 0.001), deadline=1))
        pipeline.add(Component("recall", noting("recall", 0.001), deadline=1, needs=("embedding",)))
        await pipeline.run(found := turn())
        await pipeline.close()
    assert order == ["slow begins", "embedding begins", "embedding ends", "recall begins", "recall ends", "slow ends"]
    assert found["recall"] == "recall"


async def test_needs_are_there_in_every_order(pipeline):
    async def both(found):
        return found["a"] + found["b"]

    pipeline.add(Component("a", value_after(0.002, "a"), deadline=1))
    pipeline.add(Component("b", value_after(0, "b"), deadline=1))
    pipeline.add(Component("ab", both, deadline=1, needs=("a", "b")))
    pipeline.add(Component("b", value_after(0.004, "B"), deadline=1, needs=("a",)))  # replaced, now behind a
    await pipeline.run(found := turn())
    assert found["ab"] == "aB"


@pytest.mark.parametrize("component", ["hangs", "raises", "raises later", "nonsense", "blocks"])
async def test_what_is_late_or_fails_is_named_and_replaced(pipeline, component, caplog):
    released = threading.Event()

    async def raises(_):
        raise RuntimeError("at once")

    async def raises_later(_):
        await asyncio.sleep(0)
        raise RuntimeError("later")

    functions = {
        "hangs": value_after(3600, None),
        "raises": raises,
        "raises later": raises_later,
        "nonsense": lambda _: object(),
        "blocks": lambda _: released.wait(10),
    }
    pipeline.add(user_component("sick", functions[component], deadline=0.05, fallback="fallback"))
    pipeline.add(Component("well", value_after(0.001, "well"), deadline=1))
    pipeline.add(Component("dependent", value_after(0, "ran"), deadline=1, needs=("sick",)))
    found = turn()
    with caplog.at_level(logging.WARNING):
        await pipeline.run(found)
    released.set()
    assert found.partial == ["sick"]
    assert (found["sick"], found["well"], found["dependent"]) == ("fallback", "well", "ran")
    assert f"message {found.message.id}: component sick is missing" in caplog.text
    assert "hello" not in caplog.text


async def test_one_that_ends_as_its_deadline_passes_is_counted_once(caplog):
    async def holds_the_loop(_):
        await asyncio.sleep(0)
        time.sleep(0.03)  # past the deadline: when the loop goes on, both the end and the timer are due
        return "done"

    async with Executor(threads=1, processes=1) as executor:
        pipeline = Pipeline(executor, parallel=lambda: True)
        pipeline.add(Component("holds", holds_the_loop, deadline=0.02))
        await pipeline.run(found := turn())
        await pipeline.close()
    assert (found["holds"], found.partial) == ("done", [])
    assert "Exception in callback" not in caplog.text


async def test_a_late_component_is_cancelled_and_close_waits_for_its_end(pipeline):
    ended = asyncio.Event()

    async def stubborn(_):
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    pipeline.add(Component("stubborn", stubborn, deadline=0.01))
    await pipeline.run(turn())
    await pipeline.close()
    assert ended.is_set()


async def test_cancelling_the_turn_cancels_its_components():
    cancelled = []

    async def wait(_):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async with Executor(threads=1, processes=1) as executor:
        pipeline = Pipeline(executor, parallel=lambda: True)
        pipeline.add(Component("one", wait, deadline=10))
        pipeline.add(Component("two", wait, deadline=10))
        task = asyncio.ensure_future(pipeline.run(turn()))
        await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await pipeline.close()
    assert cancelled == [True, True]


async def test_a_blocking_component_never_holds_the_loop(pipeline):
    ticks = []

    async def tick():
        while True:
            ticks.append(time.perf_counter())
            await asyncio.sleep(0.001)

    watch = asyncio.ensure_future(tick())
    pipeline.add(Component("sleeps", lambda _: time.sleep(0.1), deadline=1))
    await pipeline.run(turn())
    watch.cancel()
    assert len(ticks) > 10


async def test_wrong_registrations(pipeline):
    async def fine(_):
        return None

    with pytest.raises(SettingsError, match="missing"):
        pipeline.add(Component("a", fine, deadline=1, needs=("missing",)))
    pipeline.add(Component("a", fine, deadline=1))
    pipeline.add(Component("b", fine, deadline=1, needs=("a",)))
    with pytest.raises(SettingsError, match="itself"):
        pipeline.add(Component("a", fine, deadline=1, needs=("b",)))
    for wrong in ({"name": "a b"}, {"fn": 3}, {"deadline": 0}, {"deadline": float("nan")}):
        with pytest.raises(SettingsError):
            user_component(**{"name": "x", "fn": fine, "deadline": 1, **wrong})


async def test_a_value_too_large_for_a_prompt_is_refused(pipeline):
    pipeline.add(user_component("essay", lambda _: "x" * 10_000, deadline=1))
    await pipeline.run(found := turn())
    assert found.partial == ["essay"]
