"""The cache against a plain oracle, hostile keys and values, and threads."""

from __future__ import annotations

import math
import random

import pytest
from cache_oracle import Oracle, conserved
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from whisper_fast.cache import Cache


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

    @rule(key=keys, weight=st.integers(0, 30), ttl=st.sampled_from([None, 0, 1, 5]))
    def guess(self, key, weight, ttl):
        self.oracle.guess(key, object(), weight, ttl)

    @rule(key=keys)
    def peek(self, key):
        found = self.oracle.cache.peek(key)
        assert found is self.oracle.live(key)

    @rule(keys=st.lists(keys, max_size=8), weight=st.integers(0, 9), ttl=st.sampled_from([None, 1]))
    def put_many(self, keys, weight, ttl):
        self.oracle.put_many(keys, weight, ttl)

    @rule(keys=st.lists(keys, max_size=12))
    def get_many(self, keys):
        found = self.oracle.cache.get_many(keys)
        assert found == [self.oracle.live(key) for key in keys]
        self.oracle.count["hits"] += sum(value is not None for value in found)
        self.oracle.count["misses"] += found.count(None)
        self.oracle.guesses -= set(keys)

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
        elif chosen < 0.55:
            oracle.guess(key, step, rng.randrange(6), rng.choice([None, 1.0]))
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


def test_a_guess_takes_only_free_room_and_goes_first():
    cache = Cache(10)
    cache.put_many((n, n) for n in range(7))
    assert [cache.guess(("guess", n), n) for n in range(5)] == [True] * 5  # the last two in place of the first two
    held = cache.keys()
    assert set(held) - set(range(7)) == {("guess", n) for n in (2, 3, 4)}
    assert not cache.guess("heavy", 1, weight=4)
    assert cache.guess("as heavy as all guesses", 1, weight=3)
    for n in range(3):
        cache.put(("new", n), n)
        assert all(k in cache for k in range(7))
    assert not cache.guess("no room", 1)
    conserved(cache)


def test_a_guess_takes_the_room_of_what_has_expired_and_leaves_what_is_held():
    hand = [0.0]
    cache = Cache(4, clock=lambda: hand[0])
    cache.put_many({"a": 1, "b": 1}, ttl=1)
    cache.put_many({"c": 1, "d": 1})
    assert not cache.guess("a", 2)
    assert not cache.guess("e", 2)
    hand[0] = 2.0
    assert cache.guess("a", 2, ttl=1)
    assert cache.guess("e", 2)
    assert cache.peek("a") == 2
    hand[0] = 3.0
    assert cache.peek("a") is None
    assert conserved(cache).expirations == 3
    assert cache.stats().gets == 0


def test_a_guess_that_was_right_is_an_entry_like_others():
    cache = Cache(10)
    assert cache.guess("right", 1)
    assert cache.guess("wrong", 1)
    assert cache.get("right") == 1
    cache.put_many((n, n) for n in range(9))
    assert "right" in cache
    assert "wrong" not in cache
    assert cache.guess("replaced", 1) is False
    cache.pop(0)
    assert cache.guess("replaced", 1)
    assert cache.put("replaced", 2)
    assert cache.get("replaced") == 2
    assert cache.reweigh("replaced", 3)
    conserved(cache)
