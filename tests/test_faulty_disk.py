"""The disk of the lab: it fails when it is told to, keeps what was synced, and loses what was not."""

from random import Random

import apsw
import pytest

from whisper_fast.lab.faulty_disk import METHODS, FaultyDisk, memory_folder
from whisper_fast.lab.platter import SECTOR, Event, Platter


@pytest.fixture
def folder():
    with memory_folder() as folder:
        yield folder


def opened(folder, disk, synchronous="full"):
    connection = apsw.Connection(str(folder / "a.db"), vfs=disk.name)
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", synchronous)
    connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
    return connection


def insert(connection, *values):
    for value in values:
        connection.execute("INSERT INTO t VALUES (?)", (value,))


def after_a_cut(folder, disk, synchronous, values):
    connection = opened(folder, disk, synchronous)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").get  # noqa: B018
    insert(connection, *values)
    disk.cut_power(after=0)
    with pytest.raises(apsw.IOError):
        insert(connection, "late")
    with pytest.raises(apsw.IOError):
        connection.close()
    disk.power_on()
    connection = opened(folder, disk)
    found = [row[0] for row in connection.execute("SELECT x FROM t")]
    assert connection.pragma("integrity_check") == "ok"
    connection.close()
    return found


def test_a_power_cut_keeps_what_was_synced(folder):
    with FaultyDisk(seed=1) as disk:
        assert after_a_cut(folder, disk, "full", range(50)) == list(range(50))


def test_a_power_cut_loses_what_was_not(folder):
    lost = 0
    for seed in range(10):
        with FaultyDisk(seed=seed) as disk:
            before = after_a_cut(folder, disk, "full", [])
            lost += after_a_cut(folder, disk, "off", range(50)) != [*before, *range(50)]
    assert lost


@pytest.mark.parametrize("method", ["xWrite", "xSync"])
def test_the_nth_call_fails_once(folder, method):
    with FaultyDisk() as disk:
        connection = opened(folder, disk)
        disk.fail(method, nth=2, suffix="-wal")
        with pytest.raises(apsw.IOError) as failed:
            insert(connection, *range(9))
        assert failed.value.extendedresult == METHODS[method]
        insert(connection, 9)
        connection.close()


def test_a_failure_lasts_until_it_is_healed(folder):
    with FaultyDisk() as disk:
        connection = opened(folder, disk)
        disk.fail("xWrite", code=apsw.SQLITE_FULL, times=None)
        for _ in range(3):
            with pytest.raises(apsw.FullError):
                insert(connection, 1)
        disk.heal()
        insert(connection, 1)
        assert disk.calls["xWrite"] > 3
        connection.close()


def test_the_same_seed_loses_the_same():
    def left(seed):
        random, platter = Random(seed), Platter()
        for event in (Event("found", "f"), Event("write", "f", 100, bytes(range(250)) * 20)):
            platter.apply(event, random)
        return platter.survivors(random)["f"]

    assert {left(seed) == left(seed) for seed in range(20)} == {True}
    assert len({left(seed) for seed in range(20)}) > 5


def test_sectors_are_old_or_new_and_all_else_stands():
    old, new = b"o" * 5000, b"n" * 3000
    for seed in range(50):
        random, platter = Random(seed), Platter()
        platter.apply(Event("found", "f", 0, old), random)
        platter.apply(Event("write", "f", 700, new), random)
        left = platter.survivors(random)["f"]
        assert left[:700] == old[:700]
        assert left[3700:] == old[3700:]
        pieces = [left[max(start, 700) : min(start + SECTOR, 3700)] for start in range(512, 3700, SECTOR)]
        assert all(len(set(piece)) == 1 for piece in pieces)


def test_a_sync_that_failed_is_not_made_good_by_the_next():
    lost = False
    for seed in range(20):
        random, platter = Random(seed), Platter()
        for kind, data in (("found", b""), ("write", b"x" * SECTOR), ("failed sync", b""), ("sync", b"")):
            platter.apply(Event(kind, "f", 0, data), random)
        lost |= platter.survivors(random)["f"] != b"x" * SECTOR
    assert lost


def test_names_are_certain_once_the_folder_is_synced():
    def left(*events):
        found = set()
        for seed in range(30):
            random, platter = Random(seed), Platter()
            for event in events:
                platter.apply(event, random)
            found.add(platter.survivors(random).get("f"))
        return found

    made, sync, log = Event("made", "f"), Event("sync", "f"), (Event("made", "log", 1), Event("sync", "log"))
    assert left(made) == left(made, sync) == {None, b""}
    assert left(made, *log) == {b""}
    assert left(made, *log, Event("delete", "f")) == {None, b""}
    assert left(made, *log, Event("delete", "f", 1)) == {None}
    assert left(made, Event("delete", "f"), *log) == {None}


def test_a_sync_that_fails_is_told_once_to_each_handle(folder):
    """As Linux tells it: whoever had the file open learns of it with the next sync, later ones never do."""
    with FaultyDisk() as disk:
        first, other = database_file(folder, disk), database_file(folder, disk)
        disk.fail("xSync")
        outcomes = [synced(first), synced(other), synced(first), synced(other)]
        late = database_file(folder, disk)
        outcomes.append(synced(late))
        for file in (first, other, late):
            file.xClose()
    assert outcomes == [False, False, True, True, True]


def database_file(folder, disk):
    (folder / "a.db").touch()
    return apsw.VFSFile(disk.name, str(folder / "a.db"), [apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_MAIN_DB, 0])


def synced(file):
    try:
        file.xSync(apsw.SQLITE_SYNC_NORMAL)
    except apsw.IOError:
        return False
    return True
