"""Batches of items of about one length: the padding stays within its bound, and nobody waits longer for it."""

from __future__ import annotations

import gc
import math
import random
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast._batch import Group
from whisper_fast._buckets import Buckets

PATIENCE = 16


class Oracle:
    """The same rules, over one plain list that is looked through at each step."""

    def __init__(self, max_batch, max_cost, max_padding):
        self.max_batch, self.max_cost, self.max_padding = max_batch, max_cost, max_padding
        self.waiting, self.accounts = [], {}
        self.arrivals = self.fills = self.turns = 0
        self.aged = 0
        self.released_by = "empty"

    def append(self, item, user, priority, deadline, cost):
        if not any((w["user"], w["priority"]) == (user, priority) for w in self.waiting):
            level = {(w["user"], w["priority"]) for w in self.waiting if w["priority"] == priority}
            self.turns += 1
            self.accounts[user, priority] = [min((self.accounts[a][0] for a in level), default=0.0), self.turns]
        self.waiting.append(
            {"item": item, "user": user, "priority": priority, "cost": cost, "seen": self.fills}
            | {"when": (deadline, self.arrivals), "index": self.index(cost)}
        )
        self.arrivals += 1

    def index(self, cost):
        if cost <= 0:
            return -math.inf
        step = -math.log1p(-self.max_padding)
        return math.floor(math.log(cost) / step) if step else cost

    def remove(self, item):
        self.waiting = [w for w in self.waiting if w["item"] is not item]

    def account(self, waiting):
        return self.accounts[waiting["user"], waiting["priority"]]

    def fill(self):
        self.fills += 1
        self.batch, self.released_by = [], "empty"
        if not self.waiting:
            return []
        by_age = self.fills - max(self.waiting[0]["seen"], self.aged) > PATIENCE
        self.aged = self.fills if by_age else self.aged
        top = min(w["priority"] for w in self.waiting)
        first = [w for w in self.waiting if w["priority"] == top]
        leader = self.waiting[0] if by_age else min(first, key=lambda w: (self.account(w), w["when"]))
        self.take(leader)
        for priority in sorted({w["priority"] for w in self.waiting}):
            self.fill_around(priority, leader["index"])
        longest = max(w["cost"] for w in self.batch)
        if len(self.batch) >= self.max_batch:
            self.released_by = "full"
        elif (len(self.batch) + 1) * longest > self.max_cost:
            self.released_by = "cost"
        elif self.waiting:
            self.released_by = "padding"
        return [w["item"] for w in self.batch]

    def fill_around(self, priority, centre):
        indexes = sorted({w["index"] for w in self.waiting if w["priority"] == priority})
        below, above = [i for i in indexes if i < centre][::-1], [i for i in indexes if i >= centre]
        while below or above:
            side = above if not below or (above and above[0] - centre <= centre - below[0]) else below
            index = side.pop(0)
            if not self.empty(priority, index):
                side.clear()

    def empty(self, priority, index):
        while found := [w for w in self.waiting if (w["priority"], w["index"]) == (priority, index)]:
            item = min(found, key=lambda w: (self.account(w), w["when"]))
            if not self.fits(item["cost"]):
                return False
            self.take(item)
        return True

    def fits(self, cost):
        costs = [w["cost"] for w in self.batch] + [cost]
        padded = len(costs) * max(costs)
        room = len(costs) <= self.max_batch and padded <= self.max_cost
        return room and padded - sum(costs) <= (self.max_padding + 1e-12) * padded

    def take(self, item):
        account = self.account(item)
        self.turns += 1
        account[:] = account[0] + item["cost"], self.turns
        self.waiting.remove(item)
        self.batch.append(item)


def fill(buckets):
    return [entry.item for entry in buckets.fill()]


def padding(batches):
    """The share of padding in batches of lengths."""
    padded = sum(len(batch) * max(batch) for batch in batches)
    return 1 - sum(map(sum, batches)) / padded if padded else 0.0


appends = st.tuples(
    st.just("append"),
    st.integers(0, 4),
    st.integers(-1, 1),
    st.sampled_from([1.0, 2.0, math.inf]),
    st.one_of(st.sampled_from([0.0, 50.0]), st.integers(1, 40).map(float)),
)
steps = st.lists(
    st.one_of(appends, appends, st.tuples(st.just("remove"), st.integers(0, 1000)), st.tuples(st.just("fill"))),
    max_size=150,
)


@settings(max_examples=200, deadline=None)
@given(
    steps=steps,
    max_batch=st.integers(1, 9),
    max_cost=st.sampled_from([math.inf, 60.0, 10.0]),
    max_padding=st.sampled_from([0.0, 0.05, 0.3, 0.9]),
)
def test_every_batch_is_the_one_of_the_plain_rules(steps, max_batch, max_cost, max_padding):
    buckets, oracle, waiting = Buckets(max_batch, max_cost, max_padding), Oracle(max_batch, max_cost, max_padding), []

    def filled():
        expected = oracle.fill()
        assert fill(buckets) == expected
        assert buckets.released_by == oracle.released_by
        lengths = [item[-1] for item in expected]
        assert not lengths or len(lengths) == 1 or len(lengths) * max(lengths) <= max_cost
        assert padding([lengths] if lengths else []) <= max_padding + 1e-9
        waiting[:] = [(item, entry) for item, entry in waiting if item not in expected]

    for number, (step, *rest) in enumerate(steps):
        if step == "append":
            item = (number, *rest)
            waiting.append((item, buckets.append(item, None, *rest)))
            oracle.append(item, *rest)
        elif step == "remove" and waiting:
            item, entry = waiting.pop(rest[0] % len(waiting))
            assert buckets.remove(entry)
            assert not buckets.remove(entry)
            oracle.remove(item)
        elif step == "fill":
            filled()
        assert len(buckets) == len(waiting)
    while waiting:
        filled()
    assert fill(buckets) == []
    assert buckets.oldest is None


def lognormal(rng, median=12.0, sigma=1.0, longest=256):
    return min(max(1, round(rng.lognormvariate(math.log(median), sigma))), longest)


def test_padding_of_lognormal_lengths():
    rng = random.Random(5)
    lengths = [lognormal(rng) for _ in range(4000)]
    buckets, batches = Buckets(32), []
    for length in lengths[:500]:
        buckets.append(length, cost=length)
    coming = iter(lengths[500:])
    while batch := fill(buckets):
        batches.append(batch)
        for _, length in zip(batch, coming, strict=False):
            buckets.append(length, cost=length)
    arrival = [lengths[i : i + 32] for i in range(0, len(lengths), 32)]
    assert sorted(chain(*batches)) == sorted(lengths)
    assert padding(batches) <= 0.05
    assert padding(arrival) >= 0.5
    assert len(batches) <= 4 * len(arrival)


@pytest.mark.parametrize("length", [3, 40])
def test_a_light_user_beside_a_flood_is_in_the_third_batch_at_the_latest(length):
    rng, buckets = random.Random(7), Buckets(16)
    for _ in range(3000):
        buckets.append("flood", user="flood", cost=lognormal(rng))
    for _ in range(100):  # by now all of the flood has waited longer than it should
        fill(buckets)
    buckets.append("light", user="light", cost=length)
    assert "light" in fill(buckets) + fill(buckets) + fill(buckets)


def test_an_unusual_length_and_a_low_priority_do_not_starve():
    buckets = Buckets(4)
    buckets.append("giant", user="g", cost=1e6)
    buckets.append("low", user="l", priority=9, cost=10)
    batches = 0
    seen = set()
    while not {"giant", "low"} <= seen:
        for _ in range(8):
            buckets.append("small", user="s", cost=10)
        seen.update(fill(buckets))
        batches += 1
        assert batches <= 2 * PATIENCE + 2


def test_users_share_the_cost():
    buckets = Buckets(8)
    spent = dict.fromkeys("abc", 0.0)
    for n in range(900):
        buckets.append(("abc"[n % 3], cost := (30.0, 10.0, 10.0)[n % 3]), user="abc"[n % 3], cost=cost)
    for _ in range(60):
        for user, cost in fill(buckets):
            spent[user] += cost
    assert max(spent.values()) - min(spent.values()) <= 8 * 30


@pytest.mark.parametrize("limits", [(0,), (4, 0.0), (4, math.nan), (4, 9.0, -0.1), (4, 9.0, 1.0), (4, 9.0, math.nan)])
def test_limits_that_no_batch_could_keep(limits):
    with pytest.raises(ValueError, match="max_"):
        Buckets(*limits)


def test_what_is_refused_changes_nothing():
    buckets = Buckets(4)
    entry = buckets.append(1)
    for wrong in ({"cost": math.nan}, {"cost": -1.0}, {"cost": math.inf}, {"deadline": math.nan}):
        with pytest.raises(ValueError, match="it must be"):
            buckets.append(2, **wrong)
    with pytest.raises(TypeError):
        buckets.append(2, user=[])
    with pytest.raises(IndexError):
        buckets.append(2, Group(2, None), index=2)
    with pytest.raises(TypeError):
        buckets.remove(None)
    assert len(buckets) == 1
    assert buckets.fill() == [entry]


class Hostile:
    """A user that is equal to others only while it likes to be."""

    angry = False

    def __hash__(self):
        return 7

    def __eq__(self, other):
        if Hostile.angry:
            raise RuntimeError("no")
        return self is other


def test_a_user_whose_comparison_raises_costs_nobody_a_batch():
    buckets = Buckets(2)
    try:
        for _ in range(3):
            Hostile.angry = False
            for n in range(6):
                buckets.append(n, user=Hostile())
            Hostile.angry = True
            with pytest.raises(RuntimeError):
                buckets.append("refused", user=Hostile())
            assert sorted(chain(*(fill(buckets) for _ in range(3)))) == list(range(6))
            assert len(buckets) == 0
    finally:
        Hostile.angry = False


def test_many_that_still_wait_can_be_let_go():
    buckets = Buckets(4)
    for n in range(200_000):
        buckets.append(n, user=n % 100, cost=n % 50)
    del buckets
    gc.collect()
