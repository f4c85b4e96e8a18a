"""One user's turns in order, different users side by side, and a clear no when there is no place."""

import asyncio
import gc
import tracemalloc

import pytest

from whisper_fast.errors import Closed, Overloaded
from whisper_fast.lanes import Lanes


def recorder(log, name, gate=None):
    async def work():
        log.append(f"{name} begins")
        await (gate.wait() if gate else asyncio.sleep(0))
        log.append(f"{name} ends")

    return work


async def test_one_users_turns_run_in_the_order_of_their_places():
    lanes, log = Lanes(10, 1000), []
    first, second, third = (lanes.enter("u", 1) for _ in range(3))
    third.start(recorder(log, "third"), "third")
    second.start(recorder(log, "second"), "second")
    await asyncio.sleep(0.005)
    assert log == []  # the first place has not been started yet: nobody overtakes it
    first.start(recorder(log, "first"), "first")
    assert await lanes.drain(1)
    assert log == [f"{n} {w}" for n in ("first", "second", "third") for w in ("begins", "ends")]


async def test_users_do_not_wait_for_each_other():
    lanes, log, gate = Lanes(10, 1000), [], asyncio.Event()
    lanes.enter("slow", 1).start(recorder(log, "slow", gate), "slow")
    lanes.enter("quick", 1).start(recorder(log, "quick"), "quick")
    while "quick ends" not in log:
        await asyncio.sleep(0)
    assert "slow ends" not in log
    gate.set()
    assert await lanes.drain(1)


async def test_full_by_count_and_by_bytes_and_free_again():
    lanes = Lanes(2, 100)
    one = lanes.enter("a", 60)
    with pytest.raises(Overloaded) as full:
        lanes.enter("b", 60)
    assert full.value.retriable
    assert full.value.retry_after > 0
    two = lanes.enter("b", 1)
    with pytest.raises(Overloaded):
        lanes.enter("c", 0)
    one.leave()
    one.leave()  # a second time does nothing
    lanes.enter("c", 0).leave()
    two.leave()
    assert (lanes.places, lanes.bytes, lanes.stats()["shed"], lanes._lanes) == (0, 0, 2, {})


async def test_a_user_who_is_silent_costs_nothing():
    lanes = Lanes(1000, 1 << 20)

    async def talk(users):
        for user in users:
            lanes.enter(f"u{user}", 10).start(recorder([], user), "turn")
            if user % 500 == 499:
                while lanes.places:
                    await asyncio.sleep(0)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = await talk(range(2_000))  # what grows with the most at once, or once for all, is there by now
        after = await talk(range(2_000, 22_000))
    finally:
        tracemalloc.stop()
    assert lanes.places == lanes.bytes == 0
    assert after - before < 2_000  # bytes for 20,000 users


async def test_a_place_given_back_lets_the_next_one_go():
    lanes, log = Lanes(10, 100), []
    first, second = lanes.enter("u", 1), lanes.enter("u", 1)
    second.start(recorder(log, "second"), "second")
    first.leave()
    assert await lanes.drain(1)
    assert log == ["second begins", "second ends"]


async def test_drain_gives_up_in_time_and_abort_ends_what_runs():
    lanes, log = Lanes(10, 100), []
    lanes.enter("u", 1).start(recorder(log, "stuck", asyncio.Event()), "stuck")
    lanes.enter("u", 1).start(recorder(log, "behind"), "behind")
    assert not await lanes.drain(0.01)
    with pytest.raises(Closed):
        lanes.enter("v", 1)
    await lanes.abort()
    await asyncio.sleep(0)
    assert log == ["stuck begins"]


class Served:
    """Runs places one slot at a time and notes whose turn it was."""

    def __init__(self, slots=1):
        self.lanes, self.order = Lanes(100_000, 1 << 30, slots=lambda: slots), []
        self.running = self.most = 0

    def put(self, user, count=1, **rank):
        for _ in range(count):
            self.lanes.enter(user, 1, **rank).start(lambda: self.work(user), user)

    async def work(self, user):
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(user)
        await asyncio.sleep(0)
        self.running -= 1


async def test_no_more_turns_run_than_there_are_slots():
    served = Served(slots=3)
    for n in range(50):
        served.put(f"u{n}", 2)
    assert await served.lanes.drain(10)
    assert served.most == 3
    assert len(served.order) == 100
    assert served.lanes._queue.remembered == 0  # nobody waits: nothing is kept of anybody


async def test_one_who_floods_delays_nobody_else():
    served = Served()
    served.put("flood", 200)
    for n in range(10):
        served.put(f"u{n}")
    assert await served.lanes.drain(10)
    assert set(served.order[:13]) >= {f"u{n}" for n in range(10)}


async def test_weight_counts_while_others_wait():
    served = Served()
    for n in range(10):
        served.put(f"u{n}", 40)
    served.put("heavy", 80, weight=2.0)
    assert await served.lanes.drain(10)
    half = served.order[: len(served.order) // 2]
    assert 1.6 <= half.count("heavy") / half.count("u3") <= 2.4


async def test_the_smaller_priority_goes_first_and_the_larger_one_is_not_starved():
    served = Served()
    served.put("running")
    for n in range(40):
        served.put(f"later{n}", priority=5)
        served.put(f"first{n}", priority=-5)
    assert await served.lanes.drain(10)
    early = served.order[1:41]
    assert sum(user.startswith("first") for user in early) >= 37
    assert any(user.startswith("later") for user in early)


async def test_a_slot_given_back_early_goes_to_the_next_one():
    lanes, gate, begun = Lanes(10, 100, slots=lambda: 1), asyncio.Event(), []

    async def remembering(place):
        begun.append(place.user)
        place.rest()
        await gate.wait()

    for user in ("a", "b", "c"):
        place = lanes.enter(user, 1)
        place.start(lambda place=place: remembering(place), user)
    while len(begun) < 3:
        await asyncio.sleep(0)
    assert lanes.running == 0
    gate.set()
    assert await lanes.drain(1)
    assert lanes.running == 0


async def test_places_that_leave_while_they_wait_for_a_slot():
    lanes, log, gate = Lanes(10, 100, slots=lambda: 1), [], asyncio.Event()
    lanes.enter("a", 1).start(recorder(log, "a", gate), "a")
    waiting = [lanes.enter(user, 1) for user in ("b", "c")]
    for place in waiting:
        place.start(recorder(log, place.user), place.user)
    assert lanes.waiting == 2
    waiting[0].leave()
    assert lanes.waiting == 1
    gate.set()
    assert await lanes.drain(1)
    assert log == ["a begins", "a ends", "c begins", "c ends"]


async def test_hurry_ends_a_drain_at_once():
    lanes = Lanes(10, 100)
    lanes.enter("u", 1).start(recorder([], "stuck", asyncio.Event()), "stuck")
    draining = asyncio.ensure_future(lanes.drain(3600))
    await asyncio.sleep(0)
    lanes.hurry()
    assert await draining is False
    await lanes.abort()


async def test_what_needs_no_model_needs_no_slot():
    lanes, log, gate = Lanes(10, 100, slots=lambda: 1), [], asyncio.Event()
    lanes.enter("a", 1).start(recorder(log, "a", gate), "a")
    lanes.enter("b", 1).start(recorder(log, "b"), "b", slot=False)
    while "b ends" not in log:
        await asyncio.sleep(0)
    gate.set()
    assert await lanes.drain(1)


async def test_bytes_are_held_once_they_are_known():
    lanes = Lanes(10, 100)
    place = lanes.enter("a")
    place.hold(90)
    other = lanes.enter("b")
    with pytest.raises(Overloaded):
        other.hold(20)
    other.leave()
    place.leave()
    assert (lanes.bytes, lanes.places) == (0, 0)
