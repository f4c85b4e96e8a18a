"""The data folder: who may read it, who holds it, and what SQLite's errors mean for a person."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
from typing import TYPE_CHECKING

import apsw

from ..errors import (
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreIOError,
    StoreLocked,
    StoreMissing,
    StoreNoMemory,
    StoreReadOnly,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "DATABASE",
    "DISK_ERRORS",
    "FolderLock",
    "connect",
    "private_file",
    "private_folder",
    "same_file",
    "sync_folder",
    "translate",
]

log = logging.getLogger(__name__)

DATABASE = "whisper-fast.db"

MEANING: tuple[tuple[type[Exception], type[StoreError], str], ...] = (
    (apsw.FullError, StoreFull, "no space is left; free some, the engine goes on by itself"),
    (apsw.ReadOnlyError, StoreReadOnly, "it cannot be written; check the owner and the mount"),
    (apsw.CantOpenError, StoreReadOnly, "it cannot be opened; check that the folder exists and is yours"),
    (apsw.CorruptError, StoreCorrupt, "a page is damaged; `whisper-fast restore` brings back a backup"),
    (apsw.NotADBError, StoreCorrupt, "it is not a database; `whisper-fast restore` brings back a backup"),
    (apsw.BusyError, StoreLocked, "another process holds it; the engine goes on when that one lets go"),
    (apsw.LockedError, StoreLocked, "another process holds it; the engine goes on when that one lets go"),
    (apsw.ProtocolError, StoreLocked, "another process holds it; the engine goes on when that one lets go"),
    (apsw.NoMemError, StoreNoMemory, "SQLite got no memory; give this machine or container more"),
    (MemoryError, StoreNoMemory, "SQLite got no memory; give this machine or container more"),
    (apsw.IOError, StoreIOError, "the disk failed; check its cable, its mount and the system's log"),
)
"""What SQLite says, what we say, and what to do; the first that fits."""

DISK_ERRORS: tuple[type[Exception], ...] = tuple(theirs for theirs, _, _ in MEANING if theirs is not apsw.LockedError)
"""What is the disk's doing and not a job's; `LockedError` is a conflict of a connection with itself."""


def translate(error: BaseException, path: str) -> StoreError:
    """Return our error for one of SQLite's; the text names the file and what to do."""
    code = getattr(error, "extendedresult", 0)
    if code == apsw.SQLITE_READONLY_DBMOVED:
        return StoreMissing(f"{path}: it was moved or deleted while it was open; put it back")
    if code == apsw.SQLITE_IOERR_NOMEM:
        error = apsw.NoMemError(*error.args)
    for theirs, ours, advice in MEANING:
        if isinstance(error, theirs):
            return ours(f"{path}: {advice} ({described(error, code)})")
    return StoreError(f"{path}: {type(error).__name__}: {error}")


def described(error: Exception, code: int) -> str:
    """Return SQLite's words, and its name of the code."""
    name = apsw.mapping_extended_result_codes.get(code) or apsw.mapping_result_codes.get(code) or type(error).__name__
    return f"{name}: {error}" if str(error) else str(name)


def private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter, on the disk too. Raises StoreReadOnly where it cannot be."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in missing:
            sync_folder(folder.parent)
    except OSError as error:
        raise StoreReadOnly(f"{path} cannot be made a data folder: {error.strerror}") from None


def private_file(path: Path) -> None:
    """Make sure that `path` exists, on the disk too, and that only its owner may read it. Raises StoreReadOnly."""
    try:
        there = path.exists()
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
        if not there:
            sync_folder(path.parent)
    except OSError as error:
        raise StoreReadOnly(f"{path} cannot be written: {error.strerror}; check the owner and the mount") from None


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk: without it a power cut may take a new file away. Raises OSError."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def connect(path: Path, *, readonly: bool = False, vfs: str | None = None) -> apsw.Connection:
    """Open a connection with the settings that durability rests on: WAL, synchronous FULL, deleted bytes zeroed.

    `vfs` names one of SQLite's, None is the system's. Raises StoreError of the fitting kind.
    """
    flags = apsw.SQLITE_OPEN_READONLY if readonly else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    try:
        connection = apsw.Connection(os.fspath(path), flags=flags | apsw.SQLITE_OPEN_NOMUTEX, vfs=vfs)
    except DISK_ERRORS as error:
        raise translate(error, os.fspath(path)) from error
    try:
        connection.set_busy_timeout(5000)
        if not readonly:
            connection.pragma("journal_mode", "wal")
            connection.pragma("synchronous", "full")
            connection.pragma("secure_delete", "on")
    except DISK_ERRORS as error:
        close_quietly(connection)
        raise translate(error, os.fspath(path)) from error
    return connection


def close_quietly(connection: apsw.Connection, *, stale: bool = False) -> None:
    """Close a connection whatever the disk says to that.

    `stale`: its files are not those any more that others find. SQLite deletes the log by its name with the last
    connection, and that name may belong to another database by now: it is told to let it be.
    """
    try:
        if stale:
            keep = ctypes.c_int(1)
            connection.file_control("main", apsw.SQLITE_FCNTL_PERSIST_WAL, ctypes.addressof(keep))
        connection.close()
    except apsw.Error as error:
        log.debug("closing: %s", error)


def same_file(path: Path | str, known: os.stat_result) -> bool:
    """Say whether `path` is still the file that `known` describes."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_ino, found.st_dev) == (known.st_ino, known.st_dev)


class FolderLock:
    """The right to be the one engine on a data folder; the lock dies with its process.

    Raises StoreLocked that names the process that holds it.
    """

    def __init__(self, database: Path) -> None:
        path = self._path = database.with_suffix(".lock")
        private_file(path)
        self._file = open(path, "r+")  # noqa: SIM115 - held until release(), the lock lives as long as the file
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise StoreLocked(
                f"{database.parent} is in use by process {holder}; stop it or choose another folder"
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def stands(self) -> bool:
        """Say whether the lock is still the one that others find: the file may have been deleted under it."""
        return same_file(self._path, os.fstat(self._file.fileno()))

    def release(self) -> None:
        """Give the folder back."""
        self._file.close()
