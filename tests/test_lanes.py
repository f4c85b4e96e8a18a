"""One user's turns in order, different users side by side, and a clear no when there is no place."""

import asyncio

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
    assert (lanes.places, lanes.bytes, lanes.shed, lanes._lanes) == (0, 0, 2, {})


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
