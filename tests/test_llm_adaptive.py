"""The pool over a server that works on so many calls at once, on a virtual clock: limit, goodput, refusals."""

from __future__ import annotations

import asyncio
import random

import pytest
from virtual import run

from whisper_fast.errors import LLMRateLimited
from whisper_fast.llm import Completion, LLMPool
from whisper_fast.message import Delta, Usage


class Busy:
    """Works on `capacity` calls at once; others wait inside, or are refused with 429 where it `refuses`."""

    name = "busy"

    def __init__(self, capacity, *, refuses=False, seed=1):
        self.capacity, self.refuses, self.rng = capacity, refuses, random.Random(seed)
        self.running, self.inside, self.waiting = 0, 0, []
        self.served = self.asked = self.refused = 0

    async def enter(self):
        self.asked += 1
        if self.refuses and self.inside >= self.capacity:
            self.refused += 1
            raise LLMRateLimited("too many at once")
        self.inside += 1
        try:
            while self.running >= self.capacity:
                turn = asyncio.get_running_loop().create_future()
                self.waiting.append(turn)
                await turn
        except BaseException:
            self.inside -= 1
            raise
        self.running += 1

    def leave(self, tokens):
        self.running -= 1
        self.inside -= 1
        self.served += tokens
        while self.waiting and self.running < self.capacity:
            turn = self.waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                break

    async def chat(self, messages, **params):
        tokens = max(1, round(self.rng.lognormvariate(5.5, 0.6)))
        await self.enter()
        try:
            await asyncio.sleep(0.5 + tokens * 0.015)
        finally:
            self.leave(tokens)
        return Completion(text="ok", usage=Usage(100, tokens))

    async def stream(self, messages, **params):
        tokens = max(1, round(self.rng.lognormvariate(5.5, 0.6)))
        await self.enter()
        try:
            await asyncio.sleep(0.5)
            yield Delta("first")
            await asyncio.sleep(tokens * 0.015)
        finally:
            self.leave(tokens)
        yield Delta(finish_reason="stop", usage=Usage(100, tokens))

    async def close(self):
        pass


async def saturate(pool, clock, seconds, *, streamed=False, callers=150):
    """Keep `callers` calls waiting or running for `seconds`."""
    until = clock() + seconds

    async def caller(number):
        while clock() < until:
            try:
                if streamed:
                    async for _ in pool.stream([{"role": "user", "content": "hi"}], user=f"u{number}"):
                        pass
                else:
                    await pool.chat([{"role": "user", "content": "hi"}], user=f"u{number}")
            except LLMRateLimited:
                await asyncio.sleep(1)

    await asyncio.gather(*(caller(number) for number in range(callers)))


def options(clock):
    return {"clock": clock, "hedging": lambda: False, "queue_timeout": None, "max_concurrent": 50, "timeout": 600}


@pytest.mark.parametrize("streamed", [False, True])
def test_the_limit_finds_what_the_server_bears(streamed):
    async def main(clock):
        server = Busy(64)
        async with LLMPool([server], **options(clock)) as pool:
            await saturate(pool, clock, 400, streamed=streamed)
            assert 55 <= pool.stats()["limit"] <= 73
            server.capacity = 16
            await saturate(pool, clock, 400, streamed=streamed)
            assert 14 <= pool.stats()["limit"] <= 18
            before, begun = server.served, clock()
            await saturate(pool, clock, 400, streamed=streamed)
            rate = (server.served - before) / (clock() - begun)
            assert pool.stats()["endpoints"][0]["limit_why"]
        return rate

    best = 16 * 290 / (0.5 + 290 * 0.015)  # tokens a second of sixteen calls that never wait
    assert run(main) >= 0.9 * best


def test_refusals_are_rare_and_calls_are_not_lost():
    async def main(clock):
        server = Busy(64, refuses=True)
        async with LLMPool([server], **options(clock)) as pool:
            await saturate(pool, clock, 600)
            server.capacity = 16
            asked, refused = server.asked, server.refused
            await saturate(pool, clock, 1500)
            assert 14 <= pool.stats()["limit"] <= 18
            return (server.refused - refused) / (server.asked - asked)

    assert run(main) <= 0.01


def test_switched_off_the_limit_stands():
    async def main(clock):
        server = Busy(8)
        async with LLMPool([server], adaptive=lambda: False, **options(clock)) as pool:
            await saturate(pool, clock, 300)
            assert (pool.stats()["limit"], pool.stats()["endpoints"][0]["limit_moves"]) == (50, 0)

    run(main)
