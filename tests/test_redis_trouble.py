"""A Redis that answers but refuses: told of once, asked at leisure, and nothing is lost or shown again."""

import logging

import pytest
from sharing import engine_at, joined, plain, redis_server, running_redis, say, told, until

from whisper_fast.store import redis as tier
from whisper_fast.store.forgotten import untold

KEY = ("ada", "library", "default", "dm")


@pytest.fixture
def port(tmp_path):
    with redis_server(tmp_path) as port, plain(port):
        yield port


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What is slow is not up to a busy machine, and the test does not wait for the next look."""
    for name, value in (("LIMIT", 0.25), ("PROBE", 0.01), ("LONGEST", 0.04)):
        monkeypatch.setattr(tier, name, value)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == tier.__name__ and r.levelno == logging.WARNING]


def calls(port, command):
    with plain(port) as client:
        return client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)


async def test_one_that_takes_no_writes_is_not_joined_and_logged_once(tmp_path, port, caplog):
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        with plain(port) as client:
            client.replicaof("127.0.0.1", "1")
            assert await say(a, "one") == ["one"]
            await joined(a, value=False)
            joins, pings = a._shared.counts["joins"], calls(port, "ping")
            await until(lambda: calls(port, "ping") > pings + 5)
            assert a._shared.counts["joins"] == joins
            assert len(warnings(caplog)) == len(set(warnings(caplog))) <= 3
            client.replicaof("NO", "ONE")
        await joined(a)
        await told(a)
        async with engine_at(tmp_path / "b", port) as b:
            await joined(b)
            assert await say(b, "two") == ["one", "two"]


async def test_one_that_refuses_a_command_is_looked_at_later_each_time(tmp_path, port, caplog):
    with plain(port) as client:
        client.execute_command("ACL", "SETUSER", "default", "-zadd")
        async with engine_at(tmp_path / "a", port) as a:
            await joined(a)
            await say(a, "one")
            await until(lambda: a._shared.counts["joins"] >= 6)
            assert a._shared._pause == tier.LONGEST
            assert a._shared.counts["pushes"] == 0
            assert len(warnings(caplog)) <= 3
            client.execute_command("ACL", "SETUSER", "default", "+zadd")
            await until(lambda: a._shared.counts["pushes"] >= 1)


async def test_an_index_and_a_place_of_another_type_are_made_anew(tmp_path, port):
    async with engine_at(tmp_path / "a", port) as a, engine_at(tmp_path / "b", port) as b:
        await joined(a, b)
        await say(a, "one")
        await told(a)
        shared, joins = a._shared, a._shared.counts["joins"]
        with plain(port) as client:
            for name in (shared._place(KEY), shared._index(tier.digest("ada"))):
                client.set(name, "x")
                pushes = shared.counts["pushes"]
                await say(a, f"after {name}")
                await told(a, b, port=port)
                assert shared.counts["pushes"] > pushes
                assert client.type(name) in (b"zset", b"set")
            assert len(await say(b, "hello")) == 4
            client.set(shared._index(tier.digest("ada")), "x")
            await a.forget("ada")
            await told(a)
        assert shared.counts["joins"] == joins


async def test_what_was_not_taken_is_owed_and_not_counted(tmp_path, port, monkeypatch):
    async with engine_at(tmp_path / "a", port) as a:
        await joined(a)
        shared = a._shared
        monkeypatch.setattr(tier, "unwell", lambda result: False)  # each error is about one key
        with plain(port) as client:
            client.execute_command("ACL", "SETUSER", "default", "-zadd")
            await say(a, "one")
            await until(lambda: KEY in shared._owed)
            assert shared.counts["pushes"] == 0
            client.execute_command("ACL", "SETUSER", "default", "+zadd")
            await say(a, "two")
            await told(a)
            assert client.zcard(shared._place(KEY)) == 2
        assert shared.counts["pushes"] >= 2


@pytest.mark.parametrize("wrong", ["password", "port"])
async def test_an_unreachable_one_is_named_in_the_log(tmp_path, wrong, caplog):
    if wrong == "port":
        with running_redis(tmp_path) as (_, port):
            pass
        async with engine_at(tmp_path / "a", port):
            await until(lambda: any("onnect" in text for text in warnings(caplog)))
        return
    with redis_server(tmp_path, 0, "--requirepass", "s3cret") as port:
        async with engine_at(tmp_path / "a", port):
            await until(lambda: any("authenticat" in text for text in warnings(caplog)))
            assert not any("s3cret" in text for text in warnings(caplog))


async def test_who_was_forgotten_without_redis_is_forgotten_there_after_a_restart(tmp_path, port):
    async with engine_at(tmp_path / "b", port) as b:
        async with engine_at(tmp_path / "a", port) as a:
            await joined(a, b)
            await say(a, "a secret")
            await told(a)
            a._shared._tasks[1].cancel()  # it ends before it could tell
            a._shared.joined = False
            await a.forget("ada")
        assert await b._shared.ask(KEY)
        async with engine_at(tmp_path / "a", port) as a:
            await joined(a, b)
            await told(a, b, port=port)
            assert await say(b, "hello") == ["hello"]
            assert await a._database.read(untold) == []
