"""Language models that a test steers, and the few words that the pool's tests say over and over."""

from __future__ import annotations

import asyncio

from whisper_fast.llm import Completion
from whisper_fast.message import Delta

HELLO = [{"role": "user", "content": "hello"}]


class Scripted:
    """A provider that follows a script: an error is raised, anything else is answered; then it answers "ok"."""

    def __init__(self, *script, name="scripted", pieces=0):
        self.name, self.script, self.pieces = name, list(script), pieces
        self.asked, self.closed = 0, False

    def step(self):
        self.asked += 1
        step = self.script.pop(0) if self.script else "ok"
        if isinstance(step, BaseException):
            raise step
        return step

    async def chat(self, messages, **params):
        return Completion(text=self.step(), model=self.name)

    async def stream(self, messages, **params):
        for _ in range(self.pieces):
            yield Delta("piece ")
        yield Delta(self.step(), finish_reason="stop")

    async def close(self):
        self.closed = True


class Gate:
    """A provider whose calls wait until they are let through."""

    name = "gate"

    def __init__(self):
        self.waiting, self.order, self.cancelled = [], [], 0

    async def chat(self, messages, **params):
        self.order.append(messages[0]["content"])
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Completion(text="ok")

    async def stream(self, messages, **params):
        yield Delta("first")
        await self.chat(messages)
        yield Delta("last")

    async def close(self):
        pass

    def pass_one(self):
        self.waiting.pop(0).set_result(None)


def words(text):
    return [{"role": "user", "content": text}]


async def started(coroutine):
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def turns(count=10):
    """Let everything that can go on without time do so, however slow the machine is."""
    for _ in range(count):
        await asyncio.sleep(0)


def idle(pool):
    stats = pool.stats()
    return (stats["in_flight"], stats["waiting"]) == (0, 0)


async def drained(pieces):
    return [piece async for piece in pieces]
