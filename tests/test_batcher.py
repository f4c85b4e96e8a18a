"""The batcher: what a failure costs whom, and that nobody is ever left waiting."""

from __future__ import annotations

import asyncio
import math
import random
import time

import numpy as np
import pytest

from whisper_fast.batcher import MicroBatcher
from whisper_fast.errors import BatchMismatch, Closed, DeadlineExceeded, LLMUnavailable, Overloaded
from whisper_fast.executor import Executor


def recorder(calls, result=lambda item: item * 10):
    async def fn(items):
        calls.append(list(items))
        await asyncio.sleep(0.001)
        return [result(item) for item in items]

    return fn


async def test_one_turn_of_the_loop_makes_one_batch():
    calls = []
    async with MicroBatcher(recorder(calls), max_batch=8) as batcher:
        assert await asyncio.gather(*(batcher.submit(n) for n in range(8))) == [n * 10 for n in range(8)]
        assert await batcher.submit(1) == 10
    assert calls == [list(range(8)), [1]]
    stats = batcher.stats()
    assert (stats.items, stats.batches, stats.full, stats.idle, stats.waiting) == (9, 2, 1, 1, 0)


async def test_busy_fills_the_next_batch():
    calls = []
    async with MicroBatcher(recorder(calls), max_batch=8, max_wait=10) as batcher:
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = [asyncio.create_task(batcher.submit(n)) for n in range(1, 6)]
        await asyncio.gather(first, *rest)
    assert calls == [[0], [1, 2, 3, 4, 5]]


async def test_who_waited_max_wait_starts_a_further_batch_but_not_without_bound():
    release, calls = asyncio.Event(), []

    async def fn(items):
        calls.append(items)
        await release.wait()
        return items

    async with MicroBatcher(fn, max_batch=2, max_wait=0.002, max_concurrent=3) as batcher:
        tasks = []
        for n in range(6):
            tasks.append(asyncio.create_task(batcher.submit(n)))
            await asyncio.sleep(0.01)
        assert len(calls) == 3
        assert batcher.stats().linger == 2
        release.set()
        assert await asyncio.gather(*tasks) == list(range(6))


async def test_what_came_at_once_lingers_too():
    release = asyncio.Event()

    async def fn(items):
        await release.wait()
        return items

    async with MicroBatcher(lambda items: fn(items), max_batch=2, max_wait=0.002, max_concurrent=3) as batcher:
        flood = asyncio.create_task(batcher.submit_many(range(100)))
        while batcher.stats().running < 3:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert (batcher.stats().running, batcher.stats().waiting) == (3, 94)
        release.set()
        assert await flood == list(range(100))


@pytest.mark.parametrize("threads", [False, True])
async def test_batches_that_cannot_run_beside_each_other_do_not(threads, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    most = []

    def fn(items):
        most.append(batcher.stats().running)
        time.sleep(0.001)
        return items

    async with (
        Executor(threads=4, processes=1) as executor,
        MicroBatcher(fn, max_batch=4, max_wait=0, executor=executor if threads else None) as batcher,
    ):
        await asyncio.gather(*(batcher.submit(n) for n in range(40)))
    assert set(most) == {1}


@pytest.mark.parametrize("n", [1, 2, 5, 64])
@pytest.mark.parametrize("many", [False, True])
async def test_one_poisonous_item_fails_alone(n, many):
    calls = []

    def fn(items):
        calls.append(len(items))
        if n // 2 in items:
            raise KeyError("poison")
        return items

    async with MicroBatcher(fn, max_batch=64) as batcher:
        if many:
            results = await batcher.submit_many(range(n), return_exceptions=True)
        else:
            results = await asyncio.gather(*(batcher.submit(i) for i in range(n)), return_exceptions=True)
    assert isinstance(results.pop(n // 2), KeyError)
    assert results == [i for i in range(n) if i != n // 2]
    assert len(calls) - 1 <= 13


async def test_every_waiter_has_its_own_error_and_a_failing_backend_is_not_asked_again():
    calls = []

    async def fn(items):
        calls.append(items)
        raise LLMUnavailable("down", status=503)

    async with MicroBatcher(fn) as batcher:
        errors = await asyncio.gather(*(batcher.submit(n) for n in range(10)), return_exceptions=True)
    assert len({id(error) for error in errors}) == 10
    assert all(isinstance(error, LLMUnavailable) and error.status == 503 for error in errors)
    assert len(calls) == 1


@pytest.mark.parametrize("wrong", [[], [1], [1, 2, 3, 4], None, 5, "abc", {1: 1, 2: 2, 3: 3}, iter([1, 2, 3])])
async def test_wrong_number_or_kind_of_results(wrong):
    async with MicroBatcher(lambda items: wrong) as batcher:
        errors = await asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [BatchMismatch] * 3
        with pytest.raises(BatchMismatch):
            await batcher.submit_many(range(3))
        assert await batcher.submit_many([]) == []


async def test_an_exception_among_the_results_is_its_items():
    async with MicroBatcher(lambda items: [ValueError(i) if i == 1 else i for i in items]) as batcher:
        results = await asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True)
        with pytest.raises(ValueError, match="1"):
            await batcher.submit_many(range(3))
    assert results[::2] == [0, 2]
    assert isinstance(results[1], ValueError)


@pytest.mark.parametrize("bad", [math.nan, -1, math.inf, None, "raise"])
async def test_a_cost_that_is_no_cost_fails_its_item_only(bad):
    def cost(item):
        if item != 1:
            return 1.0
        if bad == "raise":
            raise ArithmeticError
        return bad

    async with MicroBatcher(lambda items: items, cost=cost, max_cost=4) as batcher:
        results = await asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True)
        assert results[::2] == [0, 2]
        assert isinstance(results[1], (ValueError, ArithmeticError, TypeError))
        many = await batcher.submit_many(range(3), return_exceptions=True)
        assert many[::2] == [0, 2]
        assert isinstance(many[1], Exception)


async def test_cost_budget():
    calls = []
    async with MicroBatcher(recorder(calls, len), cost=len, max_cost=6, max_batch=10) as batcher:
        await asyncio.gather(*(batcher.submit("x" * n) for n in (3, 3, 3, 20, 1)))
    assert [[len(item) for item in call] for call in calls] == [[3, 3], [3], [20], [1]]
    assert batcher.stats().cost == 3


async def test_items_of_one_length_go_together():
    calls = []
    texts = ["x" * n for n in (3, 40, 3, 41, 39, 3, 200)]
    async with MicroBatcher(recorder(calls, len), cost=len, max_padding=0.05, max_batch=8) as batcher:
        assert await asyncio.gather(*map(batcher.submit, texts)) == [len(text) for text in texts]
        assert await batcher.submit_many(texts) == [len(text) for text in texts]
        stats = batcher.stats()
    assert [sorted(map(len, call)) for call in calls[:3]] == [[3, 3, 3], [39, 40, 41], [200]]
    assert (stats.padding, stats.idle, len(calls)) == (4, 2, 6)
    assert 0 < stats.padded < 0.05


def numbered(items):
    return np.array([[item, -item] for item in items], np.float32)


async def test_rows_of_many_batches_lie_side_by_side():
    async with MicroBatcher(numbered, max_batch=4) as batcher:
        rows, others, alone = await asyncio.gather(
            batcher.submit_rows(range(10), user="a"), batcher.submit_many(range(3), user="b"), batcher.submit(7)
        )
        assert not len(await batcher.submit_rows([]))
    assert (rows == numbered(range(10))).all()
    assert (rows.dtype, rows.flags.c_contiguous, rows.flags.writeable) == (np.float32, True, True)
    assert (np.stack(others) == numbered(range(3))).all()
    assert alone.tolist() == [7, -7]


@pytest.mark.parametrize(
    "odd",
    [
        lambda items: [[n, -n] for n in items],
        lambda items: numbered(items).astype(np.float64),
        lambda items: numbered(items)[:, ::-1],
        lambda items: np.zeros((len(items), 0), np.float32),
        lambda items: numbered(items) if 0 in items else np.ones((len(items), 3), np.float32),
        lambda items: numbered(items) if 0 in items else [str(n) for n in items],
    ],
)
async def test_what_are_no_such_rows_come_as_they_are(odd):
    async with MicroBatcher(odd, max_batch=4) as batcher:
        rows = await batcher.submit_rows(range(6))
    expected = [*odd(range(4)), *odd(range(4, 6))]
    assert len(rows) == 6
    assert all(np.array_equal(row, wanted) for row, wanted in zip(rows, expected, strict=True))


async def test_an_error_among_rows_is_raised():
    def fn(items):
        if 5 in items:
            raise KeyError(5)
        return numbered(items)

    async with MicroBatcher(fn, max_batch=4) as batcher:
        with pytest.raises(KeyError):
            await batcher.submit_rows(range(10))
        for wrong in (np.zeros((1, 2), np.float32), np.float32(1)):
            async with MicroBatcher(lambda _, wrong=wrong: wrong) as other:
                with pytest.raises(BatchMismatch):
                    await other.submit_rows(range(3))


async def test_a_full_queue_says_so_and_keeps_nothing():
    calls = []
    async with MicroBatcher(recorder(calls), max_batch=4, max_queue=10) as batcher:
        with pytest.raises(Overloaded):
            await batcher.submit_many(range(11))
        assert batcher.stats().waiting == 0
        results = await asyncio.gather(*(batcher.submit(n) for n in range(15)), return_exceptions=True)
        assert sum(isinstance(result, Overloaded) for result in results) == 5


async def test_time_runs_out_for_the_caller():
    release = asyncio.Event()

    async def fn(items):
        await release.wait()
        return items

    async with MicroBatcher(fn, max_batch=1) as batcher:
        running = asyncio.create_task(batcher.submit(1, timeout=0.005))
        await asyncio.sleep(0)
        for call in (batcher.submit(2, timeout=0.005), batcher.submit_many([3, 4], timeout=0.005), running):
            with pytest.raises(DeadlineExceeded):
                await call
        assert batcher.stats().waiting == 0
        release.set()


async def test_cancelled_items_leave_the_queue():
    calls = []
    async with MicroBatcher(recorder(calls), max_batch=4, max_wait=10) as batcher:
        tasks = [asyncio.create_task(batcher.submit(n)) for n in range(12)]
        many = asyncio.create_task(batcher.submit_many(range(100, 110)))
        await asyncio.sleep(0.0005)
        for task in (*tasks[6:], many):
            task.cancel()
        await asyncio.wait([*tasks, many])
    assert sorted(n for call in calls for n in call) == list(range(6))


@pytest.mark.parametrize("stubborn", [False, True])
async def test_close_leaves_nobody_waiting_even_if_the_function_hangs(stubborn, monkeypatch):
    monkeypatch.setattr("whisper_fast.batcher.CLOSING_GRACE", 0.01)
    release = asyncio.Event()

    async def fn(items):
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                if not stubborn:
                    raise
        return items

    batcher = MicroBatcher(fn, max_batch=2)
    tasks = [asyncio.create_task(batcher.submit(n)) for n in range(5)]
    tasks.append(asyncio.create_task(batcher.submit_many(range(5))))
    await asyncio.sleep(0.001)
    await batcher.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [Closed] * 6
    with pytest.raises(Closed):
        await batcher.submit(1)
    release.set()
    await batcher.drain()


async def test_drain_answers_everything():
    batcher = MicroBatcher(recorder([]), max_batch=2)
    tasks = [asyncio.create_task(batcher.submit(n)) for n in range(9)]
    await asyncio.sleep(0)
    await batcher.drain()
    assert await asyncio.wait_for(asyncio.gather(*tasks), 0.1) == [n * 10 for n in range(9)]
    await batcher.close()


async def test_switched_off_every_item_is_its_own_call():
    calls, on = [], False
    async with MicroBatcher(recorder(calls), enabled=lambda: on) as batcher:
        assert await asyncio.gather(*(batcher.submit(n) for n in range(3))) == [0, 10, 20]
        assert calls == [[0], [1], [2]]
        on = True
        await asyncio.gather(*(batcher.submit(n) for n in range(3)))
        assert calls[3:] == [[0, 1, 2]]
    assert batcher.stats().direct == 3
    assert batcher.stats().batches == 1


async def test_a_batch_cancelled_from_within_is_an_error_not_a_hang():
    async def fn(items):
        raise asyncio.CancelledError

    async with MicroBatcher(fn) as batcher:
        for _ in range(2):
            with pytest.raises(Closed, match="cancelled"):
                await batcher.submit(1)


async def test_blocking_functions_go_to_the_executor():
    def fn(items):
        time.sleep(0.005)
        return [item + 1 for item in items]

    async with Executor(threads=1, processes=1) as executor, MicroBatcher(fn, executor=executor) as batcher:
        assert await asyncio.gather(*(batcher.submit(n) for n in range(5))) == [1, 2, 3, 4, 5]
        assert executor.stats().threads == 1


@pytest.mark.parametrize(
    "limits", [{"max_batch": 0}, {"max_wait": -1}, {"max_queue": 0}, {"max_concurrent": 0}, {"max_padding": 0.1}]
)
def test_wrong_limits(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        MicroBatcher(lambda items: items, **limits)


async def test_a_light_user_beside_one_who_floods_goes_with_the_next_batch():
    calls = []
    async with MicroBatcher(recorder(calls, lambda item: item), max_batch=16) as batcher:
        flood = asyncio.create_task(batcher.submit_many(["flood"] * 2000, user="flood"))
        await asyncio.sleep(0.002)
        before = len(calls)
        await batcher.submit("light", user="light")
        assert len(calls) - before <= 2
        flood.cancel()


@pytest.mark.parametrize("max_padding", [None, 0.3])
@pytest.mark.parametrize("rounds", [1, pytest.param(100, marks=pytest.mark.soak)])
async def test_random_cancellation_leaves_no_waiter(rounds, max_padding):
    """Ten thousand operations a round: whatever is cancelled, fails or times out, each waiter gets one answer."""
    for seed in range(rounds):
        await cancel_at_random(random.Random(11 + seed), max_padding)


async def cancel_at_random(rng, max_padding):

    async def fn(items):
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        if rng.random() < 0.1:
            raise ValueError(items)
        return items

    batcher = MicroBatcher(
        fn, max_batch=8, max_wait=0.001, cost=lambda item: item % 5, max_cost=12, max_padding=max_padding
    )
    tasks = []
    for n in range(10_000):
        user, timeout = rng.randrange(6), rng.choice([None, None, 0.001])
        if rng.random() < 0.1:
            work = batcher.submit_many(range(n, n + rng.randrange(9)), user=user, timeout=timeout)
        else:
            work = batcher.submit(n, user=user, priority=rng.randrange(3), timeout=timeout)
        tasks.append(asyncio.create_task(work))
        if rng.random() < 0.5:
            rng.choice(tasks[-30:]).cancel()
        if rng.random() < 0.15:
            await asyncio.sleep(0)
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    wrong = {type(r) for r in results if isinstance(r, BaseException)}
    assert wrong <= {ValueError, asyncio.CancelledError, DeadlineExceeded}
    assert all(r == n for n, r in enumerate(results) if isinstance(r, int))
    assert batcher.stats().waiting == 0
    await batcher.drain()
    assert batcher.stats().running == 0
    await batcher.close()
