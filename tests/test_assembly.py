"""What waits for a batch: who goes next, and who gets which result."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast._batch import Assembly, Entry, Group, deliver, still_wanted


class Item:
    def __init__(self, user=None, priority=0, deadline=math.inf, cost=1.0):
        self.user, self.priority, self.deadline, self.cost = user, priority, deadline, cost

    def join(self, assembly):
        self.entry = assembly.append(self, None, self.user, self.priority, self.deadline, self.cost)
        return self


def joined(assembly, count, *about):
    """Let `count` items come at once and return them; one entry stands for all of them."""
    items = [Item(*about) for _ in range(count)]
    run = assembly.append_many(items, Group(count, None), *about)
    for item in items:
        item.entry = run
    return items


def fill(assembly):
    return [entry.item for entry in assembly.fill()]


def filled(assembly):
    batches = []
    while batch := fill(assembly):
        batches.append(batch)
    return batches


def test_smaller_priority_then_earlier_deadline_then_arrival():
    assembly = Assembly(10)
    last = Item(priority=5).join(assembly)
    third, fourth = Item().join(assembly), Item().join(assembly)
    second = Item(deadline=2.0).join(assembly)
    first = Item(priority=-1).join(assembly)
    assert fill(assembly) == [first, second, third, fourth, last]
    assert assembly.released_by == "empty"
    assert assembly.oldest is None


def test_users_take_turns():
    assembly = Assembly(8)
    flood = [Item("flood").join(assembly) for _ in range(1000)]
    light = [Item("light").join(assembly) for _ in range(4)]
    batch = fill(assembly)
    assert assembly.released_by == "full"
    assert [item for item in batch if item.user == "light"] == light
    assert [item for item in batch if item.user == "flood"] == flood[:4]


def test_users_share_the_cost_not_the_count():
    assembly = Assembly(16, 16.0)
    for _ in range(400):
        Item("heavy", cost=4.0).join(assembly)
        Item("light", cost=1.0).join(assembly)
    spent = {"heavy": 0.0, "light": 0.0}
    for _ in range(20):
        for item in fill(assembly):
            spent[item.user] += item.cost
    assert abs(spent["heavy"] - spent["light"]) <= 16


def test_cost_budget_ends_a_batch_and_the_item_that_broke_it_begins_the_next():
    assembly = Assembly(10, 10.0)
    a, b, c = (Item(cost=cost).join(assembly) for cost in (4, 4, 4))
    assert fill(assembly) == [a, b]
    assert assembly.released_by == "cost"
    assert fill(assembly) == [c]


def test_an_item_above_the_budget_goes_alone_and_never_starves():
    assembly = Assembly(4, 10.0)
    giant = Item("g", cost=1e300).join(assembly)
    passed = 0
    for _ in range(200):
        for _ in range(8):
            Item("small").join(assembly)
        batch = fill(assembly)
        if giant in batch:
            assert batch == [giant]
            break
        passed += 1
    assert passed <= 16


def test_low_priority_does_not_starve():
    assembly = Assembly(4)
    low = Item(priority=9).join(assembly)
    passed = 0
    while True:
        for _ in range(8):
            Item(priority=0).join(assembly)
        if low in fill(assembly):
            break
        passed += 1
    assert passed == 16


def test_items_that_need_many_turns_do_not_wait_for_them():
    assembly = Assembly(32, 32.0)
    for user in range(3000):
        Item(user, cost=1e300 if user % 3 else 30.0).join(assembly)
    assert [len(batch) for batch in filled(assembly)] == [1] * 3000


@pytest.mark.parametrize("cost", [math.nan, -1.0, math.inf])
def test_costs_that_are_no_cost(cost):
    with pytest.raises(ValueError, match="cost is"):
        Item(cost=cost).join(Assembly(4))


def test_limits_that_no_batch_could_keep():
    for arguments in ((0,), (-1,), (4, 0.0), (4, math.nan)):
        with pytest.raises(ValueError, match="max_"):
            Assembly(*arguments)
    assembly = Assembly(4)
    item = Item().join(assembly)
    with pytest.raises(ValueError, match="items for a group"):
        assembly.append_many([1], Group(2, None))
    with pytest.raises(ValueError, match="deadline"):
        assembly.append_many([1], Group(1, None), deadline=math.nan)
    with pytest.raises(IndexError, match="place 2"):
        assembly.append(1, Group(2, None), index=2)
    with pytest.raises(ValueError, match="deadline"):
        Item(deadline=math.nan).join(assembly)
    with pytest.raises(TypeError):
        Item(user=[]).join(assembly)
    assert fill(assembly) == [item]


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("append"),
            st.integers(0, 4),
            st.integers(-1, 1),
            st.sampled_from([1.0, 2.0, math.inf]),
            st.sampled_from([0.0, 1.0, 3.0, 50.0]),
        ),
        st.tuples(
            st.just("many"),
            st.integers(0, 4),
            st.integers(-1, 1),
            st.sampled_from([1.0, 2.0, math.inf]),
            st.integers(0, 20),
        ),
        st.tuples(st.just("remove"), st.integers(0, 1000)),
        st.tuples(st.just("fill")),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps, max_batch=st.integers(1, 9), max_cost=st.sampled_from([math.inf, 6.0, 10.0]))
def test_nothing_is_lost_doubled_or_out_of_order(steps, max_batch, max_cost):
    assembly, waiting = Assembly(max_batch, max_cost), []
    for step, *rest in steps:
        if step == "append":
            waiting.append(Item(*rest).join(assembly))
        elif step == "many":
            waiting += joined(assembly, rest.pop(), *rest)
        elif step == "remove" and waiting:
            entry = waiting[rest[0] % len(waiting)].entry
            assert assembly.remove(entry)
            assert not assembly.remove(entry)
            waiting = [item for item in waiting if item.entry is not entry]
        elif step == "fill":
            check_batch(fill(assembly), waiting, max_batch, max_cost)
        assert len(assembly) == len(waiting)
    while waiting:
        check_batch(fill(assembly), waiting, max_batch, max_cost)
    assert fill(assembly) == []


def check_batch(batch, waiting, max_batch, max_cost):
    assert bool(batch) == bool(waiting)
    assert len(batch) <= max_batch
    assert len(batch) == 1 or sum(item.cost for item in batch) <= max_cost
    for item in batch:
        same = [w for w in waiting if w.user == item.user and w.priority == item.priority]
        first = min(same, key=lambda w: w.deadline)  # min keeps the order of arrival
        assert item is first or item is waiting[0]  # an item that was passed by too often goes first
        waiting.remove(item)


def test_an_entry_leaves_only_the_assembly_in_which_it_waits():
    here, elsewhere = Assembly(4), Assembly(4)
    item = Item().join(here)
    assert not elsewhere.remove(item.entry)
    assert len(here) == 1
    assert here.remove(item.entry)
    assert not here.remove(item.entry)


async def test_only_the_first_answer_counts_and_a_group_knows_its_first_failure():
    group, assembly = Group(3, asyncio.get_running_loop().create_future()), Assembly(8)
    run = assembly.append_many(["a", "b", "c"], group)
    entries = assembly.fill()
    assert [entry.item for entry in entries] == ["a", "b", "c"]
    assert not assembly.remove(run)
    assert deliver(entries, [1, ValueError("b"), ValueError("c")])[0][0] is entries[1]
    for entry in reversed(entries):
        entry.fail(KeyError(entry.item))
        entry.answer("too late")
    assert (group.left, group.failed, group.results[0]) == (0, 1, 1)
    assert group.future.done()
    assert still_wanted(entries) == ([], [])


async def test_results_that_are_not_one_each_reach_nobody():
    future = asyncio.get_running_loop().create_future()
    entry = Entry("a", future)
    for wrong in ([], [1, 2]):
        with pytest.raises(ValueError, match="results for 1"):
            deliver([entry], wrong)
    with pytest.raises(TypeError):
        deliver([object()], [1])
    assert still_wanted([entry]) == ([entry], ["a"])
    entry.answer(7)
    assert await future == 7
