"""A change of the bound: in slices, held throughout, whatever callbacks do, and the last one called counts."""

from __future__ import annotations

import threading

import pytest

from whisper_fast.cache import Cache


def full(many=60_000, **options):
    cache = Cache(many, **options)
    cache.put_many((n, n) for n in range(many))
    return cache


async def test_resize_in_a_loop_takes_slices_and_holds_its_bound_throughout():
    bounds = []
    cache = Cache(60_000, on_evict=lambda key, value: bounds.append(cache.weight <= cache.max_weight))
    cache.put_many((n, n) for n in range(60_000))
    resizing = cache.resize(100)
    held = len(cache)
    assert held > 100
    cache.put("between", 1)
    assert len(cache) <= held
    await resizing
    assert cache.weight == cache.max_weight == 100
    assert all(bounds)
    await cache.resize(1000)
    assert cache.max_weight == 1000


async def test_a_later_resize_takes_the_place_of_one_under_way():
    cache = Cache(60_000)
    cache.put_many((n, n) for n in range(60_000))
    first = cache.resize(0)
    await cache.resize(60_000)
    await first
    assert len(cache) > 0
    assert cache.max_weight == 60_000


async def test_an_error_of_on_evict_reaches_who_waits_for_the_resize():
    def fail(key, value):
        if key == 50_000:
            raise LookupError(key)

    cache = Cache(60_000, on_evict=fail)
    cache.put_many((n, n) for n in range(60_000))
    with pytest.raises(LookupError):
        await cache.resize(0)
    assert cache.max_weight == len(cache) == 0


def test_resize_without_a_loop_is_done_when_it_returns():
    cache = Cache(60_000)
    cache.put_many((n, n) for n in range(60_000))
    cache.resize(100)
    assert cache.weight == cache.max_weight == 100
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_weight"):
            cache.resize(bad)
    assert cache.max_weight == 100


def fails_once():
    """Return an on_evict that raises when it is first called, and the list of what it was called with."""
    gone = []

    def on_evict(key, value):
        gone.append(key)
        if len(gone) == 1:
            raise LookupError(key)

    return on_evict, gone


def test_an_error_of_the_first_slice_is_raised_when_the_bound_holds():
    on_evict, gone = fails_once()
    cache = full(on_evict=on_evict)
    with pytest.raises(LookupError):
        cache.resize(100)
    assert cache.max_weight == cache.weight == 100
    assert len(gone) == 59_900
    with pytest.raises(ValueError, match="max_weight"):
        cache.resize(-1)
    assert cache.max_weight == 100


async def test_an_error_of_the_first_slice_in_a_loop_reaches_who_waits():
    on_evict, gone = fails_once()
    cache = full(on_evict=on_evict)
    resizing = cache.resize(100)
    assert len(gone) < 59_900
    with pytest.raises(LookupError):
        await resizing
    assert cache.max_weight == cache.weight == 100


async def test_a_bound_that_is_refused_leaves_the_resize_under_way():
    cache = full()
    resizing = cache.resize(100)
    with pytest.raises(ValueError, match="max_weight"):
        cache.resize(float("nan"))
    await resizing
    assert cache.max_weight == 100


def test_a_callback_that_puts_again_does_not_keep_it_from_its_end():
    cache = full(60, on_evict=lambda key, value: isinstance(key, tuple) or cache.put(("again", key), value))
    cache.resize(10)
    assert cache.max_weight == 10
    assert cache.weight <= 10


def test_a_callback_that_always_puts_again_ends_in_its_own_error():
    cache = full(60, on_evict=lambda key, value: cache.put(key, value))
    with pytest.raises(RecursionError):
        cache.resize(10)
    assert cache.max_weight == 10
    assert cache.weight <= 10


@pytest.mark.parametrize("later", [60_000, 30_000, 50])
def test_a_resize_within_a_callback_takes_the_place_of_the_one_that_called_it(later):
    called = []
    cache = full(on_evict=lambda key, value: called or (called.append(1), cache.resize(later)))
    cache.resize(100)
    assert cache.max_weight == later


def test_a_later_resize_of_another_thread_takes_the_place_of_one_under_way():
    reached, go_on = threading.Event(), threading.Event()

    def stop(key, value):
        if not reached.is_set():
            reached.set()
            go_on.wait(10)

    cache = full(on_evict=stop)
    earlier = threading.Thread(target=cache.resize, args=(100,))
    earlier.start()
    assert reached.wait(10)
    cache.resize(60_000)
    go_on.set()
    earlier.join()
    assert cache.max_weight == 60_000
    assert len(cache) > 50_000
