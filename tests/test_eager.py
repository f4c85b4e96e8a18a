"""The first step runs at once; what suspends goes on in one task that it saw from its first line."""

import asyncio
import contextvars

import pytest

from whisper_fast._eager import Eager

place = contextvars.ContextVar("place", default="outside")


@pytest.fixture
async def eager():
    eager = Eager()
    yield eager
    await eager.close()


async def test_what_never_suspends_costs_no_task(eager):
    async def answer():
        return 42

    before = asyncio.all_tasks()
    assert eager.start(answer(), "a") == (42, None)
    assert eager.start(answer(), "b") == (42, None)
    assert len(asyncio.all_tasks() - before) == 1  # the one in reserve


async def test_what_suspends_has_one_task_from_its_first_line_to_its_last(eager):
    async def who():
        first = asyncio.current_task()
        await asyncio.sleep(0)
        second = asyncio.current_task()
        await asyncio.sleep(0.001)
        return first, second, asyncio.current_task()

    caller = asyncio.current_task()
    result, task = eager.start(who(), "three")
    assert result is None
    assert asyncio.current_task() is caller
    assert set(await task) == {task}
    assert task.get_name() == "three"


async def test_timeout_and_task_group_work_from_the_first_step(eager):
    async def bounded():
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    async def grouped():
        async with asyncio.TaskGroup() as group:
            child = group.create_task(asyncio.sleep(0.001, "child"))
        return child.result()

    _, task = eager.start(bounded(), "bounded")
    _, other = eager.start(grouped(), "grouped")
    assert await other == "child"
    with pytest.raises(TimeoutError):
        await task


async def test_each_has_a_context_of_its_own(eager):
    async def move(to):
        place.set(to)
        await asyncio.sleep(0.001)
        return place.get()

    async def stay():
        place.set("elsewhere")

    _, one = eager.start(move("one"), "one")
    _, two = eager.start(move("two"), "two")
    eager.start(stay(), "stay")
    assert [await one, await two, place.get()] == ["one", "two", "outside"]


async def test_an_error_in_the_first_step_is_raised_and_the_reserve_is_used_again(eager):
    async def fail():
        raise ValueError("first step")

    with pytest.raises(ValueError, match="first step"):
        eager.start(fail(), "fail")
    caller = asyncio.current_task()
    assert eager.start(asyncio.sleep(0, "never") if False else ready(), "ready") == ("ready", None)
    assert asyncio.current_task() is caller


async def ready():
    return "ready"


@pytest.mark.parametrize("steps", [0, 1, 3])
async def test_cancelled_before_or_after_its_task_first_ran(eager, steps):
    cleaned = []
    inner = asyncio.get_running_loop().create_future()

    async def wait():
        try:
            await inner
        finally:
            cleaned.append(asyncio.current_task())

    _, task = eager.start(wait(), "wait")
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [task]
    assert inner.cancelled()


async def test_an_error_after_suspension_is_the_tasks(eager):
    async def later():
        await asyncio.sleep(0)
        raise KeyError("later")

    _, task = eager.start(later(), "later")
    with pytest.raises(KeyError):
        await task
