"""Compaction: after it no file of the data folder holds a byte of what was deleted.

It goes through the whole database in slices of a few milliseconds, between the groups of the writer. For each slice
the log is emptied into the database, SQLite's write lock is held, and `scrub` zeroes what is left over in the pages.
Whoever deletes notes it in the same transaction; a compaction that was cut short begins again with the next start.
"""

from __future__ import annotations

import logging
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

import apsw

from .. import clock
from .checkpoints import emptied
from .scrub import MOST_PAGES, scrub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .opened import Opened

__all__ = ["Compaction", "scrub_file"]

log = logging.getLogger(__name__)

SLICE: Final = 1000  # pages
BUSY_PAUSE: Final = 0.25  # seconds between two slices while the writer has work
MOMENT: Final = 0.005  # seconds until a checkpoint that runs is looked for again
RETRY: Final = 1.0  # seconds after a slice that could not be
AT_THE_END: Final = 5.0  # seconds that a close may take for the rest of it


class Compaction:
    """How far the compaction of one database is; asked by the writer of its only engine, in its thread.

    ended  called with the number of the last deletion whose traces are gone
    """

    def __init__(self, vfs: str | None, ended: Callable[[int], None]) -> None:
        self._vfs = vfs
        self._ended = ended
        self._upto = 0  # the last deletion that is noted in the database
        self._began = 0  # the last one when this compaction began
        self._page: int | None = None  # where it goes on, None while there is nothing to do
        self._due = 0.0

    def look(self, connection: apsw.Connection) -> None:
        """Notice a new deletion: one that comes meanwhile has a compaction of its own afterwards."""
        self._upto = int(connection.execute("SELECT coalesce(max(id), 0) FROM compaction").get)
        if self._upto and self._page is None:
            self._page, self._began = 1, self._upto

    def wait(self, *, idle: bool) -> float | None:
        """Return the seconds until the next slice, None when there is nothing to do."""
        if self._page is None:
            return None
        return max(0.0, self._due + (0.0 if idle else BUSY_PAUSE) - clock.monotonic())

    def step(self, opened: Opened) -> None:
        """Do a slice, outside a transaction; one that fails is tried again later. Raises apsw.IOError."""
        page, self._due = self._page or 1, clock.monotonic()
        try:
            self._page = compact_slice(opened, self._vfs, page)
            if self._page is None:
                self._end(opened.connection)
        except apsw.Error as error:
            log.warning("what was deleted leaves its traces for now: %s", error)
            self._page = page
            if isinstance(error, apsw.IOError):
                raise
        finally:
            if self._page == page:
                self._due += RETRY

    def later(self) -> None:
        """Put the next slice off for a moment."""
        self._due = clock.monotonic() + MOMENT

    def finish(self, opened: Opened) -> None:
        """Do what is left of it, for some seconds at most: the next start does the rest."""
        until = clock.monotonic() + AT_THE_END
        while self.wait(idle=True) == 0.0 and clock.monotonic() < until:
            self.step(opened)

    def _end(self, connection: apsw.Connection) -> None:
        with connection:
            connection.execute("DELETE FROM compaction WHERE id <= ?", (self._began,))
        self._ended(self._began)
        self.look(connection)


def compact_slice(opened: Opened, vfs: str | None, first: int) -> int | None:
    """Scrub some pages from `first` (1 is the database's first); return where to go on, None at the end.

    Call it outside a transaction, in the writer's thread. Returns `first` where a reader holds the log: try again.
    Raises apsw.Error.
    """
    connection = opened.connection
    if not emptied(connection):
        return first
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            return scrubbed(opened, vfs or "", first)
        finally:
            connection.execute("ROLLBACK")
    finally:
        connection.release_memory()  # pages in memory still hold what was scrubbed in the file


def scrubbed(opened: Opened, vfs: str, first: int) -> int | None:
    connection = opened.connection
    pages, size = connection.pragma("page_count"), connection.pragma("page_size")
    with opened_file(vfs, f"{opened.path}-wal", apsw.SQLITE_OPEN_WAL) as logged:
        if logged.xFileSize():  # another process has written before the lock was ours
            return first
    if pages > MOST_PAGES:
        log.warning("the database has %d pages: too many to be scrubbed; VACUUM does the same", pages)
        return None
    with opened_file(vfs, str(opened.path), apsw.SQLITE_OPEN_MAIN_DB) as file:
        if scrub(file, range(first, min(first + SLICE, pages + 1)), size):
            file.xSync(apsw.SQLITE_SYNC_NORMAL)
    return first + SLICE if first + SLICE <= pages else None


def scrub_file(path: str) -> None:
    """Scrub a database file that nobody has open."""
    with closing(apsw.Connection(path)) as connection:
        pages, size = connection.pragma("page_count"), connection.pragma("page_size")
    with opened_file("", path, apsw.SQLITE_OPEN_MAIN_DB) as file:
        scrub(file, range(1, min(pages, MOST_PAGES) + 1), size)


@contextmanager
def opened_file(vfs: str, path: str, kind: int) -> Iterator[apsw.VFSFile]:
    """Open a file as SQLite does: closed by anybody else it would take SQLite's own locks with it."""
    file = apsw.VFSFile(vfs, path, [apsw.SQLITE_OPEN_READWRITE | kind, 0])
    try:
        yield file
    finally:
        file.xClose()
