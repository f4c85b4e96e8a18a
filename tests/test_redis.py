"""The shared tier: a real Redis, dead, slow, flushed, loading or lying, never in the way of a message."""

import asyncio
import socket
import subprocess
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest
import redis
from needs import needs
from scripted import ScriptedLLM, said

from whisper_fast import Engine, Settings
from whisper_fast.store import redis as tier


@contextmanager
def redis_server(folder, port=0, *options):
    """A Redis of our own, on a free port unless one is named."""
    port = port or free_port()
    words = [needs("redis-server"), "--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", "", *options]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


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


@pytest.fixture
def port(tmp_path):
    with redis_server(tmp_path) as port, plain(port):
        yield port


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """What is slow is not up to a busy machine: a quarter of a second instead of 3 ms."""
    monkeypatch.setattr(tier, "LIMIT", 0.25)


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
    await until(lambda: not shared._pushes and not shared._owed and not shared._forgotten)
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


async def test_engines_share_a_conversation_in_the_order_of_time(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a, engine_at(tmp_path / "b", port) as b:
        await joined(a, b)
        told_so_far = []
        for n in range(6):
            engine = (a, b)[n % 2]
            told_so_far.append(f"sentence {n}")
            assert await say(engine, told_so_far[-1]) == told_so_far
            await told(engine, a, b, port=port)
        assert await say(b, "hello", user="bob") == ["hello"]
        assert await say(a, "in public", scope="server:1/public") == ["in public"]


async def test_a_conversation_survives_a_restart_and_a_lost_disk(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        await say(a, "one")
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        assert await say(a, "two") == ["one", "two"]
    async with engine_at(tmp_path / "new", port) as b:
        await joined(b)
        assert await say(b, "three") == ["one", "two", "three"]


async def test_forgotten_everywhere(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a, engine_at(tmp_path / "b", port) as b:
        await joined(a, b)
        await say(a, "a secret")
        await told(a)
        assert await say(b, "hello") == ["a secret", "hello"]
        await b.forget("ada")
        await told(b)
        await a.forget("ada")
        await told(a)
        assert await say(b, "again") == ["again"]
        await told(b)
        with plain(port) as client:
            assert len(client.keys()) == 2  # one place, one index


async def test_what_is_written_is_namespaced_and_expires_and_names_nobody(tmp_path, port):
    async with engine_at(tmp_path / "a", port, redis_namespace="bot", conversation_cache_max_local=3) as a:
        await joined(a)
        for n in range(5):
            await say(a, f"{n}")
        await told(a)
        with plain(port) as client:
            keys = client.keys()
            assert all(key.startswith(b"bot:1:{") and b"ada" not in key for key in keys)
            assert all(0 < client.pttl(key) <= 900_000 for key in keys)
            (place,) = [key for key in keys if client.type(key) == b"zset"]
            assert client.zcard(place) == 3
            used = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
        assert not used & {"scan", "eval", "setnx"}


async def test_what_somebody_else_wrote_is_not_believed(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        key = ("ada", "library", "c", "dm")
        name = a._shared._place(key)
        with plain(port) as client:
            foreign = tier.Told("x", "bob", 1, 1.0, "bob's secret", "yes")
            ours = tier.Told("x", "ada", 2, 2.0, "mine", "yes")
            client.zadd(name, {tier.encode(foreign): 1, tier.encode(ours): 2, b"\x80\x04pickle": 3, b"": 4})
            found = await a._shared.ask(key)
            assert found == [ours]
            client.set(a._shared._place(("eve", *key[1:])), "not a set")
            assert await a._shared.ask(("eve", *key[1:])) == []
            client.publish(a._shared._channel, b"\xff nonsense")
            await until(lambda: a._shared.counts["refused"] == 4)
        assert a._shared.joined


async def test_a_dead_redis_is_not_missed_and_joins_again(tmp_path):
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis") as port, plain(port):
        async with engine_at(tmp_path / "a", port) as a, engine_at(tmp_path / "b", port) as b:
            await joined(a, b)
            await say(a, "one")
            await told(a)
            with plain(port) as client:
                client.shutdown(nosave=True)  # and the socket is free
            await joined(a, b, value=False)
            assert await say(a, "two") == ["one", "two"]
            assert await say(b, "apart") == ["apart"]
            with redis_server(tmp_path / "redis", port), plain(port):
                await joined(a, b)
                await told(a)
                await told(b, a, b, port=port)
                assert await say(b, "together") == ["one", "two", "apart", "together"]


async def test_without_redis_from_the_first_moment(tmp_path):
    async with engine_at(tmp_path / "a", free_port()) as a:
        assert await say(a, "one") == ["one"]
        await a.forget("ada")
        assert await say(a, "two") == ["two"]
        assert not a._shared.joined


async def test_a_slow_redis_is_left_alone_and_joins_again(tmp_path, port):
    async with proxied(port) as proxy, engine_at(tmp_path / "a", proxy.port) as a:
        await joined(a)
        proxy.delay = 0.2
        for n in range(tier.SLOW):
            assert await say(a, "hello", user=f"user {n}") == ["hello"]
        assert not a._shared.joined
        assert a._shared.counts["late"] == tier.SLOW
        assert await say(a, "more", user="user 0") == ["hello", "more"]
        proxy.delay = 0.0
        await joined(a)
        await told(a)
        async with engine_at(tmp_path / "b", port) as b:
            await joined(b)
            assert await say(b, "elsewhere", user="user 0") == ["hello", "more", "elsewhere"]


async def test_a_flushed_redis_is_filled_again(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a, engine_at(tmp_path / "b", port) as b:
        await joined(a, b)
        for n in range(3):
            await say(a, f"{n}")
        await told(a)
        with plain(port) as client:
            client.flushall()
        assert await say(a, "3") == ["0", "1", "2", "3"]
        await told(a, b, port=port)
        assert await say(b, "4") == ["0", "1", "2", "3", "4"]


async def test_a_loading_redis_is_left_alone_until_it_is_there(tmp_path):
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder) as port, plain(port) as client:
        client.mset({f"k{n}": "x" * 1000 for n in range(2000)})
        client.save()
    slow = ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
    with redis_server(folder, port, *slow):
        async with engine_at(tmp_path / "a", port) as a:
            assert await say(a, "one") == ["one"]
            assert not a._shared.joined
            await joined(a)
            await told(a)


async def test_with_caching_off_the_store_alone_answers(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        a.flags.caching = False
        await say(a, "one")
        assert await say(a, "two") == ["one", "two"]
        assert a._shared.counts["reads"] == 0


async def test_a_thousand_cold_places_take_few_connections(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        with plain(port) as client:
            before = client.info("stats")["total_connections_received"]
            keys = [(f"user {n}", "p", "c", "dm") for n in range(1000)]
            assert await asyncio.gather(*(a._shared.ask(key) for key in keys)) == [[]] * 1000
            assert client.info("stats")["total_connections_received"] - before <= 2
