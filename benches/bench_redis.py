"""What the shared tier adds to a message, and how soon it is back: no Redis, a healthy, a slow and a dead one.

Each message is the first of its user in a new channel, so that it must look for what others have said there. The
engines take turns, message by message. A slow Redis stands behind a proxy that holds each piece for 200 ms.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from contextlib import asynccontextmanager, contextmanager, suppress
from time import perf_counter

import numpy as np
import pytest
import uvloop
from measured import Instant
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from whisper_fast import Engine, Settings
from whisper_fast.message import Message

MESSAGES, DELAY = 400, 0.2


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def redis_server(folder, port):
    words = [shutil.which("redis-server"), "--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL)
    try:
        with Redis(port=port, retry=Retry(ConstantBackoff(0.02), 500)) as client:
            client.ping()
        yield
    finally:
        process.kill()
        process.wait()


class Slow:
    """Passes bytes on, each piece `delay` seconds later."""

    def __init__(self, target):
        self.target, self.delay = target, 0.0

    async def serve(self, reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.pipe(reader, back))
            group.create_task(self.pipe(there, writer))

    async def pipe(self, reader, writer):
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay)
                writer.write(data)
        writer.close()


@asynccontextmanager
async def engine(folder, **shared):
    settings = Settings(data_dir=folder, process_pool_size=1, **shared)
    async with Engine.open(settings, llm=Instant()) as one:
        yield one


async def compared(what, alone, shared):
    """Print what `shared` adds to a message of `alone`."""
    seconds = []
    for number in range(MESSAGES):
        words = f"{what} {number}"
        message = Message(user=words, text=words, id=words, channel=words, platform="bench")
        seconds.append([await timed(one, message) for one in (alone, shared)])
    (p50, p99), (more50, more99) = np.percentile(np.array(seconds) * 1e3, [50, 99], axis=0).T
    print(
        f"{what:9} Redis: {more50:6.2f} ms a message, p99 {more99:6.2f}; without Redis {p50:6.2f}, p99 {p99:6.2f} "
        f"({more50 - p50:+.2f} ms at the median, {more99 - p99:+.2f} at p99)"
    )


async def timed(one, message):
    began = perf_counter()
    await one.respond(message)
    return perf_counter() - began


async def joined(one):
    began = perf_counter()
    while not one.stats()["redis"]["joined"]:  # noqa: ASYNC110 - from outside there is no event for it
        await asyncio.sleep(0.005)
    return perf_counter() - began


async def measured(folder):
    port = free_port()
    slow = Slow(port)
    server = await asyncio.start_server(slow.serve, "127.0.0.1", 0)
    at = {"use_redis_cache": True, "redis_host": "127.0.0.1"}
    async with (
        server,
        engine(folder / "a") as alone,
        engine(folder / "b", **at, redis_port=port) as near,
        engine(folder / "c", **at, redis_port=server.sockets[0].getsockname()[1]) as far,
    ):
        with redis_server(folder, port):
            await joined(near)
            await joined(far)
            for n, one in enumerate((near, far)):  # what the first messages pay for is not Redis's
                await compared(f"warm-up {n + 1}", alone, one)
            await compared("healthy", alone, near)
            slow.delay = DELAY
            await compared("slow", alone, far)
            slow.delay = 0.0
            back_from_slow = await joined(far)
        await compared("dead", alone, near)
        with redis_server(folder, port):
            back = await joined(near)
    print(f"joined again {back_from_slow:.2f} s after a slow one was quick, {back:.2f} s after a dead one listened")


def test_redis(benchmark, tmp_path):
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    benchmark.pedantic(lambda: uvloop.run(measured(tmp_path)), rounds=1)
