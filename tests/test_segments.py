"""What is kept of a user in memory against the truth on disk: nothing is missed, nothing comes back."""

from __future__ import annotations

import asyncio

import pytest
from hashing import HashEmbedder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whisper_fast.memory import MemoryStore
from whisper_fast.store.sqlite import Database


@pytest.fixture
def embedder():
    return HashEmbedder()


@pytest.fixture
async def memory(tmp_path, embedder):
    async with MemoryStore.open(tmp_path, embedder) as opened:
        yield opened


async def texts(memory, user, query, **how):
    return [found.text for found in await memory.recall(user, query, **how)]


async def test_a_cold_user_is_loaded_once_however_many_ask(tmp_path, embedder):
    async with MemoryStore.open(tmp_path, embedder) as memory:
        await memory.add_many("ada", [f"thing {i}" for i in range(50)])
        memory.clear_cache()
        before = memory.stats()["loads"]
        answers = await asyncio.gather(*(memory.recall("ada", "thing 7", k=3) for _ in range(100)))
        assert memory.stats()["loads"] == before + 1
        assert all(found == answers[0] for found in answers)


class Gate:
    """Lets a database's reads finish only when told, after they have read."""

    def __init__(self, monkeypatch):
        self.read, self.open = asyncio.Event(), asyncio.Event()
        original = Database.read

        async def read(database, job):
            result = await original(database, job)
            self.read.set()
            await self.open.wait()
            return result

        monkeypatch.setattr(Database, "read", read)


async def test_what_is_stored_while_a_segment_loads_is_not_missed(memory, monkeypatch):
    await memory.add("ada", "first")
    gate = Gate(monkeypatch)
    early = asyncio.create_task(memory.recall("ada", "thing"))
    await gate.read.wait()
    await memory.add("ada", "second")
    gate.open.set()
    assert len(await early) == 1
    assert len(await memory.recall("ada", "thing")) == 2
    assert len(await memory.recall("ada", "thing")) == 2


@pytest.mark.parametrize("taken", ["delete", "forget", "foreign change"])
async def test_what_is_taken_away_while_a_segment_loads_is_gone(memory, monkeypatch, taken):
    await memory.add("ada", "first")
    gate = Gate(monkeypatch)
    early = asyncio.create_task(memory.recall("ada", "thing"))
    await gate.read.wait()
    if taken == "delete":
        await memory.delete("ada", 1)
    elif taken == "forget":
        await memory.forget("ada")
    else:
        await memory._database.write(lambda connection: connection.execute("DELETE FROM memory").fetchall())
        memory.clear_cache()
    gate.open.set()
    await early
    assert await memory.recall("ada", "thing") == []


async def test_a_segment_in_memory_is_extended_and_not_read_again(memory):
    await memory.warm("ada")
    before = memory.stats()
    for i in range(10):
        await memory.add("ada", f"thing {i}")
        assert len(await memory.recall("ada", "thing")) == i + 1
    after = memory.stats()
    assert after["loads"] == before["loads"]
    assert after["bytes"] > before["bytes"]


async def test_whoever_stops_waiting_has_not_hidden_what_is_stored(memory):
    await memory.warm("ada")
    adding = asyncio.create_task(memory.add("ada", "hello"))
    while not memory._writes:
        await asyncio.sleep(0)
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    await memory.settle()
    stored = [item["text"] async for item in memory.export("ada")]
    assert await texts(memory, "ada", "hello") == stored == ["hello"]


async def test_in_the_callers_own_transaction(memory):
    await memory.warm("ada")
    pending = await memory.prepare("ada", ["kept", {"text": "kept too", "at": 5}])
    assert await memory.recall("ada", "kept") == []
    await memory._database.write(pending.insert)
    memory.publish(pending)
    memory.publish(pending)
    assert sorted(await texts(memory, "ada", "kept")) == ["kept", "kept too"]
    lost = await memory.prepare("ada", ["lost"])

    def fail(connection):
        lost.insert(connection)
        raise ValueError("undone")

    with pytest.raises(ValueError, match="undone"):
        await memory._database.write(fail)
    memory.clear_cache()
    assert sorted(await texts(memory, "ada", "kept")) == ["kept", "kept too"]


async def test_what_was_forgotten_does_not_come_back_by_a_late_publish(memory):
    pending = await memory.prepare("ada", ["secret"])
    await memory._database.write(pending.insert)
    await memory.forget("ada")
    await memory.warm("ada")
    memory.publish(pending)
    assert await memory.recall("ada", "secret") == []


async def test_publish_in_another_order_than_stored(memory):
    await memory.warm("ada")
    first, second = await memory.prepare("ada", ["first"]), await memory.prepare("ada", ["second"])
    await memory._database.write(first.insert)
    await memory._database.write(second.insert)
    for pending in (second, first, second):
        memory.publish(pending)
    assert sorted(await texts(memory, "ada", "x")) == ["first", "second"]
    assert await memory.delete("ada", 1)
    assert await texts(memory, "ada", "x") == ["second"]


async def test_nothing_is_kept_where_caching_is_off(tmp_path, embedder):
    database = await Database.open(tmp_path)
    memory = MemoryStore(database, embedder, caching=lambda: False)
    await memory.add("ada", "hello")
    assert await texts(memory, "ada", "hello") == ["hello"]
    await memory.warm("ada")
    assert memory.stats()["segments"] == 0
    await database.close()


async def test_a_small_cache_holds_its_bound_and_answers_all(tmp_path, embedder):
    database = await Database.open(tmp_path)
    memory = MemoryStore(database, embedder, cache_bytes=100_000)
    for user in range(40):
        await memory.add_many(f"u{user}", [f"thing {i} of {user}" for i in range(20)])
    for user in range(40):
        assert len(await memory.recall(f"u{user}", "thing")) == 10
    assert 0 < memory.stats()["bytes"] <= 100_000
    assert memory.stats()["segments"] < 40
    await database.close()


OPERATION = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(["ada", "bob"]), st.sampled_from(["red apple", "pear", "a red dog"])),
    st.tuples(st.just("delete"), st.sampled_from(["ada", "bob"]), st.integers(1, 8)),
    st.tuples(st.just("forget"), st.sampled_from(["ada", "bob"]), st.none()),
    st.tuples(st.just("clear"), st.none(), st.none()),
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATION, max_size=25))
def test_memory_and_disk_agree_after_any_operations(tmp_path_factory, operations):
    async def run():
        model = {"ada": {}, "bob": {}}
        async with MemoryStore.open(tmp_path_factory.mktemp("m"), HashEmbedder()) as memory:
            for name, user, value in operations:
                if name == "add":
                    number = await memory.add(user, value, at=len(model[user]) * 900.0)
                    model[user][number] = value
                elif name == "delete":
                    assert await memory.delete(user, value) == (model[user].pop(value, None) is not None)
                elif name == "forget":
                    await memory.forget(user)
                    model[user].clear()
                else:
                    memory.clear_cache()
            for user, kept in model.items():
                resident = await memory.recall(user, "red", k=100)
                assert {found.id: found.text for found in resident} == kept
                memory.clear_cache()
                again = await memory.recall(user, "red", k=100)
                assert {m.id for m in again} == {m.id for m in resident}

    asyncio.run(run())


async def test_a_long_list_is_shown_like_a_short_one(memory):
    await memory.add("ada", "thing")
    await memory.add_many("ada", [f"thing {i}" for i in range(700)])
    assert len(await memory.recall("ada", "thing", k=1000)) == 701
