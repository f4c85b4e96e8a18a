"""The database as its writer holds it: connection, lock, and the proof that both are still what others find."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import apsw

from ..errors import StoreIOError, StoreLocked, StoreMissing
from .backup import snapshot, stamp
from .files import FolderLock, close_quietly, connect, private_file, private_folder, same_file, translate
from .schema import migrate, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["Opened"]

log = logging.getLogger(__name__)

PIECE = 1 << 16  # bytes of the log that are rewritten at a time; SQLite writes less than 128 KiB in one call


class Opened:
    """An open database and the files that it is: what is written into a file that was deleted is not stored.

    doubtful  whether a checkpoint failed, see `doubting`

    Raises StoreError of the fitting kind.
    """

    def __init__(self, path: Path, lock: FolderLock | None, connection: apsw.Connection) -> None:
        self.path = path
        self.lock = lock
        self.connection = connection
        self.closed = False
        self.doubtful = False
        self._names = (str(path), f"{path}-wal")
        self._files = tuple(map(os.stat, self._names))

    @classmethod
    def make(cls, path: Path, *, exclusive: bool, vfs: str | None) -> Opened:
        """Open the database, made if it is not there, and bring its schema up to date.

        `exclusive` asks to be the only engine on it, and makes certain what a crash left in the log.
        """
        private_folder(path.parent)
        lock = FolderLock(path) if exclusive else None
        try:
            private_file(path)
            return cls._open(path, lock, vfs, bring_up)
        except BaseException:
            if lock:
                lock.release()
            raise

    @contextmanager
    def doubting(self) -> Iterator[None]:
        """Note that a checkpoint in the block failed for the disk: those before it may be undone by that.

        SQLite syncs the database only with the checkpoint that ends the log. A sync that fails may lose the pages of
        those before it for good (see `settle_log`), and SQLite would never write them again: the next sync succeeds
        without them, and the log that still has them begins anew. So no log may end before it was read from its
        beginning once more, which SQLite does when nobody has the database open.
        """
        try:
            yield
        except (apsw.IOError, StoreIOError):
            self.doubtful = True
            raise

    def again(self, vfs: str | None, let_go: Callable[[], AbstractContextManager[bool]]) -> Opened:
        """Close and open anew; raises StoreMissing unless a database of ours is there: none is made.

        `let_go` closes everybody else's connections and keeps them closed: for files that are others now, and where
        this is doubtful. What was committed to a log that was deleted comes into the database as the last of them
        closes it.
        """
        if not self.path.is_file() or not self.path.stat().st_size:
            raise StoreMissing(
                f"{self.path} is not there any more; put it back or restore a backup, the engine goes on by itself; "
                "to begin anew, restart it"
            )
        with let_go() if self.doubtful or not self.stands() else nullcontext():
            return self._anew(vfs)

    def _anew(self, vfs: str | None) -> Opened:
        self.close(keep_lock=True)
        if self.lock is not None and not self.lock.stands():
            self.lock, old = FolderLock(self.path), self.lock
            old.release()
        return self._open(self.path, self.lock, vfs, from_the_beginning if self.doubtful else version_of)

    @classmethod
    def _open(
        cls, path: Path, lock: FolderLock | None, vfs: str | None, check: Callable[[apsw.Connection], object]
    ) -> Opened:
        connection = connect(path, vfs=vfs)
        try:
            check(connection)
            connection.execute("SELECT 1 FROM sqlite_schema").get  # noqa: B018 - opens the log
            if lock is not None:
                settle_log(connection, f"{path}-wal", vfs or "")
            return cls(path, lock, connection)
        except (apsw.Error, MemoryError) as error:
            close_quietly(connection)
            raise translate(error, str(path)) from error
        except BaseException:
            close_quietly(connection)
            raise

    def check(self) -> None:
        """Raise StoreMissing unless the files that are written are those that others find under their names."""
        if not self.stands():
            raise StoreMissing(f"{self.path} or its log was removed or replaced while it was open; put it back")

    def stands(self) -> bool:
        """Say whether the files that are open are those that others find under their names."""
        return same_file(self._names[0], self._files[0]) and same_file(self._names[1], self._files[1])

    def is_same(self, other: Opened) -> bool:
        """Say whether this is the same database file."""
        return os.path.samestat(self._files[0], other._files[0])

    def close(self, *, keep_lock: bool = False) -> None:
        """Close the connection, whatever the disk says to that, and give the folder back."""
        if not self.closed:
            self.closed = True
            if self.doubtful:
                self.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            close_quietly(self.connection, stale=not self.stands())
        if self.lock and not keep_lock:
            self.lock.release()


def from_the_beginning(connection: apsw.Connection) -> None:
    """See that SQLite takes nothing of the log for done. Raises StoreLocked where somebody has kept it open."""
    version_of(connection)
    _, _, done = connection.execute("PRAGMA wal_checkpoint(NOOP)").get
    if done > 0:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        raise StoreLocked(
            f"{connection.filename}: the disk failed while another process had it open; the engine goes on when that "
            "one has closed it"
        )


def bring_up(connection: apsw.Connection) -> None:
    migrate(connection, lambda version: keep_old(connection, Path(connection.filename).parent, version))


def keep_old(connection: apsw.Connection, folder: Path, version: int) -> None:
    kept = snapshot(connection, folder / "backups" / f"schema-{version}-{stamp()}.db")
    log.warning("the data folder has schema %d: a verified backup is at %s", version, kept["path"])


def settle_log(connection: apsw.Connection, name: str, vfs: str) -> None:
    """Make certain what was read from the log: write it once more in its place, and sync.

    A process that died between write and sync leaves commits that can be read and are not on the disk. After a sync
    that failed they may never get there: Linux calls such pages clean, so that the next sync succeeds without them
    (PostgreSQL's "fsyncgate", 2018). Nobody else writes meanwhile: the transaction holds SQLite's write lock.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        log_file = apsw.VFSFile(vfs, name, [apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_WAL, 0])
        try:
            size = log_file.xFileSize()
            for offset in range(0, size, PIECE):
                log_file.xWrite(log_file.xRead(min(PIECE, size - offset), offset), offset)
            if size:
                log_file.xSync(apsw.SQLITE_SYNC_NORMAL)
        finally:
            log_file.xClose()
    finally:
        connection.execute("ROLLBACK")
