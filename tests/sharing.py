"""A real Redis, a proxy that delays, and engines that share."""

import asyncio
import socket
import subprocess
from contextlib import asynccontextmanager, contextmanager, suppress

import redis
from needs import needs
from scripted import ScriptedLLM, said

from whisper_fast import Engine, Settings
from whisper_fast.store import redis as tier


@contextmanager
def running_redis(folder, port=0, *options):
    """A Redis of our own, on a free port unless one is named: its process, and the port."""
    port = port or free_port()
    words = [needs("redis-server"), "--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", "", *options]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


@contextmanager
def redis_server(folder, port=0, *options):
    with running_redis(folder, port, *options) as (_, port):
        yield port


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def plain(port):
    """A client of the test's own, when the server listens."""
    patient = redis.retry.Retry(redis.backoff.ConstantBackoff(0.02), 500)
    with redis.Redis(port=port, retry=patient, retry_on_error=[redis.exceptions.BusyLoadingError]) as client:
        client.ping()
    with redis.Redis(port=port, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0)) as client:
        yield client


class Proxy:
    """Passes bytes on, each piece `delay` seconds later; `cut` closes what is open."""

    def __init__(self, target):
        self.target, self.delay = target, 0.0
        self.tasks, self.writers = set(), set()

    async def serve(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        asyncio.current_task().add_done_callback(self.tasks.discard)
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= {writer, back}
        try:
            await asyncio.gather(self.pipe(reader, back), self.pipe(there, writer))
        finally:
            for one in (writer, back):
                one.close()
                with suppress(OSError):
                    await one.wait_closed()
            self.writers -= {writer, back}

    async def pipe(self, reader, writer):
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
        writer.close()


@asynccontextmanager
async def proxied(target):
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for writer in tuple(proxy.writers):
            writer.close()
        for task in tuple(proxy.tasks):
            task.cancel()
        await asyncio.gather(*proxy.tasks, return_exceptions=True)
        await server.wait_closed()


@asynccontextmanager
async def engine_at(folder, port, answer=lambda m: f"to {m[-1]['content']}", **fields):
    """An engine that shares, and the script that answers it."""
    settings = Settings(
        data_dir=folder, use_redis_cache=True, redis_host="127.0.0.1", redis_port=port, process_pool_size=1,
        thread_pool_size=2, component_deadline=30, **fields,
    )  # fmt: skip
    llm = ScriptedLLM(answer)
    async with Engine.open(settings, llm=llm) as engine:
        engine.asked = llm.asked
        engine.learnt, changed = [], engine._shared._changed
        engine._shared._changed = lambda what: (engine.learnt.append(what), changed(what))
        yield engine


async def until(condition):
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.005)


async def joined(*engines, value=True):
    for engine in engines:
        await until(lambda engine=engine: engine._shared.joined is value)


async def told(engine, *others, port=None):
    """Wait until all that was said is told, and until the others have heard it."""
    await until(lambda: not engine.stats()["in_flight"])
    shared = engine._shared
    while shared._pushes or shared._owed or shared._forgotten:
        await asyncio.wait_for(until(lambda: not (shared._pushes or shared._owed or shared._forgotten)), 15)
        async with shared._telling:
            pass
    async with shared._telling:
        pass
    for other in others:
        mark = f"mark {len(other.learnt)}"
        with plain(port) as client:
            client.publish(shared._channel, tier.encode(tier.News("x", mark, None)))
        await until(lambda other=other, mark=mark: mark in other.learnt)


async def say(engine, text, user="ada", **fields):
    await engine.respond(said(user, text, **fields))
    return heard(engine)


def heard(engine):
    """What the model was last shown of the user's own words."""
    return [message["content"] for message in engine.asked[-1] if message["role"] == "user"]
