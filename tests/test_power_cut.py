"""Power cuts at any moment: nothing accepted is lost, nothing is answered twice, the database always opens."""

from collections import Counter
from contextlib import closing, suppress

import pytest

from whisper_fast import journal
from whisper_fast.errors import StoreError
from whisper_fast.lab.faulty_disk import FaultyDisk, memory_folder
from whisper_fast.lab.power_cut import cuts, record
from whisper_fast.store.files import DATABASE, connect
from whisper_fast.store.sqlite import Database

INSERT = "INSERT INTO kept VALUES (?, zeroblob(3000))"


async def total(count, seed, monkeypatch, messages=240):
    monkeypatch.setattr("whisper_fast.store.checkpoints.PAGES", 40)  # a short run has many checkpoints
    monkeypatch.setattr("whisper_fast.store.checkpoints.SHORT", 20)
    with memory_folder() as folder:
        events = await record(folder, messages=messages, processes=3, seed=seed)
    kinds = Counter(event.kind for event in events)
    assert kinds["note"] > messages / 2
    assert kinds["failed sync"]
    found = Counter()
    for cost in cuts(events, count, seed=seed):
        found.update(cost)
    return found


async def test_a_few_hundred_cuts(monkeypatch):
    assert await total(300, 1, monkeypatch) == {"lost": 0, "twice": 0, "damaged": 0}


@pytest.mark.soak
async def test_ten_thousand_cuts(monkeypatch):
    found = Counter()
    for seed in range(20):
        found.update(await total(500, seed, monkeypatch))
    assert found == {"lost": 0, "twice": 0, "damaged": 0}


@pytest.mark.parametrize("way", ["synchronous", "settling"])
async def test_the_cuts_find_what_they_look_for(monkeypatch, way):
    """Without the sync of each commit, or without that of the log at the start, messages are lost."""
    if way == "synchronous":
        from whisper_fast.store import opened

        real = opened.connect

        def careless(*args, **kwargs):
            connection = real(*args, **kwargs)
            connection.pragma("synchronous", "normal")
            return connection

        monkeypatch.setattr(opened, "connect", careless)
    else:
        monkeypatch.setattr("whisper_fast.store.opened.settle_log", lambda *_: None)
        monkeypatch.setattr("whisper_fast.lab.power_cut.die", with_a_sync)
    found = Counter()
    for seed in range(40):  # how the writes fall is the machine's: about every second seed finds it
        found.update(await total(80, seed, monkeypatch))
        if found["lost"] + found["damaged"]:
            return
    raise AssertionError(f"3,200 power cuts and nothing lost: {found}")


async def test_a_turn_that_is_led_twice_is_found(monkeypatch):
    """A journal that does not know what was delivered before: each cut after a second answer counts it."""
    insert = journal.insert

    def always_new(connection, message, body, age):
        entry = insert(connection, message, body, age)
        connection.execute("UPDATE journal SET channel = 'n' || id WHERE id = ?", (entry.id,))
        return entry

    monkeypatch.setattr(journal, "insert", always_new)
    found = await total(20, 1, monkeypatch)
    assert found["twice"] > 0


def with_a_sync(disk, random, messages):
    """The death that leaves commits which can be read and are not on the disk."""
    disk.fail("xSync", nth=random.randrange(messages // 8, messages // 4), suffix="-wal", fatal=True)


@pytest.mark.parametrize("closing_it", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_a_checkpoint_that_fails_undoes_none_before_it(monkeypatch, seed, closing_it):
    """Pages of a round that did not end the log are synced with a later one, and lost where that sync fails."""
    monkeypatch.setattr("whisper_fast.store.checkpoints.PAGES", 40)
    with memory_folder() as folder, FaultyDisk(seed=seed, record=True) as disk:
        database = await Database.open(folder, vfs=disk.name)
        await database.write(lambda connection: connection.execute("CREATE TABLE kept (row INTEGER, room BLOB)"))
        await fill(database, range(5))
        part_of_a_checkpoint(database, disk)
        disk.fail("xSync", suffix=DATABASE)
        rows = 5
        if closing_it:
            await database.close()
            assert after_the_failed_sync(disk)
            database = await Database.open(folder, vfs=disk.name)
        while "sync" not in after_the_failed_sync(disk):
            with suppress(StoreError):
                await fill(database, range(rows, rows + 1))
                rows += 1
        await fill(database, range(rows, rows + 5))  # in a log that has begun anew
        disk.cut_power(after=0)
        await database.close()
        disk.power_on()
        with closing(connect(folder / DATABASE)) as left:
            assert left.pragma("integrity_check") == "ok"
            assert [row for (row,) in left.execute("SELECT row FROM kept")] == list(range(rows + 5))


async def fill(database, rows):
    for row in rows:
        await database.write(lambda connection, row=row: connection.execute(INSERT, (row,)))


def part_of_a_checkpoint(database, disk):
    """Bring the log into the database but for its last group, as while a reader is at the one before."""
    with closing(connect(database.path, vfs=disk.name)) as connection, closing(connect(database.path)) as reader:
        with reader:
            reader.execute("SELECT count(*) FROM kept").get  # noqa: B018 - begins the reading
            connection.execute("UPDATE kept SET room = zeroblob(3001) WHERE row = 0")
            _, pages, done = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").get
        assert 0 < done < pages


def after_the_failed_sync(disk):
    kinds = [event.kind for event in disk.journal if event.file.endswith(".db")]
    return kinds[kinds.index("failed sync") :] if "failed sync" in kinds else []
