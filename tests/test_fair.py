"""The fair queue against plain Python: order, fairness, who is remembered, and callers that mean harm."""

from __future__ import annotations

import gc
import random
import weakref
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast._fair import FairQueue

PATIENCE = 16


class Oracle:
    """The same order from lists that are searched through."""

    def __init__(self):
        self.entries = []  # [handle, item, user, charge, priority], in order of arrival
        self.counters, self.orders = {}, {}  # (priority, user) -> number
        self.clocks, self.served = {}, {}
        self.order = self.pops = self.handles = 0

    def of(self, priority):
        return [entry for entry in self.entries if entry[4] == priority]

    def push(self, item, user, cost, weight, priority):
        key = (priority, user)
        if not self.of(priority):
            self.served[priority] = self.pops
        if not any(entry[2] == user for entry in self.of(priority)):
            self.counters[key] = max(self.counters.get(key, 0.0), self.clocks.get(priority, 0.0))
            self.orders[key] = self.order = self.order + 1
        self.handles += 1
        self.entries.append([self.handles, item, user, cost / weight, priority])
        return self.handles

    def serve(self, user, charge, priority):
        key = (priority, user)
        start = max(self.counters.get(key, 0.0), self.clocks.get(priority, 0.0))
        self.clocks[priority] = start
        self.counters[key] = start + charge
        self.orders[key] = self.order = self.order + 1
        self.pops += 1
        self.served[priority] = self.pops

    def pop(self):
        levels = sorted({entry[4] for entry in self.entries})
        late = [level for level in levels[1:] if self.pops - self.served[level] >= PATIENCE]
        level = min(late, key=lambda level: (self.served[level], level)) if late else levels[0]
        users = {entry[2] for entry in self.of(level)}
        user = min(users, key=lambda user: (self.counters[level, user], self.orders[level, user]))
        entry = next(entry for entry in self.of(level) if entry[2] == user)
        self.entries.remove(entry)
        self.serve(user, entry[3], level)
        return entry[1]

    def charge(self, user, amount, priority):
        clock = self.clocks.get(priority, 0.0)
        self.counters[priority, user] = max(clock, max(clock, self.counters.get((priority, user), 0.0)) + amount)

    def remove(self, handle):
        entry = next(entry for entry in self.entries if entry[0] == handle)
        self.entries.remove(entry)
        return entry[1]


USERS = st.sampled_from([None, "", "a", "b", "c", "d"])
COSTS = st.sampled_from([0.0, 1.0, 2.0, 8.0, 64.0])
LEVELS = st.sampled_from([0, 0, 0, 1, -1, 7])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), USERS, COSTS, st.sampled_from([0.5, 1.0, 4.0]), LEVELS),
        st.tuples(st.just("pop")),
        st.tuples(st.just("pop")),
        st.tuples(st.just("remove"), st.integers(0, 50)),
        st.tuples(st.just("charge"), USERS, st.sampled_from([-64.0, -2.0, 0.0, 2.0, 64.0]), LEVELS),
        st.tuples(st.just("pass"), USERS, COSTS, LEVELS),
    ),
    max_size=120,
)


def push_both(queue, oracle, handles, number, user, cost, weight, priority):
    handle = queue.push(number, user, cost=cost, weight=weight, priority=priority)
    assert handle > 0
    handles[oracle.push(number, user, cost, weight, priority)] = handle


@settings(deadline=None, max_examples=500)
@given(STEPS)
def test_every_step_is_that_of_plain_python(steps):
    queue, oracle, handles = FairQueue(), Oracle(), {}
    for number, (act, *given_) in enumerate(steps):
        if act == "push":
            push_both(queue, oracle, handles, number, *given_)
        elif act == "pop" and oracle.entries:
            assert queue.pop() == oracle.pop()
        elif act == "remove" and oracle.entries:
            handle = oracle.entries[given_[0] % len(oracle.entries)][0]
            assert queue.remove(handles[handle]) == oracle.remove(handle)
            assert queue.remove(handles[handle]) is None
        elif act == "charge":
            user, cost, priority = given_
            queue.charge(user, cost, priority=priority)
            oracle.charge(user, cost, priority)
        elif act == "pass" and not oracle.of(given_[2]):
            oracle.serve(*given_)
            assert (
                queue.pass_by(given_[0], cost=given_[1], priority=given_[2]) == oracle.counters[given_[2], given_[0]]
            )
        assert len(queue) == len(oracle.entries)
        assert queue.oldest == (oracle.entries[0][1] if oracle.entries else None)
        levels = {entry[4] for entry in oracle.entries}
        assert queue.waiting() == {level: len(oracle.of(level)) for level in sorted(levels)}
    assert queue.clear() == [entry[1] for entry in oracle.entries]


def popped(queue, count=None):
    return [queue.pop() for _ in range(len(queue) if count is None else count)]


def test_first_in_first_out_within_a_user_and_turns_between_users():
    queue = FairQueue()
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(name, name[0])
    assert popped(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_light_user_is_next_behind_a_flood_whether_the_flood_waits_or_was_let_through():
    queue = FairQueue()
    for _ in range(50):
        queue.pass_by("flood", cost=300)
    for number in range(1000):
        queue.push(number, "flood", cost=300)
    queue.push("light", "light", cost=3000)
    assert queue.pop() == "light"


def test_service_by_weight_differs_by_one_item_of_each():
    queue, rng = FairQueue(), random.Random(3)
    weights = {"a": 1.0, "b": 1.0, "c": 4.0, "d": 0.5}
    served = dict.fromkeys(weights, 0.0)
    for user, weight in weights.items():
        for _ in range(3000):
            cost = rng.uniform(1, 100)
            queue.push((user, cost), user, cost=cost, weight=weight)
    for _ in range(3000):
        user, cost = queue.pop()
        served[user] += cost / weights[user]
        for one in weights:
            for other in weights:
                assert abs(served[one] - served[other]) <= 100 / weights[one] + 100 / weights[other]


def test_who_was_idle_has_saved_nothing():
    queue = FairQueue()
    for number in range(100):
        queue.push(number, "busy", cost=10)
    popped(queue, 50)
    for number in range(100):
        queue.push(f"back{number}", "back", cost=10)
    assert sum(isinstance(item, str) for item in popped(queue, 20)) in (10, 11)


def test_what_came_out_dearer_is_paid_by_its_user():
    queue = FairQueue()
    for user in "ab":
        for _ in range(100):
            queue.push(user, user, cost=10)
    popped(queue, 2)
    queue.charge("a", 300)
    assert popped(queue, 31).count("a") <= 1
    queue.charge("b", -1e6)  # a refund never goes below the clock
    assert 15 <= popped(queue, 32).count("b") <= 17


def test_a_correction_is_exact_for_a_user_who_was_forgotten_meanwhile():
    queue = FairQueue()
    since = queue.pass_by("early", cost=10)
    for user in ("x", "y"):
        for _ in range(10):
            queue.push(user, user, cost=10)
    popped(queue, 6)  # the clock is at 20: early, at 10, is forgotten
    assert queue.remembered == 2
    queue.charge("early", 5, since=since)
    assert queue.remembered == 2, "10 + 5 is below the clock: nothing is owed"
    queue.charge("early", 50, since=since)
    queue.push("early", "early", cost=1)
    assert popped(queue, 6).count("early") == 0, "x and y at 30, 40 and 50"
    assert "early" in popped(queue, 3), "at 60, with x and y"


def test_a_class_that_is_passed_by_gets_every_seventeenth_turn():
    queue = FairQueue()
    for number in range(1000):
        queue.push("now", f"u{number}", priority=-5)
        queue.push("later", f"u{number}", priority=0)
        queue.push("last", f"u{number}", priority=99)
    order = popped(queue, 1000)
    turns = [at for at, item in enumerate(order) if item == "last"]
    assert order.count("now") > 850
    assert turns[0] <= 17
    assert max(b - a for a, b in pairwise(turns)) <= 18


def test_a_priority_beyond_the_bounds_counts_as_the_bound():
    queue = FairQueue()
    for priority in (10**30, 5, -(10**30), -100, 100):
        queue.push(priority, "u", priority=priority)
    assert queue.waiting() == {-100: 2, 5: 1, 100: 2}
    assert popped(queue) == [-(10**30), -100, 5, 10**30, 100]


def test_users_cost_nothing_once_the_clock_has_passed_them():
    queue = FairQueue()
    for round_ in range(3):
        for number in range(2000):
            queue.push(number, f"{round_} {number}")
        popped(queue)
    queue.push("x", "x")
    queue.push("x", "x")
    popped(queue)
    assert queue.remembered <= 2
    for number in range(70_000):
        queue.pass_by(f"once {number}", cost=number + 1)
    assert queue.remembered <= 65_536


def test_a_handle_fits_only_once():
    queue = FairQueue()
    handle = queue.push("a", "u")
    assert queue.pop() == "a"
    again = queue.push("b", "u")
    assert queue.remove(handle) is None
    assert queue.remove(0) is None
    assert queue.remove(2**63) is None
    assert queue.remove(again) == "b"
    with pytest.raises(OverflowError):
        queue.remove(-1)


@pytest.mark.parametrize(
    "wrong", [{"cost": -1}, {"cost": float("nan")}, {"cost": 1e10}, {"weight": 0}, {"weight": 1e9}]
)
def test_numbers_that_would_break_the_order_are_refused(wrong):
    queue = FairQueue()
    for method in (
        lambda **numbers: queue.push("x", "u", **numbers),
        lambda **numbers: queue.pass_by("u", **numbers),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            method(**wrong)
    assert (len(queue), queue.remembered) == (0, 0)


def test_nobody_passes_by_those_who_wait():
    queue = FairQueue()
    queue.push("x", "u")
    with pytest.raises(ValueError, match="1 items wait"):
        queue.pass_by("v")
    queue.pass_by("v", priority=-1)


class Hostile(str):
    __slots__ = ()

    def __eq__(self, other):
        raise AssertionError("a user's own comparison ran")

    def __hash__(self):
        raise AssertionError("a user's own hash ran")


def test_users_are_compared_as_plain_text():
    queue = FairQueue()
    queue.push(1, Hostile("u"), cost=10)
    queue.push(2, "u")
    queue.charge(Hostile("u"), 5)
    assert popped(queue) == [1, 2]
    for user in (1, b"u", ("u",)):
        with pytest.raises(TypeError, match="str or None"):
            queue.push(1, user)


def test_items_whose_end_uses_the_queue():
    queue, seen = FairQueue(), []

    class Item:
        def __del__(self):
            seen.append(len(queue))
            if len(seen) < 100:
                queue.push("left behind", "ghost", priority=len(seen) % 3)
            if len(seen) % 7 == 0:
                queue.clear()

    for _ in range(20):
        handles = [queue.push(Item(), f"u{n % 3}") for n in range(10)]
        for handle in handles[::2]:
            queue.remove(handle)
        if len(queue):
            queue.pop()
        gc.collect()
        queue.clear()
    assert len(seen) == 200
    queue.clear()
    assert len(queue) == 0


def test_a_circle_through_an_item_is_collected():
    class Item:
        pass

    queue, item = FairQueue(), Item()
    item.queue = queue
    queue.push(item, "u")
    gone = weakref.ref(item)
    del queue, item
    gc.collect()
    assert gone() is None
