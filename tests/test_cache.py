"""The cache against a plain oracle, hostile keys and values, and threads."""

from __future__ import annotations

import gc
import math
import random
import threading
import weakref

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from whisper_fast.cache import Cache


def conserved(cache):
    s = cache.stats()
    assert s.puts - s.evictions - s.expirations - s.removals == s.entries == len(cache) == len(cache.keys())
    assert s.weight <= s.max_weight
    return s


class Sieve:
    """SIEVE with weights and expiry, as plain as it can be written: the oracle."""

    def __init__(self, bound):
        self.bound, self.queue, self.hand = bound, [], None  # the queue's front is the oldest
        self.count = dict.fromkeys(("hits", "misses", "puts", "refused", "evictions", "expirations", "removals"), 0)
        self.told = []

    def entry(self, key):
        return next((e for e in self.queue if e["key"] == key), None)

    def weight(self):
        return sum(e["weight"] for e in self.queue)

    def unlink(self, entry, why):
        at = self.queue.index(entry)
        self.queue.pop(at)
        if self.hand is entry:
            self.hand = self.queue[at] if at < len(self.queue) else None
        self.count[why] += 1
        if why != "removals":
            self.told.append(entry["key"])

    def live(self, key, now):
        entry = self.entry(key)
        if entry and entry["expires"] <= now:
            self.unlink(entry, "expirations")
            return None
        return entry

    def get(self, key, now):
        entry = self.live(key, now)
        self.count["hits" if entry else "misses"] += 1
        if entry:
            entry["visited"] = True
        return entry and entry["value"]

    def make_room(self, weight, now, spared=None):
        held = [e for e in self.queue if e is not spared]
        while held and sum(e["weight"] for e in self.queue if e is not spared) + weight > self.bound:
            entry = self.hand or self.queue[0]
            while entry is spared or (entry["visited"] and entry["expires"] > now):
                if entry is not spared:
                    entry["visited"] = False
                at = self.queue.index(entry) + 1
                entry = self.queue[at % len(self.queue)]
            self.hand = entry
            held.remove(entry)
            self.unlink(entry, "expirations" if entry["expires"] <= now else "evictions")

    def put(self, key, value, weight, expires, now):
        old = self.live(key, now)
        if old:
            self.unlink(old, "removals")
        if weight > self.bound:
            self.count["refused"] += 1
            return False
        self.make_room(weight, now)
        entry = {"key": key, "value": value, "weight": weight, "expires": expires, "visited": old is not None}
        self.queue.append(entry)
        self.count["puts"] += 1
        return True

    def reweigh(self, key, weight, now):
        entry = self.live(key, now)
        if not entry:
            return False
        if weight > self.bound:
            self.unlink(entry, "evictions")
            return False
        self.make_room(weight, now, spared=entry)
        entry["weight"] = weight
        return True


class Model(RuleBasedStateMachine):
    keys = st.integers(0, 40).map(lambda n: n << 32) | st.sampled_from(["a", "b", ("c", 1)])

    def __init__(self):
        super().__init__()
        self.now = 100.0
        self.told = []
        self.bound = 24
        self.cache = Cache(self.bound, on_evict=lambda k, v: self.told.append(k), clock=lambda: self.now)
        self.oracle = Sieve(self.bound)

    @rule(key=keys, weight=st.integers(0, 30), ttl=st.sampled_from([None, 0, 1, 5, math.inf]))
    def put(self, key, weight, ttl):
        value, now = object(), self.now
        expires = math.inf if ttl is None else now + ttl
        assert self.cache.put(key, value, weight=weight, ttl=ttl) == self.oracle.put(key, value, weight, expires, now)

    @rule(keys=st.lists(keys, max_size=12))
    def put_many(self, keys):
        pairs = [(key, object()) for key in keys]
        kept = [self.oracle.put(key, value, 1, math.inf, self.now) for key, value in pairs]
        assert self.cache.put_many(pairs) == sum(kept)

    @rule(key=keys)
    def get(self, key):
        assert self.cache.get(key) is self.oracle.get(key, self.now)

    @rule(keys=st.lists(keys, max_size=12))
    def get_many(self, keys):
        assert self.cache.get_many(keys) == [self.oracle.get(key, self.now) for key in keys]

    @rule(key=keys)
    def contains(self, key):
        assert (key in self.cache) == (self.oracle.live(key, self.now) is not None)

    @rule(key=keys)
    def pop(self, key):
        entry = self.oracle.live(key, self.now)
        if entry:
            self.oracle.unlink(entry, "removals")
        assert self.cache.pop(key) is (entry and entry["value"])

    @rule(key=keys, weight=st.integers(0, 30))
    def reweigh(self, key, weight):
        assert self.cache.reweigh(key, weight) == self.oracle.reweigh(key, weight, self.now)

    @rule(step=st.sampled_from([-3e7, -1.0, 0.5, 2.0, 3e7]))
    def jump(self, step):
        self.now += step

    @precondition(lambda self: len(self.cache) > 8)
    @rule()
    def clear(self):
        self.cache.clear()
        while self.oracle.queue:
            self.oracle.unlink(self.oracle.queue[0], "removals")

    @invariant()
    def same(self):
        stats = conserved(self.cache)
        assert {name: getattr(stats, name) for name in self.oracle.count} == self.oracle.count
        assert stats.weight == self.oracle.weight()
        assert self.cache.keys() == [e["key"] for e in self.oracle.queue]
        assert sorted(map(str, self.told)) == sorted(map(str, self.oracle.told))


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_many_random_steps_agree_with_the_oracle():
    """What hypothesis explores in breadth, in depth: a table that grows, wraps and shifts."""
    rng, now = random.Random(5), 0.0
    told = []
    cache = Cache(400, on_evict=lambda key, value: told.append(key), clock=lambda: now)
    oracle = Sieve(400)
    for step in range(6000):
        now += rng.random() / 50
        key = rng.randrange(300) << rng.choice([0, 0, 40])
        if rng.random() < 0.5:
            assert cache.get(key) is oracle.get(key, now)
        else:
            weight, ttl = rng.randrange(6), rng.choice([None, None, 1.0])
            expires = math.inf if ttl is None else now + ttl
            assert cache.put(key, step, weight=weight, ttl=ttl) == oracle.put(key, step, weight, expires, now)
    assert cache.keys() == [e["key"] for e in oracle.queue]
    assert cache.weight == oracle.weight()
    assert sorted(told) == sorted(oracle.told)
    conserved(cache)


def test_sieve_keeps_what_was_asked_for_again():
    cache = Cache(3)
    cache.put_many({"a": 1, "b": 2, "c": 3})
    cache.get("a")
    cache.put("d", 4)
    assert sorted(cache.keys()) == ["a", "c", "d"]


def test_heavier_than_the_bound_is_refused_and_leaves_nothing_stale():
    cache = Cache(10, weigher=len)
    assert cache.put("k", "short")
    assert not cache.put("k", "x" * 11)
    assert "k" not in cache
    assert cache.stats().refused == 1
    conserved(cache)


@pytest.mark.parametrize("weigher", [len, lambda value: len(value), lambda key, value: len(value)])
def test_weigher_takes_the_value_or_key_and_value(weigher):
    cache = Cache(10, weigher=weigher)
    cache.put(1, "four")
    assert cache.weight == 4


def test_what_grew_in_place_is_weighed_again():
    cache = Cache(10, weigher=len)
    grown = [1]
    cache.put_many({"other": [1, 2, 3], "grown": grown})
    grown += range(8)
    assert cache.reweigh("grown")
    assert cache.keys() == ["grown"]
    grown += range(8)
    assert not cache.reweigh("grown")
    assert cache.weight == 0
    assert not cache.reweigh("never there")
    conserved(cache)


@pytest.mark.parametrize("bad", [-1, -0.5, math.nan])
def test_wrong_numbers_are_named(bad):
    cache = Cache(10)
    for call in (
        lambda: cache.put("k", 1, weight=bad),
        lambda: cache.put("k", 1, ttl=bad),
        lambda: Cache(bad),
        lambda: Cache(1, ttl=bad),
        lambda: Cache(1, weigher=lambda _: bad).put("k", 1),
    ):
        with pytest.raises(ValueError, match=r"(weight|ttl) is"):
            call()
    assert len(cache) == 0


def test_unbounded_unhashable_and_uncallable_are_refused():
    with pytest.raises(ValueError, match="bounded"):
        Cache(math.inf)
    with pytest.raises(TypeError, match="callable"):
        Cache(1, weigher=3)
    cache = Cache(10)
    for call in (cache.get, cache.pop, cache.__contains__, cache.reweigh, lambda key: cache.put(key, 1)):
        with pytest.raises(TypeError, match="unhashable"):
            call([])


def test_bound_of_zero_holds_only_what_weighs_nothing():
    cache = Cache(0)
    assert not cache.put("k", 1)
    assert cache.put("light", 1, weight=0)
    assert cache.weight == 0


def test_fractions_leave_no_rounding_error_behind():
    cache = Cache(1.0)
    for n in range(1000):
        cache.put(n, n, weight=0.1 + n % 7 / 10)
        assert cache.weight <= 1.0
    held = cache.keys()
    for key in held:
        cache.pop(key)
    assert cache.weight == 0.0


def test_real_clock_expires():
    cache = Cache(10, ttl=math.inf)
    cache.put("now", 1, ttl=0)
    cache.put("later", 1, ttl=3600)
    assert cache.get("now") is None
    assert cache.get("later") == 1
    assert cache.stats().expirations == 1


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
