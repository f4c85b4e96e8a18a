"""The door over real sockets, in front of an engine that records what reached it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace

import aiohttp
import numpy as np

from whisper_fast import Settings
from whisper_fast.door.app import build
from whisper_fast.door.server import Server, address_of, listener
from whisper_fast.flags import Flags
from whisper_fast.message import Delta, Recalled, Reply, Usage

MEMORY = Recalled(id=7, text="Ana lives in Porto", score=0.9, at=1.0, scope="dm")
URL = "/v1/chat/completions"


class Stream:
    def __init__(self, engine, message):
        self.engine, self.message, self.closed, self.reply = engine, message, asyncio.Event(), None

    async def __aiter__(self):
        reply = await self.engine.respond(self.message)
        for i, word in enumerate(reply.text.split(" ")):
            if i:
                await self.engine.step()
            yield Delta(f" {word}" if i else word)
        if self.engine.later:
            raise self.engine.later
        yield Delta(finish_reason="stop", usage=reply.usage)
        self.reply = reply

    async def aclose(self):
        self.closed.set()


class RecordingEngine:
    """Answers with the message's own words, keeps what it was asked, raises what it is told to."""

    def __init__(self):
        self.asked, self.streams = [], []
        self.fault = self.later = None
        self.hold = None
        self.embedder = SimpleNamespace(name="static-128", dimension=2)
        self.llm = SimpleNamespace(models=("tiny-llm",))
        self.llm_description = "a tiny model answers"
        self.state = {"ready": True}
        self.record = None
        self.flags = Flags(Settings())

    async def embed(self, texts):
        return np.array([[len(text), 0.5] for text in texts], np.float32)

    async def step(self):
        if self.hold is not None:
            await self.hold.wait()

    async def respond(self, message):
        message.checked(1 << 16)
        self.asked.append(message)
        if self.fault:
            raise self.fault
        return Reply(
            id=message.id, user=message.user, text=f"you said {message.text}", emotion={"valence": 0.5},
            memories=(MEMORY,), partial=("weather",), timings={"total": 0.01}, usage=Usage(3, 4), model="tiny-llm",
        )  # fmt: skip

    def stream(self, message):
        self.streams.append(Stream(self, message))
        return self.streams[-1]

    def ready(self):
        return self.state

    def stats(self):
        return {"accepted": len(self.asked), "in_flight": 0, "llm": {"errors": {"LLMTimeout": 2}, "calls": 9}}


@asynccontextmanager
async def opened(engine, **settings):
    settings = Settings(**{"port": 0, "drain_seconds": 0.3, **settings})
    stop, up = asyncio.Event(), asyncio.Event()
    sock = listener("127.0.0.1", 0)
    server = Server(build(engine, settings), stop, settings.drain_seconds)
    server.announce = up.set
    serving = asyncio.create_task(server.serve(sockets=[sock]), name="test-server")
    await up.wait()
    try:
        async with aiohttp.ClientSession(address_of(sock)) as client:
            client.fetch = partial(fetched, client)
            client.stop = stop
            client.port = sock.getsockname()[1]
            yield client
    finally:
        stop.set()
        await serving


async def fetched(client, path, **more):
    """Read a whole answer, so that its connection is free again."""
    async with client.request("POST" if "json" in more else "GET", path, **more) as response:
        await response.read()
        return response


def asking(text="hi", **more):
    return {"model": "whisper-fast", "messages": [{"role": "user", "content": text}], **more}


async def error_of(response):
    """Return status and code of an error, which has the protocol's shape."""
    body = (await response.json())["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return response.status, body["code"]


async def events(response):
    raw = await response.read()
    found = [line.removeprefix(b"data: ") for line in raw.split(b"\n\n") if line]
    assert found.pop() == b"[DONE]"
    return [json.loads(line) for line in found]
