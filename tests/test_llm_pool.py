"""The pool: slots handed over exactly, queue and call timed apart, retries bounded, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
from time import monotonic

import pytest
from steered import HELLO, Gate, Scripted, drained, idle, started, turns, words

from whisper_fast.errors import (
    Closed,
    DeadlineExceeded,
    LLMProtocolError,
    LLMRateLimited,
    LLMRejected,
    LLMTimeout,
    LLMUnavailable,
    Overloaded,
    SettingsError,
)
from whisper_fast.llm import Endpoint, LLMPool, SimulatedLLM
from whisper_fast.llm.alarm import Alarm
from whisper_fast.llm.budget import Budget
from whisper_fast.llm.call import Call
from whisper_fast.llm.route import Route


async def test_a_call_goes_through_and_is_counted():
    async with LLMPool([SimulatedLLM(0)], max_concurrent=3) as pool:
        assert "hello" in (await pool.chat(HELLO, user="u1", priority=1, temperature=0.1)).text
        assert "hello" in "".join([piece async for piece in pool.stream(HELLO, user="u1")])
        stats = pool.stats()
    assert (stats["limit"], stats["calls"], stats["errors"]) == (3, 2, {})
    assert stats["endpoints"][0]["name"] == "simulated"
    assert pool.models == ("simulated",)


async def test_the_limit_holds_and_slots_are_handed_over_by_priority_then_arrival():
    gate = Gate()
    async with LLMPool([gate], max_concurrent=1) as pool:
        calls = [await started(pool.chat(words("first"), priority=9))]
        for name, priority in [("late", 5), ("b", 1), ("c", 1), ("urgent", 0), ("d", 1)]:
            calls.append(await started(pool.chat(words(name), priority=priority)))
        assert pool.stats()["waiting"] == 5
        for _ in calls:
            assert pool.stats()["in_flight"] == 1
            gate.pass_one()
            await turns()
        await asyncio.gather(*calls)
        assert gate.order == ["first", "urgent", "b", "c", "d", "late"]
        assert idle(pool)


async def test_nobody_overtakes_a_slot_that_is_being_handed_over():
    gate = Gate()
    async with LLMPool([gate], max_concurrent=1) as pool:
        holder, waiter = await started(pool.chat(words("1"))), await started(pool.chat(words("2")))
        gate.pass_one()
        await holder
        newcomer = await started(pool.chat(words("3"), priority=-1))
        assert gate.order == ["1", "2"]
        waiter.cancel()
        await turns()
        gate.waiting = gate.waiting[1:]
        gate.pass_one()
        await newcomer
        assert idle(pool)


async def test_the_queues_deadline_is_apart_from_the_calls():
    async with LLMPool([SimulatedLLM(0.3)], max_concurrent=1, timeout=0.55, queue_timeout=0.5) as pool:
        results = await asyncio.gather(*(pool.chat(HELLO) for _ in range(3)), return_exceptions=True)
        assert "hello" in results[0].text
        assert "hello" in results[1].text, "0.3 s in the queue and 0.3 s of call are within 0.5 and 0.55"
        assert isinstance(results[2], DeadlineExceeded)
        assert idle(pool)


async def test_too_many_waiting_is_overload_at_once_and_another_endpoint_takes_over():
    gate = Gate()
    async with LLMPool([gate], max_concurrent=1, max_waiting=2) as pool:
        calls = [await started(pool.chat(words(str(n)))) for n in range(3)]
        with pytest.raises(Overloaded) as caught:
            await pool.chat(HELLO)
        assert caught.value.retriable
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert idle(pool)
    async with LLMPool([gate, Scripted()], max_concurrent=1, max_waiting=0) as pool:
        call = await started(pool.chat(words("first")))
        assert (await pool.chat(HELLO)).model == "scripted"
        call.cancel()
        await asyncio.wait([call])


async def test_a_call_out_of_time_ends_in_time_and_frees_its_slot_at_once():
    gate = Gate()
    async with LLMPool([gate], max_concurrent=1, timeout=0.1) as pool:
        waiter = await started(pool.chat(words("hangs")))
        late = await started(pool.chat(words("next"), timeout=5))
        begin = monotonic()
        with pytest.raises(LLMTimeout):
            await waiter
        assert monotonic() - begin < 1
        await asyncio.sleep(0)
        assert gate.order == ["hangs", "next"]
        gate.waiting.pop(0)
        gate.pass_one()
        await late
        assert pool.stats()["errors"] == {"LLMTimeout": 1}
        assert idle(pool)


async def test_a_stream_has_one_budget_and_its_reader_is_never_interrupted():
    async with LLMPool([SimulatedLLM(0.4, tokens=80)], timeout=0.25) as pool:
        pieces = pool.stream(HELLO)
        await anext(pieces)
        await asyncio.sleep(0.3)  # the budget ends in here, in the reader's own code
        with pytest.raises(LLMTimeout):
            await anext(pieces)
        assert idle(pool)
        with pytest.raises(LLMTimeout):
            await drained(pool.stream(HELLO))
        assert idle(pool)


async def test_a_callers_own_timeout_and_the_pools_do_not_mix_up():
    async with LLMPool([SimulatedLLM(5)], timeout=0.05) as pool:
        with pytest.raises(LLMTimeout):
            async with asyncio.timeout(1):
                await pool.chat(HELLO)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.01):
                await pool.chat(HELLO)
        assert not isinstance(caught.value, LLMTimeout)
        assert idle(pool)


@pytest.mark.parametrize("error", [LLMUnavailable("down"), LLMRateLimited("slow", retry_after=0.1)])
async def test_one_retry_on_the_same_endpoint_not_before_retry_after(error):
    llm = Scripted(error)
    begin = monotonic()
    async with LLMPool([llm]) as pool:
        assert (await pool.chat(HELLO)).text == "ok"
        assert pool.stats()["errors"] == {type(error).__name__: 1}
    assert llm.asked == 2
    assert (error.retry_after or 0) <= monotonic() - begin < 1
    assert llm.closed


async def test_only_one_retry_then_the_next_endpoint_then_the_error():
    down = [LLMUnavailable(f"down {n}") for n in range(4)]
    first, second = Scripted(*down[:2], name="first"), Scripted(name="second")
    async with LLMPool([first, second]) as pool:
        assert (await pool.chat(HELLO)).model == "second"
        assert first.asked == 2
    first, second = Scripted(*down[:2]), Scripted(*down[2:])
    async with LLMPool([first, second]) as pool:
        with pytest.raises(LLMUnavailable, match="down 3"):
            await pool.chat(HELLO)
        assert (first.asked, second.asked) == (2, 2)
        assert idle(pool)


async def test_a_retry_after_that_does_not_fit_is_not_waited_for():
    llm = Scripted(LLMRateLimited("slow", retry_after=30))
    begin = monotonic()
    async with LLMPool([llm], timeout=5) as pool:
        with pytest.raises(LLMRateLimited) as caught:
            await pool.chat(HELLO)
    assert caught.value.retry_after == 30
    assert (llm.asked, monotonic() - begin < 1) == (1, True)
    first, second = Scripted(LLMRateLimited("slow", retry_after=3), name="a"), Scripted(name="b")
    async with LLMPool([first, second]) as pool:
        assert (await pool.chat(HELLO)).model == "b"


async def test_a_rejected_request_is_not_tried_again_anywhere():
    first, second = Scripted(LLMRejected("no", status=400)), Scripted()
    async with LLMPool([first, second]) as pool:
        with pytest.raises(LLMRejected):
            await pool.chat(HELLO)
    assert (first.asked, second.asked) == (1, 0)


async def test_a_protocol_error_goes_to_the_next_endpoint_at_once():
    first, second = Scripted(LLMProtocolError("html")), Scripted(name="second")
    async with LLMPool([first, second]) as pool:
        assert (await pool.chat(HELLO)).model == "second"
    assert first.asked == 1


async def test_a_stream_falls_back_before_its_first_piece_and_never_after():
    async with LLMPool([Scripted(LLMProtocolError("html")), Scripted("two")]) as pool:
        assert [str(piece) async for piece in pool.stream(HELLO)] == ["two"]
    broken, second = Scripted(LLMUnavailable("cut"), pieces=2), Scripted()
    async with LLMPool([broken, second]) as pool:
        pieces = pool.stream(HELLO)
        assert [await anext(pieces), await anext(pieces)] == ["piece ", "piece "]
        with pytest.raises(LLMUnavailable):
            await anext(pieces)
        assert (broken.asked, second.asked, idle(pool)) == (1, 0, True)


async def test_no_slot_is_held_during_a_pause():
    llm = Scripted(LLMUnavailable("busy", retry_after=0.6))
    async with LLMPool([llm], max_concurrent=1) as pool:
        first = await started(pool.chat(HELLO))
        begin = monotonic()
        await pool.chat(HELLO)
        assert monotonic() - begin < 0.5
        await first


async def test_an_endpoint_may_declare_its_own_limit():
    async with LLMPool([Endpoint("http://127.0.0.1:9", "m", max_concurrent=1), SimulatedLLM()]) as pool:
        assert [endpoint["limit"] for endpoint in pool.stats()["endpoints"]] == [1, 50]
        assert pool.models == ("m", "simulated")


async def test_cancelling_a_caller_frees_slot_and_place():
    gate = Gate()
    async with LLMPool([gate], max_concurrent=1) as pool:
        calls = [await started(pool.chat(words(str(n)))) for n in range(3)]
        calls[1].cancel()
        calls[0].cancel()
        await asyncio.wait(calls[:2])
        await turns()
        assert gate.order == ["0", "2"]
        calls[2].cancel()
        await asyncio.wait(calls)
        assert idle(pool)


async def test_closing_a_stream_early_frees_its_slot():
    async with LLMPool([SimulatedLLM(0.5)], max_concurrent=1) as pool:
        pieces = pool.stream(HELLO)
        assert await anext(pieces)
        assert pool.stats()["in_flight"] == 1
        await pieces.aclose()
        assert idle(pool)


async def test_a_closed_stream_closes_the_providers_before_its_slot_is_free():
    class Held(Gate):
        def stream(self, messages, **params):
            self.kept = super().stream(messages)
            return self.kept

    held = Held()
    async with LLMPool([held], max_concurrent=1) as pool:
        pieces = pool.stream(HELLO)
        await anext(pieces)
        await pieces.aclose()
        async with asyncio.timeout(1):
            assert await anext(held.kept, "ended") == "ended"


async def test_a_finished_call_leaves_no_timer_behind():
    def calls():
        gc.collect()
        return sum(isinstance(kept, Call) for kept in gc.get_objects())

    before = calls()  # errors that are parameters of tests keep some
    async with LLMPool([SimulatedLLM(0)]) as pool:
        await pool.chat(HELLO)
        await drained(pool.stream(HELLO))
    assert calls() == before


async def test_a_callers_cancellation_wins_over_a_deadline_in_the_same_moment():
    call = Call(5, Alarm(0.01, monotonic), monotonic)

    async def inside():
        with call:
            await asyncio.sleep(5)

    task = await started(inside())
    call.strike(LLMTimeout("late"))
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_struck_call_leaves_its_task_as_it_was():
    async with LLMPool([SimulatedLLM(5)], timeout=0.01) as pool:
        with pytest.raises(LLMTimeout):
            await pool.chat(HELLO)
    assert asyncio.current_task().cancelling() == 0


async def test_the_queue_before_a_second_try_does_not_eat_the_calls_time():
    gate = Gate()
    async with LLMPool([gate], max_concurrent=1, timeout=0.6) as pool:
        first = await started(pool.chat(words("first")))
        second = await started(pool.chat(words("second"), timeout=5))
        gate.waiting.pop(0).set_exception(LLMUnavailable("down"))
        await asyncio.sleep(0.7)
        gate.pass_one()
        await second
        await turns()
        gate.pass_one()
        assert (await first).text == "ok"


async def test_close_ends_every_call_waiter_and_stream():
    gate = Gate()
    pool = LLMPool([gate], max_concurrent=3)
    calls = [await started(pool.chat(words(str(n)))) for n in range(2)]
    stalled = pool.stream(HELLO)
    await anext(stalled)
    calls += [await started(pool.chat(words("waits"))) for _ in range(2)]
    await pool.close()
    assert gate.cancelled == 2
    assert {type(result) for result in await asyncio.gather(*calls, return_exceptions=True)} == {Closed}
    with pytest.raises(Closed):
        await anext(stalled)
    with pytest.raises(Closed):
        await pool.chat(HELLO)
    await pool.close()
    assert idle(pool)


async def test_close_during_a_pause():
    pool = LLMPool([Scripted(LLMRateLimited("slow", retry_after=20))])
    call = await started(pool.chat(HELLO))
    await pool.close()
    with pytest.raises(Closed):
        await call


def test_the_route_is_bounded():
    route = Route("abc", Budget(0.1, 10))
    pauses = [route.failed(LLMUnavailable("down"), left=60) for _ in range(5)]
    assert [bool(pause) for pause in pauses] == [True, False, True, False, True]
    with pytest.raises(LLMUnavailable):
        route.failed(LLMUnavailable("down"), left=60)
    with pytest.raises(LLMUnavailable):
        Route("abc", Budget(0.1, 10)).failed(LLMUnavailable("down"), left=0)


@pytest.mark.parametrize("wrong", [{"sources": []}, {"sources": [SimulatedLLM()], "max_concurrent": 0}])
async def test_a_pool_that_could_never_answer_is_refused(wrong):
    with pytest.raises(SettingsError):
        LLMPool(**wrong)
