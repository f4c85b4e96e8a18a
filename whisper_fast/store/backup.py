"""Backup and restore of a data folder, also while an engine runs on it; both check what they wrote.

SQLite's online backup takes one consistent snapshot without stopping the writer. A copy counts only when it passes
`integrity_check` and holds as many rows in each table as the snapshot it was taken from.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from ..errors import StoreCorrupt, StoreError, StoreReadOnly
from .compaction import scrub_file
from .files import DATABASE, FolderLock, connect, private_file, private_folder, sync_folder, translate
from .schema import USER_TABLES, version_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["backup", "restore", "snapshot"]


def backup(data_dir: Path, target: Path) -> dict[str, object]:
    """Copy the database of `data_dir` to the file `target`; return path, bytes, rows per table.

    `target` appears only when the copy is complete, verified and on disk. Raises StoreError.
    """
    source = data_dir / DATABASE
    if not source.is_file():
        raise StoreError(f"{source} does not exist; is {data_dir} the data folder?")
    with closing(connect(source)) as connection:
        version_of(connection)
        return snapshot(connection, target)


def restore(data_dir: Path, source: Path) -> dict[str, object]:
    """Replace the content of the database in `data_dir` by the backup `source`; return what `backup` returns.

    What was there is backed up first, to `backups/` in the data folder, or moved there if it is damaged. A running
    engine sees the new content with its next message. Raises StoreError, and then nothing has changed.
    """
    if not source.is_file():
        raise StoreError(f"{source} does not exist")
    target = data_dir / DATABASE
    private_folder(data_dir)
    with closing(connect(source, readonly=True)) as backup_file:
        rows = inspect(backup_file)
        try:
            replace(target, backup_file)
        except StoreCorrupt:
            replace_damaged(target, backup_file)
    return {"path": str(target), "bytes": source.stat().st_size, "rows": rows}


def replace(target: Path, backup_file: apsw.Connection) -> None:
    """Put the content of a sound backup in the place of what `target` holds, which is kept as a backup itself.

    Turns keep being counted from the higher of both, so that none is ever given the number of another.
    """
    private_file(target)
    with closing(connect(target)) as live:
        counted = 0
        if readable_version(live):
            snapshot(live, target.parent / "backups" / f"before-restore-{stamp()}.db")
            counted = newest_turn(live)
        copy(backup_file, live)
        if counted > newest_turn(live):
            live.execute("DELETE FROM sqlite_sequence WHERE name = 'journal'")
            live.execute("INSERT INTO sqlite_sequence VALUES ('journal', ?)", (counted,))
        if (found := live.pragma("integrity_check")) != "ok":
            raise StoreError(f"{target} is damaged after the restore: {found:.200}; is the disk sound?")


def replace_damaged(target: Path, backup_file: apsw.Connection) -> None:
    """Put a backup in the place of a damaged database, which is kept as it is; in place, for an engine may run on it.

    Where its first page is damaged too it must be another file, and no engine may run: raises StoreLocked.
    """
    folder = target.parent / "backups" / f"damaged-{stamp()}"
    private_folder(folder)
    for damaged in files_of(target):
        shutil.copy2(damaged, folder / damaged.name)
    try:
        with closing(connect(target)) as live:
            copy(backup_file, live)
            if (found := live.pragma("integrity_check")) != "ok":
                raise StoreCorrupt(f"{target} is still damaged: {found:.200}")
    except StoreCorrupt:
        remove(target)
        replace(target, backup_file)


def readable_version(connection: apsw.Connection) -> int:
    try:
        return version_of(connection)
    except apsw.Error as error:
        raise translate(error, connection.filename) from error


def newest_turn(connection: apsw.Connection) -> int:
    return connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'journal'").get or 0


def remove(target: Path) -> None:
    """Delete a damaged database that was kept elsewhere. Raises StoreLocked if an engine holds it."""
    lock = FolderLock(target)
    try:
        for damaged in files_of(target):
            damaged.unlink()
    finally:
        lock.release()


def files_of(database: Path) -> list[Path]:
    """Return the database and the files beside it that are there."""
    names = (database.with_name(database.name + suffix) for suffix in ("", "-wal", "-shm"))
    return [path for path in names if path.exists()]


def snapshot(connection: apsw.Connection, target: Path) -> dict[str, object]:
    """Write a verified copy of an open database to `target`; return path, bytes, rows per table."""
    private_folder(target.parent)
    draft = target.with_name(target.name + ".part")
    draft.unlink(missing_ok=True)
    private_file(draft)
    try:
        with closing(apsw.Connection(os.fspath(draft))) as copied:
            with connection:  # a read transaction: the rows counted are those of the snapshot copied
                rows = counts(connection)
                copy(connection, copied)
            copied.pragma("journal_mode", "delete")  # one file, no -wal beside it
        scrub_file(os.fspath(draft))
        with closing(apsw.Connection(os.fspath(draft))) as copied:
            verify(copied, rows)
        size = settle(draft, target)
    except apsw.Error as error:
        raise translate(error, os.fspath(target)) from error
    finally:
        draft.unlink(missing_ok=True)
    return {"path": str(target), "bytes": size, "rows": rows}


def copy(source: apsw.Connection, target: apsw.Connection) -> None:
    try:
        with target.backup("main", source, "main") as pages:
            pages.step(-1)
    except apsw.Error as error:
        raise translate(error, target.filename) from error


def counts(connection: apsw.Connection) -> dict[str, int]:
    return {table: connection.execute(f"SELECT count(*) FROM {table}").get for table in USER_TABLES}  # noqa: S608


def inspect(connection: apsw.Connection) -> dict[str, int]:
    """Return the rows per table of a sound backup of ours; raises StoreCorrupt for anything else."""
    if not version_of(connection):
        raise StoreCorrupt(f"{connection.filename} is empty; it is not a backup")
    try:
        rows = counts(connection)
    except apsw.Error as error:
        raise translate(error, connection.filename) from error
    verify(connection, rows)
    return rows


def verify(connection: apsw.Connection, rows: Mapping[str, int]) -> None:
    try:
        found = connection.pragma("integrity_check")
        copied = counts(connection)
    except apsw.Error as error:
        raise translate(error, connection.filename) from error
    if found != "ok":
        raise StoreCorrupt(f"{connection.filename} is damaged: {found:.200}")
    if copied != rows:
        raise StoreCorrupt(f"{connection.filename} holds {copied} rows instead of {rows}")


def settle(draft: Path, target: Path) -> int:
    """Move `draft` to `target` so that either the old or the whole new file is there after a power cut."""
    try:
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        size = draft.stat().st_size
        draft.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StoreReadOnly(f"{target} cannot be written: {error.strerror}") from None
    return size


def stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S") + f"-{time.time_ns() % 1_000_000_000:09d}"
