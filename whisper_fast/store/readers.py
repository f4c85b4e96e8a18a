"""The readers: threads that answer questions while the writer writes."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import apsw

from ..errors import StoreCorrupt
from .files import DISK_ERRORS, close_quietly, connect, translate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor
    from pathlib import Path

    from ..errors import StoreError

__all__ = ["Readers"]

T = TypeVar("T")

READERS = 2
PATIENT = (apsw.BusyError, apsw.LockedError, MemoryError, apsw.NoMemError)  # a new connection would not help


class Readers:
    """Connections of their own, open from the start: what was open can be read when nothing can be opened any more.

    found_damage  called with the StoreCorrupt that a reader met
    """

    def __init__(self, path: Path, vfs: str | None, found_damage: Callable[[StoreError], None]) -> None:
        self._path = path
        self._vfs = vfs
        self._found_damage = found_damage
        self._free: queue.SimpleQueue[apsw.Connection | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # held while connections are let go of: a new question waits before it
        with ExitStack() as failed:
            for _ in range(READERS):
                self._free.put(connection := self._open())
                failed.callback(close_quietly, connection)
            failed.pop_all()
        self.threads: Executor = ThreadPoolExecutor(READERS, thread_name_prefix="whisper-fast-reader")

    @contextmanager
    def let_go(self, seconds: float | None = None) -> Iterator[bool]:
        """Close every connection after the question that it answers; the next question after the block opens one.

        Gives whether all are closed: a question may take longer than `seconds`.
        """
        taken: list[apsw.Connection | None] = []
        with self._gate:
            try:
                with suppress(queue.Empty):
                    while len(taken) < READERS:
                        taken.append(self._free.get(timeout=seconds))
                for connection in taken:
                    if connection is not None:
                        close_quietly(connection, stale=True)
                yield len(taken) == READERS
            finally:
                for _ in taken:
                    self._free.put(None)

    def read(self, job: Callable[[apsw.Connection], T]) -> T:
        """Run `job`, once more on a new connection where the disk failed; in a thread of `threads`.

        Raises what the job raises; StoreError.
        """
        with self._gate:
            connection = self._free.get()
        try:
            if connection is None:
                connection = self._open()
            try:
                return job(connection)
            except DISK_ERRORS as error:
                if isinstance(error, PATIENT):
                    raise
                connection = self._renewed(connection)
                return job(connection)
        except DISK_ERRORS as error:
            raise self._translated(error) from error
        except apsw.Error as error:
            raise translate(error, str(self._path)) from error
        finally:
            self._free.put(connection)

    def close(self) -> None:
        """Wait for the last question and close the connections."""
        self.threads.shutdown()
        with self.let_go():
            pass

    def _translated(self, error: Exception) -> StoreError:
        ours = translate(error, str(self._path))
        if isinstance(ours, StoreCorrupt):
            self._found_damage(ours)
        return ours

    def _renewed(self, connection: apsw.Connection) -> apsw.Connection:
        """Return a new connection; the old one is kept where none can be opened: it may still read something."""
        new = self._open()
        close_quietly(connection)
        return new

    def _open(self) -> apsw.Connection:
        connection = connect(self._path, readonly=True, vfs=self._vfs)
        try:
            connection.execute("SELECT 1 FROM sqlite_schema").get  # noqa: B018 - opens the log
        except DISK_ERRORS as error:
            close_quietly(connection)
            raise translate(error, str(self._path)) from error
        return connection
