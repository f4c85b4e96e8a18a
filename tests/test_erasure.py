"""What is forgotten is gone: after a compaction no file holds a byte of it, and all else is as it was."""

import asyncio
from contextlib import suppress
from random import Random

import apsw
import pytest
from scripted import ScriptedLLM, quick, said

from whisper_fast import Engine, Settings, errors
from whisper_fast.lab.faulty_disk import FaultyDisk, memory_folder
from whisper_fast.memory import MemoryStore
from whisper_fast.store.files import DATABASE
from whisper_fast.store.schema import USER_TABLES, forget_user
from whisper_fast.store.scrub import unused
from whisper_fast.store.sqlite import Database

SECRET, REPLY, PLAIN = b"zebraquux", b"okapiwock", b"harmless"


@pytest.fixture
def folder():
    with memory_folder() as folder:
        yield folder


def traces(folder, words=(SECRET, REPLY)):
    """How often each file below a folder holds the words."""
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    counts = {path.name: sum(content.count(word) for word in words) for path, content in found.items()}
    return {name: count for name, count in counts.items() if count}


def fill(connection, users=12, rows=40, seed=1):
    """Rows of many users in all tables, short ones and ones that go over many pages, in random order."""
    random = Random(seed)
    order = [(user, n) for user in range(users) for n in range(rows)]
    random.shuffle(order)
    for user, n in order:
        word = (SECRET if user % 3 == 0 else PLAIN).decode()
        text = f"{word} {n} " * random.choice((1, 8, 60, 1500))
        name = f"u{user}"
        sql = "INSERT INTO journal (platform, channel, user, message_id, accepted_at, message) VALUES (?,?,?,?,?,?)"
        connection.execute(sql, ("p", "c", name, f"{n}", 0.0, text.encode()))
        connection.execute(
            "INSERT INTO conversation VALUES (?,?,?,?,?,?,?,?)", (name, "p", "c", "dm", n, 0.0, text, "")
        )
        sql = "INSERT INTO memory (user, id, scope, text, at, embedder, vector, scale) VALUES (?,?,?,?,?,?,?,?)"
        connection.execute(sql, (name, n, "dm", text, 0.0, 1, bytes(64), 1.0))
    for user, n in order[::3]:  # a reply makes a row longer: cells move
        text = f"{'x' if user % 3 else SECRET.decode()} " * 50
        sql = "UPDATE journal SET reply = ? WHERE user = ? AND message_id = ?"
        connection.execute(sql, (text.encode(), f"u{user}", f"{n}"))


def content(connection):
    return {table: list(connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2")) for table in USER_TABLES}


def forget_the_third(connection):
    for user in range(0, 12, 3):
        forget_user(connection, f"u{user}")


async def test_what_the_engine_forgets_leaves_no_trace(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2)

    def reply(messages):
        return f"{REPLY.decode()} you said {messages[-1]['content']} " * 3

    async with Engine.open(settings, llm=ScriptedLLM(reply)) as engine:
        for n in range(6):
            await engine.respond(said("ada", f"{SECRET.decode()} {n} " * (1, 30, 600)[n % 3]))
            await engine.memory.add("ada", f"{SECRET.decode()} memory {n} " * (1, 400)[n % 2])
            await engine.respond(said("bob", f"{PLAIN.decode()} {n}"))
        assert traces(settings.data_dir)
        await engine.forget("ada")
        await engine._database.compact()
        await engine.backup(tmp_path / "data" / "after.db")
        assert [memory async for memory in engine.export("bob")]
    assert set(traces(settings.data_dir)) <= {DATABASE, "after.db"}  # what the bot said to bob
    assert not traces(settings.data_dir, (SECRET,))


async def test_a_compaction_changes_nothing_that_is_there(folder):
    database = await Database.open(folder)
    await database.write(fill)
    await database.write(forget_the_third)
    before = await database.read(content)
    await database.compact()
    assert not traces(folder)
    assert traces(folder, (PLAIN,))
    assert await database.read(content) == before
    assert await database.write(lambda c: c.pragma("integrity_check")) == "ok"
    await database.close()


async def test_it_waits_for_a_checkpoint_that_runs_and_for_no_message(folder, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.checkpoints.PAGES", 1)  # one begins with each group
    database = await Database.open(folder)
    await database.write(fill)
    await database.write(forget_the_third)
    async with asyncio.timeout(30):
        await database.compact()
    assert not traces(folder)
    await database.close()


async def test_secure_delete_alone_would_leave_traces(folder, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.compaction.scrub", lambda *_: 0)
    database = await Database.open(folder)
    await database.write(fill)
    await database.write(forget_the_third)
    await database.compact()
    assert traces(folder)
    await database.close()


async def test_writers_go_on_during_a_compaction(folder, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.compaction.SLICE", 20)
    monkeypatch.setattr("whisper_fast.store.compaction.BUSY_PAUSE", 0.0)
    database = await Database.open(folder)
    await database.write(fill)
    await database.write(forget_the_third)

    def more(n):
        sql = "INSERT INTO journal (platform, channel, user, message_id, accepted_at, message) VALUES (?,?,?,?,?,?)"
        row = ("p", "c", f"new{n % 7}", f"{n}", 0.0, PLAIN * 200)
        return lambda connection: connection.execute(sql, row).get

    compacting = asyncio.ensure_future(database.compact())
    for n in range(200):
        await database.write(more(n))
    await compacting
    assert not traces(folder)
    assert await database.write(lambda c: c.pragma("integrity_check")) == "ok"
    assert await database.read(lambda c: c.execute("SELECT count(*) FROM journal WHERE user GLOB 'new*'").get) == 200
    await database.close()


async def test_what_was_cut_short_goes_on_with_the_next_start(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("whisper_fast.store.compaction.Compaction.step", lambda *_: None)
        patch.setattr("whisper_fast.store.compaction.AT_THE_END", 0.0)
        patch.setattr("whisper_fast.store.compaction.Compaction.wait", lambda *_, **__: None)
        database = await Database.open(folder)
        await database.write(fill)
        await database.write(forget_the_third)
        await database.close()
    assert traces(folder)
    await (await Database.open(folder)).close()
    assert not traces(folder)


async def test_a_reader_that_holds_the_log_is_waited_for(folder, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.compaction.RETRY", 0.01)
    database = await Database.open(folder)
    await database.write(fill)
    other = apsw.Connection(str(folder / DATABASE))
    other.execute("BEGIN")
    assert other.execute("SELECT count(*) FROM journal").get
    await database.write(forget_the_third)
    compacting = asyncio.ensure_future(database.compact())
    await database.write(lambda c: c.execute("SELECT 1").get)
    assert not compacting.done()
    other.execute("COMMIT")
    await compacting
    assert not traces(folder)
    other.close()
    await database.close()


@pytest.mark.parametrize("seed", range(5))
async def test_a_power_cut_in_the_middle_of_a_compaction(folder, seed, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.compaction.SLICE", 50)
    with FaultyDisk(seed=seed) as disk:
        database = await Database.open(folder, vfs=disk.name)
        await database.write(fill)
        await database.write(forget_the_third)
        before = await database.read(content)
        disk.cut_power(after=Random(seed).randrange(1, 400))
        compacting = asyncio.ensure_future(database.compact())
        while not disk.dead and not compacting.done():
            await asyncio.sleep(0)
        disk.cut_power(after=0)
        await database.close()
        with suppress(errors.StoreError, errors.Closed):
            await compacting
        disk.power_on()
        database = await Database.open(folder, vfs=disk.name)
        assert await database.read(lambda c: c.pragma("integrity_check")) == "ok"
        assert await database.read(content) == before
        await database.compact()
        await database.close()
    assert not traces(folder)


def test_a_page_of_anything_is_never_left():
    random = Random(5)
    for _ in range(20_000):
        page = bytearray(random.randbytes(64)) + bytearray(448)
        page[0] = random.choice((2, 5, 10, 13, 0, 7))
        for first, last in unused(bytes(page), 0):
            assert 8 <= first <= last <= len(page)


async def test_the_caller_waits_for_the_rows_alone(tmp_path):
    async with Engine.open(Settings(data_dir=tmp_path), llm=quick()) as engine:
        await engine.memory.add_many("ada", [f"{SECRET.decode()} {n}" for n in range(500)])
        await engine.forget("ada")
        assert [memory async for memory in engine.export("ada")] == []
        assert await engine.memory.recall("ada", SECRET.decode()) == []


async def test_everyone_is_forgotten_by_another_function(tmp_path):
    async with Engine.open(Settings(data_dir=tmp_path), llm=quick()) as engine:
        for user in ("ada", "bob"):
            await engine.respond(said(user, SECRET.decode()))
        for nobody in ("", "*", "%", None):
            with suppress(errors.InvalidMessage):
                await engine.forget(nobody)
        assert [memory["text"] async for memory in engine.export("ada")] == [SECRET.decode()]
        await engine.forget_everyone()
        for user in ("ada", "bob"):
            assert [memory async for memory in engine.export(user)] == []
        await engine._database.compact()
    assert not traces(tmp_path)


async def test_a_store_forgets_everyone_by_another_function(tmp_path):
    async with MemoryStore.open(tmp_path) as memory:
        for user in ("ada", "bob"):
            await memory.add(user, SECRET.decode())
        await memory.forget_everyone()
        assert [await memory.recall(user, "zebra") for user in ("ada", "bob")] == [[], []]
    assert not traces(tmp_path)


async def test_beside_an_engine_the_wish_is_noted_and_the_engine_does_it(folder):
    database = await Database.open(folder)
    await database.write(fill)
    beside = await Database.open(folder, exclusive=False)
    await beside.write(forget_the_third)
    await beside.compact()
    await beside.close()
    await database.compact()
    assert not traces(folder)
    await database.close()
