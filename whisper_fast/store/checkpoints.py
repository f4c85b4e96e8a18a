"""Checkpoints: the log is brought into the database beside the writer, so that no group waits for it.

The log begins anew only when all of it is in the database, and the writer makes it longer all the while. So a thread
does the long first rounds, each shorter than the one before, and the writer the short last one. Readers that follow
each other without a gap would still keep the log from beginning anew: where it has become too long, they are asked to
let go of it for a moment.
"""

from __future__ import annotations

import logging
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import apsw

from .files import connect

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["Checkpoints", "checkpoint", "emptied"]

log = logging.getLogger(__name__)

PAGES: Final = 4000  # in the log: a round begins; 16 MB
SHORT: Final = 400  # pages that are left: the writer does them itself
LONGEST: Final = 8 * PAGES  # in the log: the writer does all of it, whoever waits and whoever reads
PATIENCE: Final = 20  # milliseconds for a reader of another process to let go of the log
READING: Final = 0.2  # seconds for one of ours


class Checkpoints:
    """When which round is due; asked by the writer after each group, in its thread.

    let_go  as that of the readers
    """

    def __init__(self, path: Path, vfs: str | None, let_go: Callable[[float], AbstractContextManager[bool]]) -> None:
        self._path = path
        self._vfs = vfs
        self._round: Future[int] | None = None
        self._let_go = let_go
        self._next = PAGES  # pages in the log at which the next round begins
        self._longest = LONGEST  # pages at which readers are asked to let go
        self._thread: Executor = ThreadPoolExecutor(1, thread_name_prefix="whisper-fast-checkpoint")

    def look(self, connection: apsw.Connection, pages: int) -> None:
        """Do or begin what is due with `pages` in the log. Raises what SQLite or the thread raised."""
        if pages < PAGES:
            self._next, self._longest = PAGES, LONGEST
        if self._round is not None and self._round.done():
            done, self._round = self._round.result(), None
            if pages - done <= SHORT:
                self._last(connection)
            else:  # a reader may hold the log: give it time
                self._next = pages + SHORT
        elif pages > self._longest:
            self.settle()
            self._begin_anew(connection, pages)
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

    def _begin_anew(self, connection: apsw.Connection, pages: int) -> None:
        with self._let_go(READING) as alone:
            if not (alone and emptied(connection)):
                self._longest = pages + LONGEST
                log.warning("the log has %d pages: somebody reads the database all the while", pages)

    def _run(self) -> int:
        with closing(connect(self._path, vfs=self._vfs)) as connection:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)  # one that fails then would not be told
            return checkpoint(connection)


def emptied(connection: apsw.Connection) -> bool:
    """Bring the whole log into the database and cut it to nothing; say whether that was possible."""
    patience = connection.pragma("busy_timeout")
    connection.set_busy_timeout(PATIENCE)
    try:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").get
    finally:
        connection.set_busy_timeout(patience)
    return not busy


def checkpoint(connection: apsw.Connection) -> int:
    """Bring what can be brought from the log into the database; return how many pages of the log are there."""
    found: Any = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").get  # busy, pages in the log, of those done
    return int(found[2])
