"""The shared tier: a real Redis, dead, slow, flushed, loading or lying, never in the way of a message."""

import asyncio

import pytest
from sharing import engine_at, free_port, joined, plain, proxied, redis_server, say, told, until

from whisper_fast.store import redis as tier

LIMIT, PROBE, LONGEST, PATIENCE = tier.LIMIT, tier.PROBE, tier.LONGEST, tier.PATIENCE  # as they are for users


@pytest.fixture
def port(tmp_path):
    with redis_server(tmp_path) as port, plain(port):
        yield port


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """What is slow is not up to a busy machine: a quarter of a second instead of 3 ms."""
    monkeypatch.setattr(tier, "LIMIT", 0.25)


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


async def test_a_first_turn_is_written_twice_and_not_without_end(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        for n in range(1, 4):
            await say(a, "one", user=f"user {n}")
            # as it came, and with all that is on the disk of a place that is new
            await until(lambda n=n: a._shared.counts["pushes"] == 2 * n and not a._shared._writing.is_set())


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


async def test_what_a_message_waits_and_how_soon_redis_is_joined_again(tmp_path, port, monkeypatch):
    assert LIMIT <= 0.005
    assert PROBE <= LONGEST
    assert LONGEST + PATIENCE < 2  # a pause that has just begun, and a ping that is answered in time
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        monkeypatch.setattr(tier, "LIMIT", LIMIT)
        for _ in range(tier.SLOW):
            assert await a._shared.answer(("ada", "p", "c", "dm"), asyncio.get_running_loop().create_future()) is None
        assert a._shared.counts["late"] == tier.SLOW
        assert not a._shared.joined
