"""Checkpoints: the log is brought into the database beside the writer, so that no group waits for it.

The log begins anew only when all of it is in the database, and the writer makes it longer all the while. So a thread
does the long first rounds, each shorter than the one before, and the writer the short last one.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import apsw

from .files import connect

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Checkpoints"]

PAGES: Final = 4000  # in the log: a round begins; 16 MB
SHORT: Final = 400  # pages that are left: the writer does them itself
LONGEST: Final = 8 * PAGES  # in the log: the writer does all of it, whoever waits


class Checkpoints:
    """When which round is due; asked by the writer after each group, in its thread."""

    def __init__(self, path: Path, vfs: str | None) -> None:
        self._path = path
        self._vfs = vfs
        self._round: Future[int] | None = None
        self._next = PAGES  # pages in the log at which the next round begins
        self._thread: Executor = ThreadPoolExecutor(1, thread_name_prefix="whisper-fast-checkpoint")

    def look(self, connection: apsw.Connection, pages: int) -> None:
        """Do or begin what is due with `pages` in the log. Raises what SQLite or the thread raised."""
        if pages < PAGES:
            self._next = PAGES
        if self._round is not None and self._round.done():
            done, self._round = self._round.result(), None
            if pages - done <= SHORT:
                self._last(connection)
            else:  # a reader may hold the log: give it time
                self._next = pages + SHORT
        elif pages > LONGEST:
            self.settle()
            self._last(connection)
        elif self._round is None and pages >= self._next:
            self._round = self._thread.submit(self._run)

    @property
    def running(self) -> bool:
        """Whether a round is on its way."""
        return self._round is not None and not self._round.done()

    def settle(self) -> None:
        """Wait for a round that runs: before its end is known the log must not begin anew. Raises what it raised."""
        ended, self._round, self._next = self._round, None, PAGES
        if ended is not None:
            ended.result()

    def close(self) -> None:
        """Give the thread back. Raises what the last round raised."""
        self._thread.shutdown()
        self.settle()

    def _last(self, connection: apsw.Connection) -> None:
        self._next = PAGES
        checkpoint(connection)

    def _run(self) -> int:
        with closing(connect(self._path, vfs=self._vfs)) as connection:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)  # one that fails then would not be told
            return checkpoint(connection)


def checkpoint(connection: apsw.Connection) -> int:
    """Bring what can be brought from the log into the database; return how many pages of the log are there."""
    found: Any = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").get  # busy, pages in the log, of those done
    return int(found[2])
