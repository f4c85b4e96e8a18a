"""A storm of calls that are cancelled at random moments leaves no slot, place, timer, task or socket behind."""

from __future__ import annotations

import asyncio
import random
from time import monotonic

import pytest
from steered import HELLO, drained, idle

from whisper_fast.errors import LLMTimeout
from whisper_fast.lab.faulty import FaultyLLM
from whisper_fast.llm import Endpoint, LLMPool, SimulatedLLM
from whisper_fast.llm.alarm import Alarm
from whisper_fast.llm.slots import Caller, Slots


async def storm(pool, rng, operations):
    """Run random calls, of which most are cancelled at random moments, waiting, running or finishing."""
    outcomes = {"done": 0, "cancelled": 0, "late": 0}

    async def one():
        timeout = rng.choice([None, 0.002, 1])
        if rng.random() < 0.3:
            async for _ in pool.stream(HELLO, priority=rng.randrange(3), timeout=timeout):
                pass
        else:
            await pool.chat(HELLO, priority=rng.randrange(3), timeout=timeout)

    tasks = set()
    for _ in range(operations):
        task = asyncio.create_task(one())
        tasks.add(task)
        if rng.random() < 0.7:
            asyncio.get_running_loop().call_later(rng.choice([0, 0, 0.001, 0.003]), task.cancel)
        if len(tasks) > 200:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                kind = "cancelled" if task.cancelled() else "late" if task.exception() else "done"
                outcomes[kind] += 1
                if not task.cancelled() and task.exception():
                    assert isinstance(task.exception(), LLMTimeout)
    await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


@pytest.mark.parametrize("operations", [10_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
async def test_a_storm_of_cancellations_leaves_no_slot_taken(operations):
    rng = random.Random(11)
    llm = SimulatedLLM(latency=lambda _: rng.choice([0, 0, 0.001, 0.003]))
    async with LLMPool([llm], max_concurrent=7) as pool:
        outcomes = await storm(pool, rng, operations)
        assert idle(pool)
        assert all(outcomes.values()), outcomes
        assert (await pool.chat(HELLO)).text


async def test_a_storm_over_real_sockets_leaves_nothing():
    rng = random.Random(5)
    async with FaultyLLM(SimulatedLLM(0.002)) as server, LLMPool([Endpoint(server.url)], max_concurrent=20) as pool:
        server.faults.extend(rng.choices(["reset", "cut", "error", "bad_sse", None], k=100))
        tasks = [asyncio.create_task(pool.chat(HELLO)) for _ in range(150)]
        tasks += [asyncio.create_task(drained(pool.stream(HELLO))) for _ in range(150)]
        for task in tasks:
            if rng.random() < 0.5:
                asyncio.get_running_loop().call_later(rng.random() * 0.2, task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert idle(pool)
        server.faults.clear()
        while pool.stats()["endpoints"][0]["shut_for"]:  # so many faults may have opened the breaker
            await asyncio.sleep(0.05)
        assert (await pool.chat(HELLO)).text


async def test_many_cancelled_waiters_leave_nothing_in_the_queue():
    alarm = Alarm(0.01, monotonic)
    slots = Slots(1, 10_000, alarm, monotonic)
    await slots.acquire(Caller("u"), 1.0)
    for _ in range(20):
        waiters = [asyncio.create_task(slots.acquire(Caller(f"u{n}", n % 3), 1.0, timeout=60)) for n in range(100)]
        await asyncio.sleep(0)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.wait(waiters)
    assert (slots.waiting, slots.in_flight, slots.by_priority(), list(alarm)) == (0, 1, {}, [])
    slots.release()
    assert slots.in_flight == 0
    alarm.close()
