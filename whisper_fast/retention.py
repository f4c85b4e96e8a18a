"""How long the journal keeps what is finished: by age, by size, a little at a time.

A finished entry is there so that its message, delivered again, gets the same reply. Its age is the time that engines
have served the journal since (`Journal.age`), so a wall clock that jumps by a year ages nothing.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import StoreError

if TYPE_CHECKING:
    import apsw

    from .journal import Journal
    from .store.sqlite import Database

__all__ = ["Retention"]

log = logging.getLogger(__name__)

PERIOD = 60.0  # seconds between two looks
READ = 4096  # entries that are looked at in one go, by a reader
SLICE = 32  # entries in one deletion: each lies in another page of an index, which its commit writes whole
PAUSE = 0.01  # seconds that the writer is left to others after each

Row = tuple[Any, ...]  # id, state, age, bytes


class Retention:
    """Deletes finished entries older than `max_age` seconds, and the oldest of them above `max_bytes`.

    Held replies go by size only when nothing else is left to go; what is unfinished or quarantined never goes.
    """

    def __init__(self, database: Database, journal: Journal, *, max_age: float, max_bytes: int) -> None:
        self._database = database
        self._journal = journal
        self._max_age = max_age
        self._max_bytes = max_bytes
        self._kept: int | None = None  # bytes at the last count, less what was deleted since
        self._counted_at = 0  # Journal.written at that count
        self.deleted = 0

    async def run(self) -> None:
        """Sweep every minute, for ever."""
        while True:
            await asyncio.sleep(PERIOD)
            try:
                await self.sweep()
            except StoreError as error:
                log.warning("finished messages stay in the journal for now: %s", error)

    async def sweep(self) -> int:
        """Delete what is too old or too much, a few at a time; return how many. Raises StoreError."""
        before = self.deleted
        excess = await self._sweep(await self._excess(), held=False)
        if excess > 0:
            await self._sweep(excess, held=True)
        return self.deleted - before

    async def _excess(self) -> int:
        """Return how many bytes are too many; counted where the estimate, which is never too low, says so."""
        if self._kept is None or self._kept + self._journal.written - self._counted_at > self._max_bytes:
            self._counted_at = self._journal.written
            self._kept = await self._database.read(size)
        return self._kept + self._journal.written - self._counted_at - self._max_bytes

    async def _sweep(self, excess: int, *, held: bool) -> int:
        """Delete what is too old, and the oldest of what may go by size; return the bytes that are still too many."""
        oldest, cursor = self._journal.age - self._max_age, 0
        while rows := await self._database.read(partial(finished, after=cursor)):
            cursor = rows[-1][0]
            doomed: list[Row] = []
            for row in rows:
                if row[2] < oldest or (excess > 0 and (held or row[1] > 0)):
                    doomed.append(row)
                    excess -= row[3]
            await self._delete(doomed)
            if len(doomed) < len(rows) and rows[-1][2] >= oldest and excess <= 0:
                break
        return excess

    async def _delete(self, rows: list[Row]) -> None:
        while rows:
            doomed, rows = rows[:SLICE], rows[SLICE:]
            await self._database.write(partial(delete, rows=doomed))
            self._kept = (self._kept or 0) - sum(row[3] for row in doomed)
            self.deleted += len(doomed)
            await asyncio.sleep(PAUSE)


def size(connection: apsw.Connection) -> int:
    return int(
        connection.execute("SELECT coalesce(sum(length(message) + coalesce(length(reply), 0)), 0) FROM journal").get
    )


def finished(connection: apsw.Connection, after: int) -> list[Row]:
    sql = """SELECT id, state, age, length(message) + coalesce(length(reply), 0) FROM journal
             WHERE id > ? AND state NOT IN (0, 1, -2) ORDER BY id LIMIT ?"""
    return list(connection.execute(sql, (after, READ)))


def delete(connection: apsw.Connection, rows: list[Row]) -> None:
    """Delete those entries that are still finished."""
    sql = "DELETE FROM journal WHERE id = ? AND state NOT IN (0, 1, -2)"
    connection.executemany(sql, [row[:1] for row in rows])
