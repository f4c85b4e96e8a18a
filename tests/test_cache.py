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


class Oracle:
    """What a cache must hold, as plain as it can be written: all that was put, less what it says it let go.

    Which entry goes is the policy's choice; that it must go, is told once, and is gone from then on, is checked here.
    """

    def __init__(self, bound):
        self.bound, self.held, self.now = bound, {}, 100.0
        self.count = dict.fromkeys(("hits", "misses", "puts", "refused", "evictions", "expirations", "removals"), 0)
        self.cache = Cache(bound, on_evict=self.gone, clock=lambda: self.now)

    def gone(self, key, value):
        known, _, expires = self.held.pop(key)
        assert known is value
        self.count["expirations" if expires <= self.now else "evictions"] += 1

    def weight(self):
        return sum(weight for _, weight, _ in self.held.values())

    def live(self, key):
        """Return what is held under `key`, as it is after the cache has been asked."""
        return self.held[key][0] if key in self.held else None

    def get(self, key):
        found = self.cache.get(key)
        assert found is self.live(key)
        self.count["hits" if found is not None else "misses"] += 1

    def put(self, key, value, weight=1, ttl=None):
        old = self.held.get(key)
        alive = old is not None and old[2] > self.now
        before = dict(self.held)
        expires = math.inf if ttl is None else self.now + ttl
        if alive:
            del self.held[key]
            self.count["removals"] += 1
        stored = self.cache.put(key, value, weight=weight, ttl=ttl)
        assert stored == (weight <= self.bound)
        self.count["puts" if stored else "refused"] += 1
        if stored:
            least = sum(w for k, (_, w, _) in before.items() if k != key) + weight
            assert least > self.bound or len(self.held) == len(before.keys() - {key})  # nothing goes without need
            self.held[key] = (value, weight, expires)

    def pop(self, key):
        known = self.held.get(key)
        if known and known[2] > self.now:
            del self.held[key]
            self.count["removals"] += 1
            assert self.cache.pop(key) is known[0]
        else:
            assert self.cache.pop(key) is None

    def reweigh(self, key, weight):
        known = self.held.get(key)
        held = known is not None and known[2] > self.now
        if held and weight <= self.bound:
            self.held[key] = (known[0], weight, known[2])
        assert self.cache.reweigh(key, weight) == (held and weight <= self.bound)

    def clear(self):
        self.count["removals"] += len(self.held)
        self.held.clear()
        self.cache.clear()

    def same(self):
        stats = conserved(self.cache)
        assert {name: getattr(stats, name) for name in self.count} == self.count
        assert stats.weight == self.weight()
        assert set(self.cache.keys()) == set(self.held)


class Model(RuleBasedStateMachine):
    keys = st.integers(0, 40).map(lambda n: n << 32) | st.sampled_from(["a", "b", ("c", 1)])

    def __init__(self):
        super().__init__()
        self.oracle = Oracle(24)

    @rule(key=keys, weight=st.integers(0, 30), ttl=st.sampled_from([None, 0, 1, 5, math.inf]))
    def put(self, key, weight, ttl):
        self.oracle.put(key, object(), weight, ttl)

    @rule(key=keys)
    def get(self, key):
        self.oracle.get(key)

    @rule(keys=st.lists(keys, max_size=12))
    def get_many(self, keys):
        found = self.oracle.cache.get_many(keys)
        assert found == [self.oracle.live(key) for key in keys]
        self.oracle.count["hits"] += sum(value is not None for value in found)
        self.oracle.count["misses"] += found.count(None)

    @rule(key=keys)
    def contains(self, key):
        assert (key in self.oracle.cache) == (key in self.oracle.held)

    @rule(key=keys)
    def pop(self, key):
        self.oracle.pop(key)

    @rule(key=keys, weight=st.integers(0, 30))
    def reweigh(self, key, weight):
        self.oracle.reweigh(key, weight)

    @rule(step=st.sampled_from([-3e7, -1.0, 0.5, 2.0, 3e7]))
    def jump(self, step):
        self.oracle.now += step

    @rule(bound=st.sampled_from([0, 7, 24, 60]))
    def resize(self, bound):
        self.oracle.bound = bound
        self.oracle.cache.resize(bound)

    @precondition(lambda self: len(self.oracle.held) > 8)
    @rule()
    def clear(self):
        self.oracle.clear()

    @invariant()
    def same(self):
        self.oracle.same()


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def many_steps(steps, seed=5):
    """What hypothesis explores in breadth, in depth: a table that grows, wraps, shifts, and changes its policy."""
    rng, oracle = random.Random(seed), Oracle(400)
    for step in range(steps):
        oracle.now += rng.choice([rng.random() / 50, 0, 0, 0])
        key = (rng.randrange(300) if step // 5000 % 2 else step % 700) << rng.choice([0, 0, 40])
        chosen = rng.random()
        if chosen < 0.5:
            oracle.get(key)
        elif chosen < 0.95:
            oracle.put(key, step, rng.randrange(6), rng.choice([None, None, 1.0]))
        elif chosen < 0.97:
            oracle.pop(key)
        elif chosen < 0.99:
            oracle.reweigh(key, rng.randrange(9))
        elif rng.random() < 0.02:
            oracle.bound = rng.choice([0, 50, 400, 400, 1000])
            oracle.cache.resize(oracle.bound)
        if step % 1000 == 0:
            oracle.same()
    oracle.same()


def test_many_random_steps_agree_with_the_oracle():
    many_steps(20_000)


@pytest.mark.soak
def test_a_million_random_steps_agree_with_the_oracle():
    many_steps(1_000_000, seed=6)


def hit_ratio(cache, keys):
    before = cache.stats()
    for key in keys:
        if cache.get(key) is None:
            cache.put(key, key)
    after = cache.stats()
    return (after.hits - before.hits) / (after.gets - before.gets)


def test_recency_then_a_loop_then_recency():
    """No fixed policy does both: LRU hits nothing in the loop, what holds on to the loop hits little after it."""
    cache, rng = Cache(200), random.Random(2)
    recent = [max(0, n - int(rng.expovariate(1 / 40))) for n in range(20_000)]
    assert hit_ratio(cache, recent) > 0.3
    assert hit_ratio(cache, list(range(10**6, 10**6 + 400)) * 40) > 0.4  # the optimum is 0.5
    assert hit_ratio(cache, [n + 10**7 for n in recent]) > 0.3


def test_a_scan_does_not_drive_out_what_is_used():
    cache, used = Cache(200), list(range(50))
    for start in range(1000, 20_000, 500):
        hit_ratio(cache, used * 2)
        hit_ratio(cache, range(start, start + 500))
    assert sum(key in cache for key in used) > 40


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
