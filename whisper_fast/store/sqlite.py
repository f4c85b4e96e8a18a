"""The database: one writer thread that commits in groups, readers beside it.

A commit costs one fsync however many jobs are in it. While the disk works on one group, the next one gathers, so
the group grows with the load by itself and an idle database commits a single job at once; there is no timer.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import apsw

from ..errors import Closed, StoreCorrupt, StoreError, StoreFull, StoreReadOnly
from .backup import snapshot, stamp
from .files import DATABASE, FolderLock, connect, private_file, private_folder, translate
from .schema import migrate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Database"]

log = logging.getLogger(__name__)
T = TypeVar("T")

GROUP = 1024  # jobs in one commit at most: bounds how long the first of them waits for the last
READERS = 2
UNWELL = (StoreFull, StoreReadOnly, StoreCorrupt)  # what is the disk's fault, not the job's


class Write:
    """One job on its way to the disk, and the future of whoever waits for it."""

    __slots__ = ("error", "future", "job", "result")

    def __init__(self, job: Callable[[apsw.Connection], Any], future: asyncio.Future[Any]) -> None:
        self.job = job
        self.future = future
        self.result: Any = None
        self.error: Exception | None = None

    def settle(self) -> None:
        if self.future.done():  # the waiter was cancelled: the commit stands all the same
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Database:
    """The one SQLite file of a data folder.

    `problem` is the last write's StoreError, None when the last write succeeded.
    """

    def __init__(
        self, path: Path, lock: FolderLock | None, connection: apsw.Connection, vfs: str | None = None
    ) -> None:
        self.folder = path.parent
        self.path = path
        self.vfs = vfs
        self.problem: StoreError | None = None
        self.commits = 0
        self.writes = 0
        self._lock = lock
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[], None]] = []
        self._jobs: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._closed = False
        self._seen = connection.pragma("data_version")
        self._writer = threading.Thread(target=self._write_groups, name="whisper-fast-writer", daemon=True)
        self._writer.start()
        self._local = threading.local()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="whisper-fast-reader")
        self._read_connections: list[apsw.Connection] = []

    @classmethod
    async def open(
        cls, folder: Path, *, name: str = DATABASE, exclusive: bool = True, vfs: str | None = None
    ) -> Database:
        """Open the database `name` in `folder`, made if it is not there, and bring its schema up to date.

        `exclusive` is what an engine asks for: a second one on the same folder gets StoreLocked. `vfs` names
        one of SQLite's, None is the system's. Raises StoreError.
        """
        lock, connection = await asyncio.to_thread(prepare, folder / name, exclusive, vfs)
        return cls(folder / name, lock, connection, vfs)

    async def write(self, job: Callable[[apsw.Connection], T]) -> T:
        """Run `job` in the writer's transaction; when this returns, what it wrote is on the disk.

        A job that raises is undone by itself, the rest of its group stands. Raises what the job raises; StoreError.
        """
        return await self.submit(job)

    def submit(self, job: Callable[[apsw.Connection], T]) -> asyncio.Future[T]:
        """Hand in a job as `write` does, in the order of the calls; the future is done when it is on the disk."""
        if self._closed:
            raise Closed("the database is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put(Write(job, future))
        return future

    async def read(self, job: Callable[[apsw.Connection], T]) -> T:
        """Run `job` in a reader thread with a connection of its own. Raises what the job raises; StoreError."""
        if self._closed:
            raise Closed("the database is closed")
        return await self._loop.run_in_executor(self._readers, self._read, job)

    def on_foreign_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the loop when another process has written: what is cached may be old."""
        self._listeners.append(listener)

    async def close(self) -> None:
        """Finish what was handed in, then close every connection and give the folder back."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        self._writer.join()
        self._readers.shutdown()
        for connection in (*self._read_connections, self._connection):
            connection.close()
        if self._lock:
            self._lock.release()

    def _read(self, job: Callable[[apsw.Connection], T]) -> T:
        connection: apsw.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = connect(self.path, readonly=True, vfs=self.vfs)
            self._read_connections.append(connection)
        try:
            return job(connection)
        except apsw.Error as error:
            raise translate(error, str(self.path)) from error

    def _write_groups(self) -> None:
        while (first := self._jobs.get()) is not None:
            group = [first]
            last = False
            while len(group) < GROUP and not self._jobs.empty():
                following = self._jobs.get()
                if following is None:
                    last = True
                    break
                group.append(following)
            self._commit(group)
            if last:
                return

    def _commit(self, group: list[Write]) -> None:
        foreign = False
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            foreign = self._changed_by_others()
            for write in group:
                self._apply(write)
            self._connection.execute("COMMIT")
            self.problem = next((w.error for w in group if isinstance(w.error, UNWELL)), None)
        except apsw.Error as error:
            self._undo(group, translate(error, str(self.path)))
        self.commits += 1
        self.writes += len(group)
        self._loop.call_soon_threadsafe(self._settle, group, foreign)

    def _apply(self, write: Write) -> None:
        connection = self._connection
        connection.execute("SAVEPOINT job")
        try:
            write.result = write.job(connection)
        except Exception as error:  # the job is somebody else's code: its error goes to its waiter
            if not connection.in_transaction:  # SQLite has undone the whole group (disk full, I/O error)
                raise error if isinstance(error, apsw.Error) else apsw.AbortError(str(error)) from error
            connection.execute("ROLLBACK TO job")
            write.error = translate(error, str(self.path)) if isinstance(error, apsw.Error) else error
        connection.execute("RELEASE job")

    def _undo(self, group: list[Write], problem: StoreError) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        log.error("a group of %d writes was not stored: %s", len(group), problem)
        self.problem = problem
        for write in group:
            write.error = problem.copy()

    def _changed_by_others(self) -> bool:
        """Say whether another connection has written since the last group (SQLite's data_version counts those)."""
        seen, self._seen = self._seen, self._connection.pragma("data_version")
        return bool(seen != self._seen)

    def _settle(self, group: list[Write], foreign: bool) -> None:
        if foreign:
            for listener in self._listeners:
                listener()
        for write in group:
            write.settle()


def prepare(path: Path, exclusive: bool, vfs: str | None) -> tuple[FolderLock | None, apsw.Connection]:
    private_folder(path.parent)
    lock = FolderLock(path) if exclusive else None
    try:
        private_file(path)
        connection = connect(path, vfs=vfs)
        migrate(connection, lambda version: keep_old(connection, path.parent, version))
    except apsw.Error as error:
        if lock:
            lock.release()
        raise translate(error, str(path)) from error
    except StoreError:
        if lock:
            lock.release()
        raise
    return lock, connection


def keep_old(connection: apsw.Connection, folder: Path, version: int) -> None:
    kept = snapshot(connection, folder / "backups" / f"schema-{version}-{stamp()}.db")
    log.warning("the data folder has schema %d: a verified backup is at %s", version, kept["path"])
