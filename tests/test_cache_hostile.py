"""The cache under hostile keys, values, callbacks and threads, and a collector that runs when it likes."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import pytest
from cache_oracle import conserved

from whisper_fast.cache import Cache


class Hostile:
    """A key that equals its like, and does something to the cache while it is compared."""

    def __init__(self, name, act):
        self.name, self.act = name, act

    def __hash__(self):
        return 7

    def __eq__(self, other):
        self.act()
        return self.name == getattr(other, "name", None)


def test_keys_whose_comparison_changes_the_cache():
    rng = random.Random(1)
    cache = Cache(30)
    budget = 0

    def act():
        nonlocal budget
        if budget > 0:
            budget -= 1
            rng.choice(
                [
                    lambda: cache.put(rng.randrange(100), 1),
                    lambda: cache.pop(rng.randrange(100)),
                    lambda: cache.put(Hostile(rng.randrange(5), act), 1),
                    cache.clear,
                    lambda: cache.get(Hostile(rng.randrange(5), act)),
                ]
            )()

    for _ in range(2000):
        budget = 3
        key = Hostile(rng.randrange(5), act)
        rng.choice([cache.get, cache.pop, cache.reweigh, lambda k: cache.put(k, 1)])(key)
        budget = 0
        conserved(cache)


@pytest.mark.parametrize("size", range(40))
def test_a_comparison_that_fills_the_last_free_slot(size):
    cache = Cache(1000)
    stored = Hostile("a", lambda: None)
    cache.put(stored, 1)
    cache.put_many((n, n) for n in range(size))
    stored.act = lambda: cache.put(("in between", len(cache)), 1) if len(cache) < size + 5 else None
    cache.put(Hostile("b", lambda: None), 2)
    assert len(cache) == size + 6
    conserved(cache)


def test_a_comparison_that_never_lets_the_table_rest_is_an_error():
    cache = Cache(30)
    stored = Hostile("a", lambda: None)
    cache.put(stored, 1)
    stored.act = lambda: cache.put("other", 1)
    with pytest.raises(RuntimeError, match="cannot be searched"):
        cache.get(Hostile("b", lambda: None))
    conserved(cache)


def test_a_comparison_that_raises_leaves_the_table_as_it_was():
    def refuse():
        raise ArithmeticError

    cache = Cache(30)
    cache.put(Hostile("a", refuse), 1)
    for call in (cache.get, cache.pop, lambda key: cache.put(key, 1)):
        with pytest.raises(ArithmeticError):
            call(Hostile("b", lambda: None))
    assert len(cache) == 1
    conserved(cache)


def test_eviction_callback_may_use_the_cache():
    def again(key, value):
        assert cache.weight <= 10
        if value > 0:
            cache.put(("again", key), value - 1)
            cache.pop(key)
        if value == 2:
            cache.clear()

    cache = Cache(10, on_evict=again)
    for n in range(300):
        cache.put(n, n % 4)
        conserved(cache)


def test_an_eviction_callback_that_raises_is_heard_after_all_is_done():
    gone = []

    def fail(key, value):
        gone.append(key)
        raise LookupError(key)

    cache = Cache(3, on_evict=fail)
    cache.put_many({"a": 1, "b": 2, "c": 3})
    with pytest.raises(LookupError):
        cache.put("big", 0, weight=3)
    assert sorted(gone) == ["a", "b", "c"]
    assert cache.keys() == ["big"]
    conserved(cache)


def test_values_whose_end_uses_the_cache():
    class Value:
        def __del__(self):
            cache.put(random.random(), 1)
            cache.get("k")
            assert cache.weight <= 5

    cache = Cache(5)
    for n in range(200):
        cache.put(n % 7, Value())
        conserved(cache)
    cache.clear()
    conserved(cache)
    cache.clear()


def test_a_cycle_through_the_cache_is_collected():
    class Value:
        pass

    value = Value()
    value.cache = Cache(5, on_evict=lambda key, value: None)
    value.cache.put("k", value)
    gone = weakref.ref(value)
    del value
    gc.collect()
    assert gone() is None


def test_references_are_given_back():
    class Value:
        pass

    alive = weakref.WeakSet()
    cache = Cache(20)
    for n in range(500):
        value = Value()
        alive.add(value)
        cache.put(n % 37, value)
        if n % 5 == 0:
            cache.pop(n % 11)
    del value
    assert len(alive) == len(cache)
    del cache
    assert len(alive) == 0


def test_threads_hammering():
    cache = Cache(50, weigher=lambda value: value, on_evict=lambda key, value: cache.get(key), ttl=0.001)
    done = []

    def hammer(seed):
        rng = random.Random(seed)
        for _ in range(4000):
            key = f"{rng.randrange(80)}"
            cache.put(key, rng.randrange(9))
            cache.pop(f"{rng.randrange(80)}")
            assert cache.get(key, 0) in range(9)
            assert cache.weight <= 50
        done.append(seed)

    threads = [threading.Thread(target=hammer, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    conserved(cache)


class Cycle:
    """What only the collector ends; `act` runs then."""

    def __init__(self, act):
        self.act, self.itself = act, self

    def __del__(self):
        self.act()


@pytest.fixture
def eager_collector():
    """Collect at every allocation of an object that the collector knows."""
    before = gc.get_threshold()
    gc.collect()
    gc.disable()

    def start():
        gc.set_threshold(1, 1, 1)
        gc.enable()

    yield start
    gc.enable()
    gc.set_threshold(*before)


def test_a_collection_during_a_hit_may_pop_what_is_hit(eager_collector):
    cache = Cache(100)
    cache.put("k", ["value"])
    held = [cache.get_or_load("k", None) for _ in range(64)]  # the next one must be allocated
    Cycle(lambda: cache.pop("k"))
    eager_collector()
    found = cache.get_or_load("k", None)
    with pytest.raises(StopIteration) as end:
        found.send(None)
    assert end.value.value == ["value"]
    assert len(held) == 64
    conserved(cache)


@pytest.mark.parametrize("act", ["pop", "clear", "put", "resize"])
def test_a_collection_during_any_call_leaves_the_cache_whole(act, eager_collector):
    cache = Cache(20, on_evict=lambda key, value: [key])
    acts = {
        "pop": lambda: cache.pop(3), "clear": cache.clear, "resize": lambda: cache.resize(5),
        "put": lambda: cache.put_many((n, [n]) for n in range(40)),
    }  # fmt: skip
    calls = [
        lambda: cache.get_or_load(3, None) if 3 in cache else None, cache.keys, lambda: cache.get_many([1, 2, 3]),
        lambda: cache.put(3, [3]), lambda: cache.guess(4, [4]), lambda: cache.reweigh(3), lambda: cache.pop(5, [5]),
        lambda: cache.peek(3, [3]), cache.stats,
    ]  # fmt: skip
    for call in calls:
        cache.resize(20)
        cache.put_many((n, [n]) for n in range(20))
        Cycle(acts[act])
        eager_collector()
        kept = [call() for _ in range(3)]
        gc.disable()
        del kept
        conserved(cache)
