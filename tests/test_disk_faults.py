"""What the disk may do while the engine runs: nothing is acknowledged that is not stored, what can be read is read,
the state is said, and it goes on by itself."""

import asyncio
import ctypes
import itertools
import logging
import os
import shutil
import threading
from contextlib import contextmanager, suppress

import apsw
import pytest
from scripted import quick, said

from whisper_fast import Engine, Settings, errors
from whisper_fast.doctor import store
from whisper_fast.journal import Journal, encoded
from whisper_fast.lab.faulty_disk import METHODS, FaultyDisk, memory_folder
from whisper_fast.message import Message, Reply
from whisper_fast.store.backup import backup, restore
from whisper_fast.store.files import DATABASE
from whisper_fast.store.sqlite import Database


@pytest.fixture
def folder():
    with memory_folder() as folder:
        yield folder


@pytest.fixture
async def disk(folder):
    with FaultyDisk(seed=1) as disk:
        yield disk


@pytest.fixture
async def database(folder, disk):
    database = await Database.open(folder, vfs=disk.name)
    yield database
    disk.heal()
    await database.close()


def add(name):
    return lambda connection: connection.execute("INSERT INTO memory_counter VALUES (?, 1)", (name,)).get


def names(connection):
    return [row[0] for row in connection.execute("SELECT user FROM memory_counter ORDER BY user")]


async def well(database):
    """Wait until the probe has succeeded; it comes by itself."""
    while database.problem is not None:
        await asyncio.sleep(0.01)


CLASSES = [
    (apsw.SQLITE_FULL, errors.StoreFull),
    (apsw.SQLITE_IOERR_WRITE, errors.StoreIOError),
    (apsw.SQLITE_IOERR_CORRUPTFS, errors.StoreIOError),
    (apsw.SQLITE_READONLY, errors.StoreReadOnly),
    (apsw.SQLITE_READONLY_DBMOVED, errors.StoreMissing),
    (apsw.SQLITE_BUSY, errors.StoreLocked),
    (apsw.SQLITE_LOCKED, errors.StoreLocked),
    (apsw.SQLITE_PROTOCOL, errors.StoreLocked),
    (apsw.SQLITE_CORRUPT, errors.StoreCorrupt),
    (apsw.SQLITE_NOTADB, errors.StoreCorrupt),
    (apsw.SQLITE_CANTOPEN, errors.StoreReadOnly),
    (apsw.SQLITE_NOMEM, errors.StoreNoMemory),
    (apsw.SQLITE_IOERR_NOMEM, errors.StoreNoMemory),
]


@pytest.mark.parametrize(("code", "kind"), CLASSES)
async def test_every_class_of_error(database, disk, caplog, code, kind):
    caplog.set_level(logging.WARNING)
    await database.write(add("before"))
    disk.fail("xWrite", code=code, times=None)
    for _ in range(5):
        with pytest.raises(kind) as raised:
            await database.write(add("lost"))
        assert str(database.path) in str(raised.value)
    assert isinstance(database.problem, kind)
    assert await database.read(names) == ["before"]
    disk.heal()
    await well(database)
    await database.write(add("later"))
    assert await database.read(names) == ["before", "later"]
    said = [record.message for record in caplog.records if record.name == "whisper_fast.store.health"]
    assert len(said) == 2, said


@pytest.mark.parametrize("method", METHODS)
async def test_every_call_of_every_method_may_fail(folder, method):
    """One run of the three steps of a message for each call that it makes: the first fails, then the second..."""
    with FaultyDisk() as disk:
        await run_of_messages(folder / "whole", disk, ())
        calls = disk.calls[method]
    for nth in range(1, calls + 1):
        with FaultyDisk(seed=nth) as disk:
            disk.fail(method, nth=nth)
            acknowledged = []
            try:
                await run_of_messages(folder / f"{nth}", disk, acknowledged)
            except errors.StoreError:
                disk.heal()
            await check(folder / f"{nth}", acknowledged)


async def run_of_messages(folder, disk, acknowledged):
    """Accept, answer and complete messages, each again until it is stored; note what was acknowledged."""
    database = await Database.open(folder, vfs=disk.name)
    try:
        journal = Journal(database)
        for n in range(3):
            message = Message(user=f"u{n}", text="hello " * 300, id=f"{n}", channel="c")
            entry = await insisted(lambda message=message: journal.accept(message, encoded(message)))
            note(acknowledged, "accepted", n)
            reply = Reply(id=f"{n}", user=f"u{n}", text=f"reply {n}")
            await insisted(lambda entry=entry, reply=reply: journal.record(entry, reply))
            note(acknowledged, "answered", n)
            await insisted(lambda entry=entry: journal.complete(entry, sent=lambda: True))
            await database.read(lambda c: c.execute("SELECT count(*) FROM journal").get)
            await database.write(lambda c: c.execute("PRAGMA user_version").get)
    finally:
        await database.close()


def note(acknowledged, *what):
    if isinstance(acknowledged, list):
        acknowledged.append(what)


async def insisted(step):
    for _ in range(500):
        try:
            return await step()
        except errors.StoreError as error:
            if "not in the journal any more" in str(error):
                return None  # the step before failed after it had reached the disk
            await asyncio.sleep(0.005)
    raise AssertionError("it never got well")


async def check(folder, acknowledged):
    if not (folder / DATABASE).exists():
        assert not acknowledged
        return
    database = await Database.open(folder)
    found = await database.read(lambda c: dict(c.execute("SELECT message_id, reply FROM journal")))
    sound = await database.read(lambda c: c.pragma("integrity_check"))
    await database.close()
    assert sound == "ok"
    for step, n in acknowledged:
        assert str(n) in found
        assert step == "accepted" or f"reply {n}".encode() in found[str(n)]


async def test_a_failed_sync_is_never_acknowledged_and_its_group_cannot_hurt_the_next(folder):
    for seed in range(30):
        with FaultyDisk(seed=seed) as disk:
            place = folder / f"{seed}"
            database = await Database.open(place, vfs=disk.name)
            stored = []
            disk.fail("xSync", nth=3 + seed % 5, suffix="-wal")
            for n in range(12):
                try:
                    await database.write(add(f"{n:02}"))
                    stored.append(f"{n:02}")
                except errors.StoreError:
                    await well(database)
            disk.cut_power(after=0)
            await database.close()
            disk.power_on()
            database = await Database.open(place, vfs=disk.name)
            assert set(stored) <= set(await database.read(names))
            await database.close()


async def test_a_checkpoint_that_fails_is_said_and_loses_nothing(database, disk, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.checkpoints.PAGES", 40)
    await database.write(lambda connection: None)
    disk.fail("xWrite", suffix=".db", times=None)
    stored = []
    with pytest.raises(errors.StoreIOError):  # the thread fails; the group after that is told
        await endless(database, stored)
    assert await database.read(names) == stored
    disk.heal()
    await well(database)
    await database.write(add("x later"))
    assert await database.read(names) == [*stored, "x later"]


async def endless(database, stored):
    for n in itertools.count():
        await database.write(add(f"{n:05} {'x' * 2000}"))
        stored.append(f"{n:05} {'x' * 2000}")


async def test_the_log_begins_anew_under_load(database, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.checkpoints.PAGES", 40)
    for n in range(600):
        await database.write(add(f"{n:05} {'x' * 2000}"))
    assert os.path.getsize(f"{database.path}-wal") < 600 * 4096


async def test_another_process_holds_the_file(database, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.writer.PROBE_PATIENCE", 1)
    await database.write(lambda connection: connection.set_busy_timeout(1))
    other = apsw.Connection(str(database.path))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(errors.StoreLocked):
        await database.write(add("waiting"))
    assert await database.read(names) == []
    other.execute("COMMIT")
    other.close()
    await well(database)
    await database.write(add("after"))


async def test_the_folder_is_deleted_while_running(database, folder, disk):
    changed = asyncio.Event()
    database.on_foreign_change(changed.set)
    await database.write(add("before"))
    shutil.copytree(folder, folder.parent / f"{folder.name}-kept")
    for path in folder.iterdir():
        path.unlink()
    try:
        for _ in range(3):
            with pytest.raises(errors.StoreMissing):
                await database.write(add("lost"))
        assert await database.read(names) == ["before"] or database.problem is not None
        assert not (folder / DATABASE).exists()  # no empty one is made in its place
    finally:
        shutil.copytree(folder.parent / f"{folder.name}-kept", folder, dirs_exist_ok=True)
        shutil.rmtree(folder.parent / f"{folder.name}-kept")
    await well(database)
    await database.write(add("after"))
    await changed.wait()
    assert await database.read(names) == ["after", "before"]


async def test_the_engine_says_that_it_is_not_ready_and_goes_on(tmp_path):
    async with Engine.open(Settings(data_dir=tmp_path), llm=quick()) as engine:
        await engine.respond(said("ada", "before"))
        assert [memory["text"] async for memory in engine.export("ada")] == ["before"]
        (tmp_path / DATABASE).rename(tmp_path / "away")
        with pytest.raises(errors.StoreMissing):
            await engine.respond(said("ada", "meanwhile"))
        state = engine.ready()
        assert not state["ready"]
        assert "put it back" in state["store"]
        assert (await engine.memory.recall("ada", "before"))[0].text == "before"
        (tmp_path / "away").rename(tmp_path / DATABASE)
        await well(engine._database)
        assert engine.ready() == {"ready": True, "store": "ok"}
        assert (await engine.respond(said("ada", "after"))).text
    assert {message for message, _ in remembered(tmp_path)} >= {"before", "after"}


def remembered(folder):
    connection = apsw.Connection(str(folder / DATABASE))
    rows = list(connection.execute("SELECT text, reply FROM conversation"))
    connection.close()
    return rows


async def test_doctor_names_a_damaged_database(folder):
    problems = []
    assert "none yet" in store(folder, problems)
    await (await Database.open(folder)).close()
    assert (store(folder, problems), problems) == ("ok", [])
    await (await damaged(folder)).close()
    assert store(folder, problems) == "StoreCorrupt"
    assert "whisper-fast restore" in problems.pop()
    (folder / DATABASE).write_bytes(b"not a database" * 500)
    assert store(folder, problems) == "StoreCorrupt"


class SystemCalls(apsw.VFS):
    """The system calls of SQLite's own VFS, to be replaced; what it maps (the `-shm` file) no Python VFS sees."""

    def __init__(self):
        super().__init__("system-calls", "unix")


@contextmanager
def without_mmap():
    """Let every mmap of SQLite's fail, as where a process may map no more."""
    fails = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: -1 % (1 << 64))  # MAP_FAILED, whatever it is asked
    calls = SystemCalls()
    calls.xSetSystemCall("mmap", ctypes.cast(fails, ctypes.c_void_p).value)
    try:
        yield
    finally:
        calls.xSetSystemCall("mmap", 0)
        calls.unregister()


async def test_shared_memory_that_cannot_be_had(folder, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.checkpoints.PAGES", 1 << 30)
    with without_mmap(), pytest.raises(errors.StoreIOError):
        await Database.open(folder)
    database = await Database.open(folder)
    await database.write(lambda connection: None)
    wanted = [f"{n:05} {'x' * 9000}" for n in range(3000)]  # a log so long that its index needs another piece
    with without_mmap():
        told = await asyncio.gather(*(database.write(add(name)) for name in wanted), return_exceptions=True)
    assert {type(result) for result in told} == {type(None), errors.StoreIOError}
    await well(database)
    stored = [name for name, result in zip(wanted, told, strict=True) if result is None]
    assert await database.read(names) == stored
    await database.write(add("later"))
    await database.close()


async def test_a_deleted_log_is_noticed_before_anything_is_acknowledged(database):
    await database.write(add("before"))
    os.unlink(f"{database.path}-wal")
    with pytest.raises(errors.StoreMissing):
        await database.write(add("lost"))
    await well(database)
    await database.write(add("after"))
    assert {"before", "after"} <= set(await database.read(names))


async def damaged(folder):
    """A database with a backup of it and a page of zeros in the middle; what can be read still is."""
    database = await Database.open(folder)
    await asyncio.gather(*(database.write(add(f"{n:04} {'x' * 500}")) for n in range(400)))
    await database.close()
    backup(folder, folder / "sound.db")
    content = bytearray((folder / DATABASE).read_bytes())
    at = content.index(b"0399 xxx") // 4096 * 4096
    content[at : at + 4096] = bytes(4096)
    (folder / DATABASE).write_bytes(content)
    return await Database.open(folder)


async def test_a_damaged_page_stops_writing_until_a_backup_is_restored(folder, monkeypatch):
    monkeypatch.setattr("whisper_fast.store.health.CHECK_FIRST", 0.01)
    database = await damaged(folder)
    try:
        for _ in range(2):
            with pytest.raises(errors.StoreCorrupt, match="restore"):
                await database.write(lambda c: c.execute("DELETE FROM memory_counter").get)
        first = await database.read(lambda c: c.execute("SELECT user FROM memory_counter LIMIT 1").get)
        assert first.startswith("0000")
        await asyncio.to_thread(restore, folder, folder / "sound.db")
        await well(database)
        assert len(await database.read(names)) == 400
        await database.write(add("later"))
    finally:
        await database.close()


async def test_a_damaged_page_that_is_only_read_stops_nobody_and_is_said(folder, caplog):
    database = await damaged(folder)
    try:
        for _ in range(3):
            with pytest.raises(errors.StoreCorrupt):
                await database.read(names)
        assert isinstance(database.damage, errors.StoreCorrupt)
        await database.write(lambda c: c.execute("INSERT INTO embedder VALUES (1, 'e', 2)").get)
        assert caplog.text.count("cannot be read") == 1
        await asyncio.to_thread(restore, folder, folder / "sound.db")
        await database.write(add("later"))
        assert database.damage is None
    finally:
        await database.close()


async def test_a_reader_outlives_what_the_disk_does(database, disk):
    await database.write(add("before"))
    for _ in range(4):
        disk.fail("xRead")
        disk.fail("xOpen")
        with suppress(errors.StoreError):
            await database.read(names)
    disk.heal()
    assert await database.read(names) == ["before"]


@pytest.mark.parametrize("wrong", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError])
async def test_the_writer_outlives_whatever_a_job_raises(database, wrong):
    def job(connection):
        add("ghost")(connection)
        raise wrong

    with pytest.raises((errors.StoreError, RecursionError)):
        await database.write(job)
    await well(database)
    await database.write(add("kept"))
    assert await database.read(names) == ["kept"]


async def test_the_writer_outlives_its_own_faults(database, monkeypatch):
    def broken(self, group):
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr("whisper_fast.store.writer.Writer._write", broken)
        with pytest.raises(errors.StoreError, match="a fault of ours"):
            await database.write(add("first"))
    await well(database)
    await database.write(add("second"))
    assert await database.read(names) == ["second"]


async def test_a_writer_that_ends_leaves_nobody_waiting(database, monkeypatch):
    def broken(self, *_):
        raise SystemExit

    monkeypatch.setattr("whisper_fast.store.writer.Writer._write", broken)
    jobs = [asyncio.ensure_future(database.write(add(f"{n}"))) for n in range(100)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(result, errors.StoreError) for result in results)
    monkeypatch.undo()
    with pytest.raises(errors.StoreError, match="restart"):
        await database.write(add("late"))
    assert "restart" in str(database.problem)
    assert await database.read(names) == []


async def test_no_memory_for_sqlite(database):
    await database.write(add("before"))
    soft, hard = apsw.soft_heap_limit(-1), apsw.hard_heap_limit(apsw.memory_used() + 1)
    try:
        with pytest.raises(errors.StoreNoMemory):
            await database.write(lambda c: c.execute("SELECT zeroblob(50000000) || zeroblob(50000000)").get)
    finally:
        apsw.hard_heap_limit(hard)
        apsw.soft_heap_limit(soft)  # lowered with the hard one
    await well(database)
    await database.write(add("after"))
    assert await database.read(names) == ["after", "before"]


async def test_jobs_that_wait_while_the_disk_is_gone_are_all_told(database, disk):
    disk.fail("xSync", times=None)
    jobs = [asyncio.ensure_future(database.write(add(f"{n}"))) for n in range(500)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(result, errors.StoreError) for result in results)
    assert len({id(result) for result in results}) == 500  # each raises its own


def test_a_loop_that_is_closed_first_leaves_no_thread_waiting(folder):
    async def leave():
        database = await Database.open(folder)
        gate = threading.Event()
        database.submit(lambda connection: gate.wait(10))
        return database, gate

    loop = asyncio.new_event_loop()
    database, gate = loop.run_until_complete(leave())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.set()
    database._shut()
