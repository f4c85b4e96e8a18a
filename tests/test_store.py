"""The truth on disk: durable, grouped, private, migrated after a backup, and honest when the disk fails."""

import asyncio
import os
import subprocess
import sys
import threading
from functools import partial

import apsw
import pytest

from whisper_fast.errors import (
    Closed,
    SchemaTooNew,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    StoreReadOnly,
)
from whisper_fast.store import checkpoints, schema
from whisper_fast.store.backup import backup, restore
from whisper_fast.store.files import DATABASE
from whisper_fast.store.opened import Opened
from whisper_fast.store.readers import Readers
from whisper_fast.store.sqlite import Database


def add(name):
    def job(connection):
        connection.execute("INSERT INTO memory_counter VALUES (?, 1)", (name,))
        return name

    return job


def names(connection):
    return [row[0] for row in connection.execute("SELECT user FROM memory_counter ORDER BY user")]


@pytest.fixture
async def database(tmp_path):
    database = await Database.open(tmp_path / "data")
    yield database
    await database.close()


async def test_writes_are_grouped_and_readable(database):
    blocked = threading.Event()
    first = asyncio.ensure_future(database.write(lambda connection: blocked.wait(10)))
    rest = [asyncio.ensure_future(database.write(add(f"user {n}"))) for n in range(100)]
    await asyncio.sleep(0)
    blocked.set()
    assert await asyncio.gather(first, *rest) == [True, *(f"user {n}" for n in range(100))]
    assert database.commits <= 2
    assert len(await database.read(names)) == 100


async def test_the_settings_that_durability_rests_on(database):
    found = await database.write(
        lambda c: (c.pragma("journal_mode"), c.pragma("synchronous"), c.pragma("secure_delete"))
    )
    assert found == ("wal", 2, 1)
    assert os.stat(database.path).st_mode & 0o777 == 0o600
    assert os.stat(database.folder).st_mode & 0o777 == 0o700


async def test_a_job_that_raises_is_undone_alone(database):
    def bad(connection):
        add("ghost")(connection)
        raise KeyError("mine")

    def broken(connection):
        connection.execute("INSERT INTO nowhere VALUES (1)")

    good, failed, sql = await asyncio.gather(
        database.write(add("good")), database.write(bad), database.write(broken), return_exceptions=True
    )
    assert good == "good"
    assert isinstance(failed, KeyError)
    assert isinstance(sql, StoreError)
    assert await database.read(names) == ["good"]


async def test_a_cancelled_waiter_does_not_undo_its_write(database):
    task = asyncio.ensure_future(database.write(add("kept")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await database.write(add("later"))
    assert await database.read(names) == ["kept", "later"]


async def test_a_second_engine_is_told_who_holds_the_folder(database):
    with pytest.raises(StoreLocked, match=str(os.getpid())):
        await Database.open(database.folder)


async def test_closed_is_closed(tmp_path):
    database = await Database.open(tmp_path)
    pending = [asyncio.ensure_future(database.write(add(f"{n}"))) for n in range(10)]
    await asyncio.sleep(0)
    await database.close()
    await database.close()
    assert len(await asyncio.gather(*pending)) == 10
    with pytest.raises(Closed):
        await database.write(add("late"))
    with pytest.raises(Closed):
        await database.read(names)


async def test_a_newer_schema_is_refused_untouched(tmp_path):
    await (await Database.open(tmp_path)).close()
    with apsw.Connection(str(tmp_path / DATABASE)) as connection:
        connection.pragma("user_version", schema.VERSION + 1)
    connection.close()
    with pytest.raises(SchemaTooNew):
        await Database.open(tmp_path)


async def test_somebody_elses_database_is_refused(tmp_path):
    connection = apsw.Connection(str(tmp_path / DATABASE))
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(StoreCorrupt):
        await Database.open(tmp_path)


async def test_random_bytes_are_refused(tmp_path):
    (tmp_path / DATABASE).write_bytes(os.urandom(8192))
    with pytest.raises(StoreCorrupt, match="restore"):
        await Database.open(tmp_path)


async def test_a_damaged_page_is_an_error_and_the_rest_is_read(database, tmp_path):
    await asyncio.gather(*(database.write(add(f"{n:04} {'x' * 500}")) for n in range(400)))
    backup(database.folder, tmp_path / "b.db")
    folder = tmp_path / "damaged"
    folder.mkdir()
    content = bytearray((tmp_path / "b.db").read_bytes())
    content[-8192:] = b"\xff" * 8192
    (folder / DATABASE).write_bytes(content)
    damaged = await Database.open(folder)
    try:
        with pytest.raises(StoreCorrupt):
            await damaged.read(names)
    finally:
        await damaged.close()
    with pytest.raises(StoreCorrupt):
        restore(tmp_path / "elsewhere", folder / DATABASE)
    await asyncio.to_thread(restore, folder, tmp_path / "b.db")  # as the error advises
    mended = await Database.open(folder)
    assert len(await mended.read(names)) == 400
    await mended.close()
    (kept,) = (folder / "backups").iterdir()
    assert (kept / DATABASE).read_bytes()[-8192:] == b"\xff" * 8192


async def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreReadOnly):
        await Database.open(tmp_path / "file" / "data")


async def test_migration_keeps_a_verified_backup(tmp_path, monkeypatch):
    database = await Database.open(tmp_path)
    await database.write(add("old"))
    await database.close()
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE newer (x)"))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    database = await Database.open(tmp_path)
    assert await database.read(lambda c: c.execute("SELECT count(*) FROM newer").get) == 0
    await database.close()
    (kept,) = (tmp_path / "backups").iterdir()
    connection = apsw.Connection(str(kept))
    assert names(connection) == ["old"]
    connection.close()


async def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    await (await Database.open(tmp_path)).close()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE newer (x); CREATE GARBAGE"))
        patch.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(StoreError):
            await Database.open(tmp_path)
    database = await Database.open(tmp_path)
    assert (
        await database.read(lambda c: c.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'newer'").get) == 0
    )
    await database.close()


async def test_backup_and_restore_beside_a_running_engine(database, tmp_path):
    changed = asyncio.Event()
    database.on_foreign_change(changed.set)
    await database.write(add("before"))
    made = await asyncio.to_thread(backup, database.folder, tmp_path / "copy" / "b.db")
    assert made["rows"]["memory_counter"] == 1
    assert os.stat(tmp_path / "copy" / "b.db").st_mode & 0o777 == 0o600
    await database.write(add("after"))
    await asyncio.to_thread(restore, database.folder, tmp_path / "copy" / "b.db")
    assert await database.read(names) == ["before"]
    assert not changed.is_set()
    await database.write(add("next"))
    assert changed.is_set()
    assert await database.read(names) == ["before", "next"]
    assert len(list((database.folder / "backups").iterdir())) == 1


async def test_backup_of_nothing_is_an_error(tmp_path):
    with pytest.raises(StoreError):
        backup(tmp_path, tmp_path / "b.db")
    with pytest.raises(StoreError):
        restore(tmp_path, tmp_path / "b.db")


WRITER = """
import asyncio, pathlib, sys
from whisper_fast.store.opened import Opened
from whisper_fast.store.readers import Readers
from whisper_fast.store.sqlite import Database
async def main():
    database = await Database.open(pathlib.Path(sys.argv[1]))
    async def one(n):
        await database.write(lambda c: c.execute("INSERT INTO memory_counter VALUES (?, 1)", (f"{n:06}",)))
        print(n, flush=True)
    for n in range(0, 1_000_000, 20):
        await asyncio.gather(*(one(n + m) for m in range(20)))
asyncio.run(main())
"""


async def test_what_was_acknowledged_survives_kill_9(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    acknowledged = [int(child.stdout.readline()) for _ in range(500)]
    child.kill()
    acknowledged += [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    child.stdout.close()
    child.wait()
    database = await Database.open(tmp_path)
    stored = {int(name) for name in await database.read(names)}
    await database.close()
    assert set(acknowledged) <= stored


def test_connections_that_are_let_go_by_two_at_once(tmp_path):
    """The writer does to open the database anew, and so does a close: neither may wait for the other for ever."""
    Opened.make(tmp_path / DATABASE, exclusive=False, vfs=None).close()
    readers = Readers(tmp_path / DATABASE, None, lambda _: None)

    def let_go():
        for _ in range(200):
            with readers.let_go():
                pass

    letting = [threading.Thread(target=let_go, daemon=True) for _ in range(2)]
    for one in letting:
        one.start()
    assert [readers.read(lambda connection: connection.execute("SELECT 1").get) for _ in range(50)] == [1] * 50
    readers.close()
    for one in letting:
        one.join(timeout=30)
    assert not any(one.is_alive() for one in letting)


async def test_readers_that_follow_each_other_do_not_let_the_log_grow(tmp_path, monkeypatch):
    for name, pages in (("PAGES", 20), ("SHORT", 2), ("LONGEST", 100)):
        monkeypatch.setattr(checkpoints, name, pages)
    database = await Database.open(tmp_path)
    await database.write(lambda connection: connection.execute("CREATE TABLE grown (room)"))
    over, begun, sizes = threading.Event(), [threading.Event(), threading.Event()], []

    def read(connection, mine, other):
        """Read until the other one has begun to."""
        with connection:
            connection.execute("SELECT count(*) FROM grown").get  # noqa: B018 - begins to read
            begun[other].clear()
            begun[mine].set()
            begun[other].wait(0.05)

    async def reads(mine):
        while not over.is_set():
            await database.read(partial(read, mine=mine, other=1 - mine))

    async with asyncio.TaskGroup() as group:
        for mine in range(2):
            group.create_task(reads(mine))
        for _ in range(600):
            await database.write(lambda connection: connection.execute("INSERT INTO grown VALUES (zeroblob(9000))"))
            sizes.append((tmp_path / f"{DATABASE}-wal").stat().st_size)
        over.set()
    await database.close()
    assert max(sizes) < 2 * 100 * 4096
