"""Loading what is missing: once for all who ask, whoever is cancelled, fails or recurses."""

from __future__ import annotations

import asyncio
import contextvars
import random

import pytest

from whisper_fast.cache import Cache
from whisper_fast.errors import LoadCycle, WhisperFastError


async def test_one_load_for_all():
    calls = []

    async def loader(key):
        calls.append(key)
        await asyncio.sleep(0.01)
        return [key]

    cache = Cache(10)
    values = await asyncio.gather(*(cache.get_or_load("k", loader) for _ in range(1000)))
    assert calls == ["k"]
    assert all(value is values[0] for value in values)
    assert await cache.get_or_load("k", loader) is values[0]
    assert cache.stats().loads == 1
    assert not cache._loading


async def test_a_hit_may_be_awaited_as_a_task_and_thrown_into():
    cache = Cache(10)
    cache.put("k", 1)
    assert await asyncio.create_task(cache.get_or_load("k", None)) == 1
    assert await asyncio.wait_for(cache.get_or_load("k", None), 1) == 1
    assert await asyncio.gather(cache.get_or_load("k", None), cache.get_or_load("k", None)) == [1, 1]
    task = asyncio.create_task(cache.get_or_load("k", None))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cache.stats().hits == 5
    cache.get_or_load("k", None).close()


@pytest.mark.parametrize("loader", [lambda: None, lambda key: None, lambda key=1: None])
async def test_none_is_a_value_and_loaders_may_be_sync_and_take_nothing(loader):
    cache = Cache(10)
    assert await cache.get_or_load("k", loader) is None
    assert "k" in cache


async def test_a_failing_load_is_called_once_and_each_waiter_has_its_own_error():
    calls = []

    async def loader(key):
        calls.append(key)
        await asyncio.sleep(0.01)
        raise WhisperFastError("no", retry_after=3.0)

    cache = Cache(10)
    errors = await asyncio.gather(*(cache.get_or_load("k", loader) for _ in range(20)), return_exceptions=True)
    assert calls == ["k"]
    assert len({id(error) for error in errors}) == 20
    assert all(type(error) is WhisperFastError and error.retry_after == 3.0 for error in errors)
    assert "k" not in cache
    assert not cache._loading
    assert cache.stats().load_failures == 1


class Awkward(Exception):
    def __init__(self, one, *, two):
        super().__init__(one)
        self.two = two


@pytest.mark.parametrize("error", [Awkward("a", two=2), OSError(2, "gone", "file"), StopIteration(1)])
async def test_awkward_errors_reach_every_waiter(error):
    def loader(key):
        raise error

    cache = Cache(10)
    got = await asyncio.gather(*(cache.get_or_load("k", loader) for _ in range(3)), return_exceptions=True)
    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    assert {type(e) for e in got} == {expected}
    assert all(getattr(e, "two", None) == getattr(error, "two", None) for e in got)


@pytest.mark.parametrize("cancelled", [0, 1, 4])
async def test_cancelling_a_waiter_fails_only_that_waiter(cancelled):
    release = asyncio.Event()

    async def loader():
        await release.wait()
        return 1

    cache = Cache(10)
    waiters = [asyncio.create_task(cache.get_or_load("k", loader)) for _ in range(5)]
    await asyncio.sleep(0)
    waiters[cancelled].cancel()
    await asyncio.sleep(0)
    release.set()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(results.pop(cancelled), asyncio.CancelledError)
    assert results == [1] * 4


async def test_the_load_ends_with_its_last_waiter():
    ended = asyncio.Event()

    async def loader():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    cache = Cache(10)
    waiters = [asyncio.create_task(cache.get_or_load("k", loader)) for _ in range(3)]
    await asyncio.sleep(0.001)
    for waiter in waiters:
        waiter.cancel()
    await asyncio.wait(waiters)
    await asyncio.wait_for(ended.wait(), 1)
    assert not cache._loading
    assert await cache.get_or_load("k", lambda: 2) == 2


async def test_recursion_raises_instead_of_hanging():
    async def within(key):
        return await cache.get_or_load(key, within)

    async def gathered(key):
        return await asyncio.gather(cache.get_or_load(key, gathered), asyncio.sleep(0))

    async def a(key):
        return await cache.get_or_load("b", b)

    async def b(key):
        return await cache.get_or_load("a", a)

    cache = Cache(10)
    for key, loader in (("k", within), ("k", gathered), ("a", a)):
        with pytest.raises(LoadCycle):
            await cache.get_or_load(key, loader)
    both = await asyncio.gather(cache.get_or_load("a", a), cache.get_or_load("b", b), return_exceptions=True)
    assert {type(error) for error in both} == {LoadCycle}
    assert not cache._loading


@pytest.mark.parametrize("change", [lambda c: c.put("k", "new"), lambda c: c.pop("k"), Cache.clear])
async def test_a_change_during_the_load_wins(change):
    release = asyncio.Event()

    async def old():
        await release.wait()
        return "old"

    cache = Cache(10)
    waiter = asyncio.create_task(cache.get_or_load("k", old))
    await asyncio.sleep(0)
    change(cache)
    expected = cache.get("k", "fresh")
    assert await cache.get_or_load("k", lambda: "fresh") == expected
    release.set()
    assert await waiter == "old"
    assert cache.get("k") == expected


async def test_too_heavy_to_store_is_still_answered():
    cache = Cache(3, weigher=len)
    assert await cache.get_or_load("k", lambda: "heavy") == "heavy"
    assert len(cache) == 0


async def test_a_load_cancelled_from_outside_fails_its_waiters_with_an_error():
    async def loader():
        raise asyncio.CancelledError

    cache = Cache(10)
    with pytest.raises(WhisperFastError, match="cancelled"):
        await cache.get_or_load("k", loader)


async def test_random_cancellation_leaves_nothing():
    rng = random.Random(3)

    async def loader(key):
        await asyncio.sleep(rng.choice([0, 0, 0.001]))
        if rng.random() < 0.2:
            raise ValueError(key)
        return key

    cache = Cache(5)
    tasks = []
    for _ in range(3000):
        tasks.append(asyncio.create_task(cache.get_or_load(rng.randrange(12), loader)))
        if rng.random() < 0.4:
            rng.choice(tasks[-20:]).cancel()
        if rng.random() < 0.2:
            await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(r) for r in results} <= {int, ValueError, asyncio.CancelledError}
    await asyncio.sleep(0.002)  # loads whose last waiter has just gone end in the next turn
    assert not cache._loading
    assert cache.weight <= 5


@pytest.mark.parametrize("many", [2_000, pytest.param(100_000, marks=pytest.mark.soak)])
async def test_very_many_loads_of_one_key(many):
    calls = []

    async def loader(key):
        calls.append(key)
        await asyncio.sleep(0)
        return key

    cache = Cache(10)
    assert set(await asyncio.gather(*(cache.get_or_load("k", loader) for _ in range(many)))) == {"k"}
    assert calls == ["k"]


async def test_warm_loads_a_guess_that_counts_for_nothing_until_somebody_asks():
    cache, release, calls = Cache(2), asyncio.Event(), []

    async def loader(key):
        calls.append(key)
        await release.wait()
        return key

    warming = asyncio.create_task(cache.warm("a", loader))
    asking = asyncio.create_task(cache.warm("b", loader))
    await asyncio.sleep(0)
    asked = asyncio.create_task(cache.get_or_load("b", loader))
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(warming, asking, asked)
    await cache.warm("a", loader)
    assert calls == ["a", "b"]
    assert cache.stats().misses == 1
    cache.put("c", 1)
    assert set(cache.keys()) == {"b", "c"}  # the guess went


class Done(asyncio.Future):
    def set_name(self, name):
        pass


async def test_a_loader_that_ends_at_once_under_an_eager_task_factory():
    def eager(loop, work, **options):
        with pytest.raises(StopIteration):
            contextvars.copy_context().run(work.send, None)
        done = Done(loop=loop)
        done.set_result(None)
        return done

    def fail():
        raise OSError

    cache, loop = Cache(10), asyncio.get_running_loop()
    loop.set_task_factory(eager)
    try:
        assert await cache.get_or_load("k", lambda: 1) == 1
        with pytest.raises(OSError):  # noqa: PT011 - it has no text
            await cache.get_or_load("bad", fail)
        await cache.warm("w", lambda: 2)
    finally:
        loop.set_task_factory(None)
    assert cache.peek("w") == 2
    assert not cache._loading


async def refreshing(loader, **options):
    """Return a cache whose only entry is about to expire, and the hand of its clock."""
    hand = [0.0]
    cache = Cache(10, ttl=10, clock=lambda: hand[0], refresh_ahead=1e9, **options)
    await cache.get_or_load("k", loader)
    await cache.get_or_load("k", loader)  # took is known now; 1e9 makes the coin fall on one side
    return cache, hand


async def test_refresh_ahead_serves_what_is_held_and_loads_once():
    calls, release = [], asyncio.Event()

    async def loader():
        calls.append(1)
        if len(calls) > 1:
            await release.wait()
        return len(calls)

    cache, hand = await refreshing(loader)
    assert [await cache.get_or_load("k", loader) for _ in range(20)] == [1] * 20
    await asyncio.sleep(0)
    assert len(calls) == 2
    hand[0] = 11.0  # it expires while the load is under way: who comes now joins it
    waiter = asyncio.create_task(cache.get_or_load("k", loader))
    await asyncio.sleep(0)
    release.set()
    assert await waiter == 2
    assert not cache._refreshes
    assert cache.get("k") == 2


async def test_a_refresh_that_fails_leaves_what_is_held():
    calls = []

    async def loader():
        calls.append(1)
        if len(calls) > 1:
            raise OSError
        return 1

    cache, _ = await refreshing(loader)
    await asyncio.sleep(0)
    assert cache.get("k") == 1
    assert cache.stats().load_failures == 1
    assert not cache._refreshes
    assert not cache._loading


async def test_close_ends_refreshes_and_a_put_wins_over_one():
    calls = []

    async def loader():
        calls.append(1)
        if len(calls) > 1:
            await asyncio.Event().wait()
        return 1

    cache, _ = await refreshing(loader)
    await asyncio.sleep(0)
    cache.put("k", "new")
    await cache.close()
    assert cache.get("k") == "new"
    assert not cache._refreshes


async def test_without_refresh_ahead_nothing_is_loaded_before_it_expires():
    hand = [0.0]
    cache = Cache(10, ttl=10, clock=lambda: hand[0])
    await cache.get_or_load("k", lambda: 1)
    hand[0] = 9.99
    assert await cache.get_or_load("k", lambda: 2) == 1
    hand[0] = 10.0
    assert await cache.get_or_load("k", lambda: 2) == 2
    with pytest.raises(ValueError, match="refresh_ahead"):
        Cache(10, refresh_ahead=-1)
