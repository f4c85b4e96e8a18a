"""Second attempts: what they save and cost on a virtual clock, when they stop, and that the loser is let go."""

from __future__ import annotations

import asyncio
import random

import pytest
from steered import HELLO, drained, idle
from virtual import run

from whisper_fast.errors import LLMUnavailable
from whisper_fast.llm import Completion, LLMPool
from whisper_fast.message import Delta, Usage

FAST, SLOW, RARE = 0.008, 0.2, 0.05


class TwoPoint:
    """Answers in 8 ms, but one in twenty takes 200 ms, each drawn on its own."""

    def __init__(self, name="two-point", seed=1):
        self.name, self.rng = name, random.Random(seed)
        self.asked = self.cancelled = 0
        self.failing = False

    async def chat(self, messages, **params):
        self.asked += 1
        try:
            if self.failing:
                await asyncio.sleep(SLOW)
                raise LLMUnavailable("down")
            await asyncio.sleep(SLOW if self.rng.random() < RARE else FAST)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Completion(text="ok", usage=Usage(10, 10))

    async def stream(self, messages, **params):
        await self.chat(messages)
        for number in range(5):
            yield Delta(str(number))
            await asyncio.sleep(0.5 if number == 2 else 0)

    async def close(self):
        pass


async def timed(clock, call, count, every=0.02):
    """Return the seconds of `count` calls, one begun every 20 ms."""
    seconds = []

    async def one():
        begun = clock()
        await call()
        seconds.append(clock() - begun)

    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(every)
    await asyncio.gather(*tasks)
    return sorted(seconds[count // 10 :])


@pytest.mark.parametrize("order", ["listed", "fastest"])
def test_the_tail_is_cut_within_the_budget(order):
    async def main(clock):
        replicas = [TwoPoint("a", 1), TwoPoint("b", 2)]
        async with LLMPool(replicas, order=order, clock=clock) as pool:
            seconds = await timed(clock, lambda: pool.chat(HELLO), 10_000)
            stats = pool.stats()
        asked = sum(replica.asked for replica in replicas)
        return seconds, asked, stats

    seconds, asked, stats = run(main)
    assert seconds[len(seconds) * 99 // 100] <= 0.017
    assert asked <= 1.075 * 10_000
    assert stats["hedges"] == asked - 10_000
    assert stats["hedges_won"] > 0.7 * stats["hedges"]
    assert stats["in_flight"] == 0


def test_switched_off_the_tail_is_there():
    async def main(clock):
        replica, flag = TwoPoint(), [False]
        async with LLMPool([replica], hedging=lambda: flag[0], clock=clock) as pool:
            seconds = await timed(clock, lambda: pool.chat(HELLO), 2000)
            assert (replica.asked, pool.stats()["hedges"]) == (2000, 0)
            flag[0] = True
            await timed(clock, lambda: pool.chat(HELLO), 500)
            assert pool.stats()["hedges"] > 0
        return seconds

    seconds = run(main)
    assert seconds[len(seconds) * 99 // 100] >= SLOW


def test_streams_are_hedged_before_their_first_piece_and_never_after():
    async def main(clock):
        replica = TwoPoint()
        async with LLMPool([replica], clock=clock) as pool:

            async def first():
                pieces = pool.stream(HELLO)
                await anext(pieces)
                await pieces.aclose()

            for _ in range(300):
                assert "".join(await drained(pool.stream(HELLO))) == "01234"
            before = pool.stats()["hedges"]
            seconds = await timed(clock, first, 5000)
            assert before < 30, "the half second between two pieces is no reason"
            assert idle(pool)
            await asyncio.sleep(1)
            return seconds, replica.asked

    seconds, asked = run(main)
    assert seconds[len(seconds) * 99 // 100] <= 0.017
    assert asked <= 1.075 * 5300


def test_hedges_that_never_win_are_given_up_and_come_back_when_they_do():
    async def main(clock):
        class Long(TwoPoint):
            long = True

            async def chat(self, messages, **params):
                if not self.long:
                    return await super().chat(messages)
                self.asked += 1
                await asyncio.sleep(messages[0]["seconds"])
                return Completion(text="ok", usage=Usage(10, 10))

        replica, rng = Long(), random.Random(4)
        async with LLMPool([replica], clock=clock) as pool:

            def ask():
                return pool.chat([{"role": "user", "content": "hi", "seconds": rng.choice([FAST] * 19 + [SLOW])}])

            await timed(clock, ask, 10_000)
            assert 0 < pool.stats()["hedges"] < 100, "it is the long answer that takes long, again"
            replica.long = False
            await timed(clock, ask, 10_000)
            assert pool.stats()["hedges_won"] > 250

    run(main)


def test_an_outage_is_not_answered_with_more_requests():
    async def main(clock):
        replica = TwoPoint()
        async with LLMPool([replica], clock=clock, timeout=5) as pool:
            await timed(clock, lambda: pool.chat(HELLO), 1000)
            replica.failing = True
            before, asked = pool.stats(), replica.asked
            results = await asyncio.gather(*(pool.chat(HELLO) for _ in range(500)), return_exceptions=True)
            after = pool.stats()
            assert all(isinstance(result, LLMUnavailable) for result in results)
            assert after["hedges"] - before["hedges"] <= 10
            assert replica.asked - asked <= 100, "the breaker has opened"
            assert idle(pool)

    run(main)


def test_the_loser_is_cancelled_in_the_same_moment_and_a_cancelled_caller_cancels_both():
    async def main(clock):
        class Steered(TwoPoint):
            async def chat(self, messages, **params):
                if isinstance(params.get("wait"), list):
                    self.asked += 1
                    try:
                        await asyncio.sleep(params["wait"].pop())
                    except asyncio.CancelledError:
                        self.cancelled += 1
                        raise
                    return Completion(text="ok")
                return await super().chat(messages)

        replica = Steered()
        async with LLMPool([replica], clock=clock) as pool:
            await timed(clock, lambda: pool.chat(HELLO), 1000)
            replica.cancelled, replica.asked = 0, 0
            begun = clock()
            await pool.chat(HELLO, wait=[FAST, 60])
            assert clock() - begun < 0.02
            assert (replica.asked, replica.cancelled, idle(pool)) == (2, 1, True)
            task = asyncio.create_task(pool.chat(HELLO, wait=[60, 60]))
            await asyncio.sleep(1)
            assert (replica.asked, pool.stats()["in_flight"]) == (4, 2)
            begun = clock()
            task.cancel()
            await asyncio.wait([task])
            for _ in range(3):
                await asyncio.sleep(0)
            assert (replica.cancelled, clock() - begun, idle(pool)) == (3, 0, True)

    run(main)


def test_a_hedge_saves_a_call_whose_first_attempt_fails():
    async def main(clock):
        class Failing(TwoPoint):
            async def chat(self, messages, **params):
                if "script" in params:
                    seconds, error = params["script"].pop(0)
                    await asyncio.sleep(seconds)
                    if error:
                        raise error
                    return Completion(text="second")
                return await super().chat(messages)

        async with LLMPool([Failing()], clock=clock) as pool:
            await timed(clock, lambda: pool.chat(HELLO), 1000)
            script = [(0.1, LLMUnavailable("cut")), (0.3, None)]
            assert (await pool.chat(HELLO, script=script)).text == "second"
            assert pool.stats()["errors"] == {"LLMUnavailable": 1}
            script = [(0.1, LLMUnavailable("first")), (0.05, LLMUnavailable("second")), (0, None)]
            assert (await pool.chat(HELLO, script=script)).text == "second", "then it is an ordinary retry"
            assert idle(pool)

    run(main)
