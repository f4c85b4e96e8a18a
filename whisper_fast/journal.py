"""The journal: what was accepted, what was answered, what is done; on the disk before anybody is told.

A message goes through three durable states. `ACCEPTED`: it will be answered. `ANSWERED`: its reply is recorded, and
only then sent. `DONE`: conversation and memories are stored, in the same transaction that says so. A message that
cannot be answered as it is ends as `FAILED`; sent again with its id, it is tried again. After a crash the engine goes
on from the last state that reached the disk; a message delivered again finds its entry.
"""

from __future__ import annotations

import logging
from contextlib import closing
from time import time
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import InvalidMessage, StoreError
from .message import Message, Reply
from .store.files import DATABASE, connect

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    import apsw

    from .store.sqlite import Database

__all__ = ["Entry", "Journal", "audit", "encoded", "last"]

ACCEPTED, ANSWERED, DONE, FAILED = 0, 1, 2, 3
log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True):
    """One message's line in the journal; `reply` is there once it is recorded."""

    id: int
    state: int
    message: Message
    reply: Reply | None = None
    known: bool = False


encode = msgspec.json.encode
as_message = msgspec.json.Decoder(Message).decode
as_reply = msgspec.json.Decoder(Reply).decode


class Journal:
    """The journal of one data folder, written through the database's group commits."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def accept(self, message: Message, body: bytes) -> asyncio.Future[Entry]:
        """Store a message, encoded as `body`, before anything is done for it; on the disk when the future is done.

        A message delivered again (same platform, channel, user and id) gives its entry, `known` is then True and
        the text that came first stands. Raises StoreError.
        """
        return self._database.submit(lambda connection: insert(connection, message, body))

    async def record(self, entry: Entry, reply: Reply) -> None:
        """Store the reply of an entry before it is sent; on the disk when this returns.

        Raises StoreError, also when the entry is not there any more: somebody has restored a backup meanwhile.
        """
        body = encode(reply)

        def job(connection: apsw.Connection) -> bool:
            sql = """UPDATE journal SET state = ?, reply = ?
                     WHERE id = ? AND user = ? AND message_id = ? AND state IN (0, 3)"""
            connection.execute(sql, (ANSWERED, body, entry.id, entry.message.user, entry.message.id))
            return bool(connection.changes())

        if not await self._database.write(job):
            raise StoreError(f"message {entry.message.id} is not in the journal any more; send it again")

    async def fail(self, entry: Entry) -> None:
        """Close an entry whose message cannot be answered as it is: no start tries it again. Raises StoreError."""
        sql = "UPDATE journal SET state = ? WHERE id = ? AND user = ? AND message_id = ? AND state = ?"
        key = (FAILED, entry.id, entry.message.user, entry.message.id, ACCEPTED)
        await self._database.write(lambda connection: connection.execute(sql, key).get)

    async def complete(self, entry: Entry, *stores: Callable[[apsw.Connection], Any]) -> bool:
        """Run `stores` (conversation, memories) and mark the entry done, all in one transaction.

        Returns False, and stores nothing, for an entry that is done already or gone (its user was forgotten).
        The journal then keeps the reply, for redelivery, and of the message its ids alone. Raises StoreError.
        """
        message = entry.message
        stub = encode(Message(user=message.user, text="", id=message.id, channel=message.channel))

        def job(connection: apsw.Connection) -> bool:
            sql = (
                "UPDATE journal SET state = ?, message = ? WHERE id = ? AND user = ? AND message_id = ? AND state = ?"
            )
            connection.execute(sql, (DONE, stub, entry.id, entry.message.user, entry.message.id, ANSWERED))
            if not connection.changes():
                return False
            for store in stores:
                store(connection)
            return True

        return await self._database.write(job)

    async def unfinished(self) -> list[Entry]:
        """Return what a stop or a crash left undone, in the order of arrival."""
        return await self._database.read(unfinished)


def encoded(message: Message) -> bytes:
    """Return a message as it is journalled; raises InvalidMessage for what cannot be written down."""
    try:
        return encode(message)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidMessage(f"the message cannot be stored: {error}") from None


def insert(connection: apsw.Connection, message: Message, body: bytes) -> Entry:
    key = (message.platform, message.channel, message.id, message.user)
    sql = """INSERT INTO journal (platform, channel, message_id, user, accepted_at, message)
             VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING id"""
    row = connection.execute(sql, (*key, time(), body)).get
    if row is not None:
        return Entry(row, ACCEPTED, message)
    sql = """SELECT id, state, message, reply FROM journal
             WHERE platform = ? AND channel = ? AND message_id = ? AND user = ?"""
    return entry(*connection.execute(sql, key).get)


def entry(row: int, state: int, message: bytes, reply: bytes | None) -> Entry:
    return Entry(row, state, as_message(message), None if reply is None else as_reply(reply), known=True)


def unfinished(connection: apsw.Connection) -> list[Entry]:
    sql = "SELECT id, state, message, reply FROM journal WHERE state < 2 ORDER BY id"
    entries = []
    for row in connection.execute(sql):
        try:
            entries.append(entry(*row))
        except msgspec.MsgspecError as error:
            log.error("journal entry %d cannot be read and is left alone: %s", row[0], error)
    return entries


def last(connection: apsw.Connection) -> int:
    """Return the id of the newest entry, 0 if there is none."""
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM journal").get)


def audit(data_dir: Path) -> dict[str, int]:
    """Count a data folder's journal: accepted, answered, done, open, failed, and turns stored more than once.

    Reads the file alone, so it also works beside a running engine or after its death. Raises StoreError.
    """
    sql = """SELECT count(*), count(*) FILTER (WHERE state IN (1, 2)), count(*) FILTER (WHERE state = 2),
                    count(*) FILTER (WHERE state < 2), count(*) FILTER (WHERE state = 3) FROM journal"""
    twice = """SELECT count(*) - count(DISTINCT turn) FROM conversation"""
    with closing(connect(data_dir / DATABASE)) as connection:
        accepted, answered, done, open_, failed = connection.execute(sql).get
        return {
            "accepted": accepted,
            "answered": answered,
            "done": done,
            "open": open_,
            "failed": failed,
            "duplicated": connection.execute(twice).get,
        }
