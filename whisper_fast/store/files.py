"""The data folder: who may read it, who holds it, and what SQLite's errors mean for a person."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import apsw

from ..errors import StoreCorrupt, StoreError, StoreFull, StoreLocked, StoreReadOnly

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DATABASE", "FolderLock", "connect", "private_file", "private_folder", "translate"]

DATABASE = "whisper-fast.db"

MEANING: tuple[tuple[type[apsw.Error], type[StoreError], str], ...] = (
    (apsw.FullError, StoreFull, "no space is left; free some, the engine goes on by itself"),
    (apsw.ReadOnlyError, StoreReadOnly, "it cannot be written; check the owner and the mount"),
    (apsw.CantOpenError, StoreReadOnly, "it cannot be opened; check that the folder exists and is yours"),
    (apsw.CorruptError, StoreCorrupt, "a page is damaged; `whisper-fast restore` brings back a backup"),
    (apsw.NotADBError, StoreCorrupt, "it is not a database; `whisper-fast restore` brings back a backup"),
    (apsw.BusyError, StoreLocked, "another process holds it"),
    (apsw.LockedError, StoreLocked, "another process holds it"),
)


def translate(error: apsw.Error, path: str) -> StoreError:
    """Return our error for one of SQLite's; the text names the file and what to do."""
    for theirs, ours, advice in MEANING:
        if isinstance(error, theirs):
            return ours(f"{path}: {advice} ({error})")
    return StoreError(f"{path}: {type(error).__name__}: {error}")


def private_folder(path: Path) -> None:
    """Make a folder that only its owner may enter. Raises StoreReadOnly where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StoreReadOnly(f"{path} cannot be made a data folder: {error.strerror}") from None


def private_file(path: Path) -> None:
    """Make sure that `path` exists and that only its owner may read it. Raises StoreReadOnly."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise StoreReadOnly(f"{path} cannot be written: {error.strerror}; check the owner and the mount") from None


def connect(path: Path, *, readonly: bool = False, vfs: str | None = None) -> apsw.Connection:
    """Open a connection with the settings that durability rests on: WAL, synchronous FULL, deleted bytes zeroed.

    `vfs` names one of SQLite's, None is the system's. Raises StoreError of the fitting kind.
    """
    flags = apsw.SQLITE_OPEN_READONLY if readonly else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    try:
        connection = apsw.Connection(os.fspath(path), flags=flags | apsw.SQLITE_OPEN_NOMUTEX, vfs=vfs)
        connection.set_busy_timeout(5000)
        if not readonly:
            connection.pragma("journal_mode", "wal")
            connection.pragma("synchronous", "full")
            connection.pragma("secure_delete", "on")
    except apsw.Error as error:
        raise translate(error, os.fspath(path)) from error
    return connection


class FolderLock:
    """The right to be the one engine on a data folder; the lock dies with its process.

    Raises StoreLocked that names the process that holds it.
    """

    def __init__(self, database: Path) -> None:
        path = database.with_suffix(".lock")
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

    def release(self) -> None:
        """Give the folder back."""
        self._file.close()
