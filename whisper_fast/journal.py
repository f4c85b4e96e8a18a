"""The journal: what was accepted, what was answered, what is done; on the disk before anybody is told.

    ACCEPTED     it will be answered                 -> ANSWERED, FAILED, QUARANTINED
    ANSWERED     its reply is recorded, then sent    -> DONE, HELD, QUARANTINED
    DONE         conversation and memories are stored, and whoever asked has the reply
    HELD         the same, but nobody is known to have the reply                      -> DONE, RELEASED
    RELEASED     held, and to be sent again by its platform's sender                  -> DONE
    FAILED       it cannot be answered as it is; sent again with its id, it is tried again
    QUARANTINED  the process died too often in its turn: nobody tries it until it is released

ANSWERED ends in the transaction that stores conversation and memories. After a crash the engine goes on from the last
state that reached the disk; a message delivered again finds its entry.
"""

from __future__ import annotations

import logging
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from . import clock
from .errors import IdReused, InvalidMessage, Quarantined, StoreError
from .message import Message, Reply

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence

    import apsw

    from .store.sqlite import Database

__all__ = ["REPLIED", "STATES", "Entry", "Journal", "drop", "encoded", "last", "listed", "release", "stub"]

ACCEPTED, ANSWERED, DONE, FAILED, HELD, QUARANTINED, RELEASED = 0, 1, 2, 3, -1, -2, -3
STATES = {
    ACCEPTED: "accepted",
    ANSWERED: "answered",
    DONE: "done",
    FAILED: "failed",
    HELD: "held",
    QUARANTINED: "quarantined",
    RELEASED: "released",
}
"""The states by what they are in the table; below DONE stands what still has to be looked at."""

REPLIED = frozenset((ANSWERED, DONE, HELD, RELEASED))
"""The states that have a reply."""

INSERT = """INSERT INTO journal (platform, channel, message_id, user, accepted_at, message, age, digest)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""

HAS_REPLY = "SELECT reply IS NOT NULL FROM journal WHERE id = ? AND user = ? AND message_id = ?"
KNOWN = "SELECT 1 FROM journal WHERE platform = ? AND channel = ? AND message_id = ? AND user = ?"

log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True):
    """One message's line in the journal; `reply` is there once it is recorded.

    `known`: the message had been accepted before; `attempts`: how often the process has died in its turn.
    """

    id: int
    state: int
    message: Message
    reply: Reply | None = None
    attempts: int = 0
    known: bool = False

    @property
    def unsettled(self) -> bool:
        """Whether nobody is known to have the reply."""
        return self.state in (ANSWERED, HELD, RELEASED)


encode = msgspec.json.encode
as_message = msgspec.json.Decoder(Message).decode
as_reply = msgspec.json.Decoder(Reply).decode


class Journal:
    """The journal of one data folder, written through the database's group commits.

    `age` is the seconds that engines have served it, all runs together: it knows nothing of the wall clock, which
    may jump. `written` counts the bytes recorded since the start, `counts` what must never be: replies whose message
    was not in the journal any more (lost), or had one already (doubled).
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._born = clock.monotonic()
        self.written = 0
        self.counts = {"lost": 0, "doubled": 0}

    @property
    def age(self) -> float:
        """Seconds that this journal was served."""
        return clock.monotonic() - self._born

    async def strike(self, interrupted: Iterable[int], attempts: int) -> None:
        """Count a death against the entries whose turns ran when the process died; on the disk when this returns.

        One that was struck `attempts` times is quarantined (0: none ever is). Raises StoreError.
        """
        ids = tuple(interrupted)
        if ids:
            await self._database.write(lambda connection: strike(connection, ids, attempts))

    async def resume(self) -> list[Entry]:
        """Return what a stop or a crash left undone, in the order of arrival; call it before anything is accepted.

        Raises StoreError.
        """
        served = await self._database.read(
            lambda c: c.execute("SELECT age FROM journal ORDER BY id DESC LIMIT 1").get
        )
        self._born = clock.monotonic() - (served or 0.0)
        return await self.unfinished()

    async def unfinished(self) -> list[Entry]:
        """Return what is accepted and not done, in the order of arrival. Raises StoreError."""
        return await self._database.read(unfinished)

    def accept(self, message: Message, body: bytes) -> asyncio.Future[Entry]:
        """Store a message, encoded as `body`, before anything is done for it; on the disk when the future is done.

        A message delivered again (same platform, channel, user and id) gives its entry, `known` is then True and
        the text that came first stands, and one that had failed is accepted anew; to a `strict` message that is
        IdReused. Raises Quarantined, StoreError.
        """
        age = self.age
        self.written += len(body)
        return self._database.submit(lambda connection: insert(connection, message, body, age))

    async def knows(self, message: Message) -> bool:
        """Say whether a message of this platform, channel, user and id was accepted before. Raises StoreError."""
        names = (message.platform, message.channel, message.id, message.user)
        return await self._database.read(lambda connection: connection.execute(KNOWN, names).get is not None)

    async def record(
        self, entry: Entry, reply: Reply, joined: Sequence[Entry] = (), message: Message | None = None
    ) -> None:
        """Store the reply of an entry before it is sent; on the disk when this returns.

        Entries that `joined` this one get the same reply and are done; `message` then holds the words of all, and
        stands in the entry from now on. Raises StoreError, also when the entry is not there any more: somebody has
        restored a backup meanwhile.
        """
        body = encode(reply)
        whole = encode(message) if joined and message is not None else None
        self.written += len(body) * (1 + len(joined)) + len(whole or b"")

        def job(connection: apsw.Connection) -> bool:
            sql = """UPDATE journal SET state = ?, reply = ?, message = coalesce(?, message)
                     WHERE id = ? AND user = ? AND message_id = ? AND state IN (0, 3)"""
            connection.execute(sql, (ANSWERED, body, whole, *ids_of(entry)))
            found = bool(connection.changes())
            for one in joined if found else ():
                own = encode(msgspec.structs.replace(reply, id=one.message.id))
                sql = """UPDATE journal SET state = ?, reply = ?, message = ?
                         WHERE id = ? AND user = ? AND message_id = ?"""
                connection.execute(sql, (DONE, own, encode(stub(one.message)), *ids_of(one)))
            return found

        if not await self._database.write(job):
            replied = await self._database.read(lambda connection: connection.execute(HAS_REPLY, ids_of(entry)).get)
            self.counts["lost"] += replied is None
            self.counts["doubled"] += bool(replied)
            raise StoreError(f"message {entry.message.id} is not in the journal any more; send it again")

    def fail(self, entries: Sequence[Entry]) -> asyncio.Future[Any]:
        """Close entries whose messages cannot be answered as they are: no start tries them again. Raises StoreError.

        Whoever sends one again after this call finds it failed.
        """
        gone = tuple(entries)

        def job(connection: apsw.Connection) -> None:
            for entry in gone:
                move(connection, entry, ACCEPTED, FAILED)

        return self._database.submit(job)

    async def complete(
        self, entry: Entry, *stores: Callable[[apsw.Connection], Any], sent: Callable[[], bool]
    ) -> bool:
        """Run `stores` (conversation, memories) and mark the entry done, or held unless `sent()`: one transaction.

        Returns False, and stores nothing, for an entry that is done already or gone (its user was forgotten).
        The journal then keeps the reply, for redelivery, and of the message its ids alone. Raises StoreError.
        """
        short = encode(stub(entry.message))

        def job(connection: apsw.Connection) -> bool:
            sql = """UPDATE journal SET state = ?, message = ?
                     WHERE id = ? AND user = ? AND message_id = ? AND state = ?"""
            connection.execute(sql, (DONE if sent() else HELD, short, *ids_of(entry), ANSWERED))
            if not connection.changes():
                return False
            for store in stores:
                store(connection)
            return True

        return await self._database.write(job)

    async def hold(self, entry: Entry) -> None:
        """Take a release back: it was sent and may have arrived, so a person decides anew. Raises StoreError."""
        await self._database.write(lambda connection: move(connection, entry, RELEASED, HELD))

    def sent(self, entry: Entry) -> asyncio.Future[Any]:
        """Note that a held reply has reached somebody."""
        return self._database.submit(lambda connection: move(connection, entry, HELD, DONE, RELEASED))

    async def load(self, entry_id: int) -> Entry | None:
        """Return an unfinished entry, None when it is finished, gone or cannot be read. Raises StoreError."""
        found = await self._database.read(lambda connection: unfinished(connection, entry_id))
        return found[0] if found else None

    async def held(self, platform: str, *, released: bool) -> list[Entry]:
        """Return the held entries of a platform in order, or those `released` by hand alone. Raises StoreError."""
        sql = """SELECT id, state, message, reply, attempts FROM journal
                 WHERE state < 2 AND state IN (?, ?) AND platform = ?"""
        states = (RELEASED, RELEASED if released else HELD)
        return await self._database.read(lambda c: readable(c.execute(f"{sql} ORDER BY id", (*states, platform))))


def ids_of(entry: Entry) -> tuple[int, str, str]:
    return entry.id, entry.message.user, entry.message.id


def stub(message: Message) -> Message:
    """Return what the journal keeps of a finished message: where it belongs, nothing of what was said."""
    return Message(user=message.user, text="", id=message.id, channel=message.channel, platform=message.platform)


def encoded(message: Message) -> bytes:
    """Return a message as it is journalled; raises InvalidMessage for what could not be read back."""
    try:
        body = encode(message)
        as_message(body)
        return body
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidMessage(f"the message cannot be stored: {error}") from None


def digest(message: Message) -> bytes:
    """Return 16 bytes that stand for a message's words."""
    return blake2b(encode((message.text, message.parts, message.continuation)), digest_size=16).digest()


def insert(connection: apsw.Connection, message: Message, body: bytes, age: float) -> Entry:
    names = (message.platform, message.channel, message.id, message.user)
    words = digest(message) if message.strict else None
    row = (*names, clock.wall(), body, age, words)
    connection.execute(INSERT, row)
    if connection.changes():
        return Entry(connection.last_insert_rowid(), ACCEPTED, message)
    sql = """SELECT id, state, message, reply, attempts, digest FROM journal
             WHERE platform = ? AND channel = ? AND message_id = ? AND user = ?"""
    *found, first = connection.execute(sql, names).get
    if words is not None and first is not None and words != first:
        raise IdReused(f"the id {message.id!r:.80} was used before for other words; a new message needs a new id")
    try:
        known = entry(*found)
    except msgspec.MsgspecError as error:
        raise StoreError(f"journal entry {found[0]} cannot be read: {error}; send it with a new id") from None
    if known.state == FAILED:
        connection.execute("UPDATE journal SET state = ? WHERE id = ?", (ACCEPTED, known.id))
        return msgspec.structs.replace(known, state=ACCEPTED)
    if known.state == QUARANTINED and known.reply is None:
        raise Quarantined(
            f"message {message.id!r:.80} is set aside: the process died {known.attempts} times in its turn; "
            "`whisper-fast journal` lists and releases it"
        )
    return known


def entry(row: int, state: int, message: bytes, reply: bytes | None, attempts: int) -> Entry:
    return Entry(row, state, as_message(message), None if reply is None else as_reply(reply), attempts, known=True)


def readable(rows: Iterable[tuple[Any, ...]]) -> list[Entry]:
    entries = []
    for row in rows:
        try:
            entries.append(entry(*row))
        except msgspec.MsgspecError as error:
            log.error("journal entry %d cannot be read and is left alone: %s", row[0], error)
    return entries


def unfinished(connection: apsw.Connection, only: int | None = None) -> list[Entry]:
    sql = "SELECT id, state, message, reply, attempts FROM journal WHERE state < 2 AND state >= 0"
    if only is not None:
        return readable(connection.execute(f"{sql} AND id = ?", (only,)))
    return readable(connection.execute(f"{sql} ORDER BY id"))


def strike(connection: apsw.Connection, ids: Sequence[int], attempts: int) -> None:
    """Count a death of the process against each entry; those that have `attempts` are quarantined."""
    sql = "UPDATE journal SET attempts = attempts + 1 WHERE id = ? AND state IN (0, 1)"
    connection.executemany(sql, [(one,) for one in ids])
    if attempts:
        sql = "UPDATE journal SET state = ? WHERE state < 2 AND state >= 0 AND attempts >= ?"
        connection.execute(sql, (QUARANTINED, attempts))
        if connection.changes():
            log.error("%d messages are set aside: the process died in their turns", connection.changes())


def move(connection: apsw.Connection, entry: Entry, before: int, after: int, also: int | None = None) -> None:
    sql = "UPDATE journal SET state = ? WHERE id = ? AND user = ? AND message_id = ? AND state IN (?, ?)"
    connection.execute(sql, (after, *ids_of(entry), before, before if also is None else also))


def last(connection: apsw.Connection) -> int:
    """Return the id of the newest entry, 0 if there is none."""
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM journal").get)


def listed(connection: apsw.Connection) -> list[dict[str, Any]]:
    """Return what waits for somebody's decision: quarantined, held and released entries, oldest first, no words."""
    sql = """SELECT id, state, platform, channel, user, message_id, accepted_at, attempts FROM journal
             WHERE state < 2 AND state < 0 ORDER BY id"""
    names = ("id", "state", "platform", "channel", "user", "message_id", "accepted_at", "attempts")
    rows = [dict(zip(names, row, strict=True)) for row in connection.execute(sql)]
    return [{**row, "state": STATES[row["state"]]} for row in rows]


def release(connection: apsw.Connection, entry_id: int) -> bool:
    """Let a quarantined message be tried again, or a held reply be sent again; say whether there was one."""
    sql = """UPDATE journal SET attempts = 0, state = CASE
                 WHEN state = -1 THEN -3 WHEN reply IS NULL THEN 0 ELSE 1 END
             WHERE id = ? AND state IN (-1, -2)"""
    connection.execute(sql, (entry_id,))
    return bool(connection.changes())


def drop(connection: apsw.Connection, entry_id: int) -> bool:
    """Take an entry off the list for good: a held reply counts as sent, a quarantined message as failed."""
    sql = """UPDATE journal SET state = CASE WHEN state = -2 AND reply IS NULL THEN 3 ELSE 2 END
             WHERE id = ? AND state < 0"""
    connection.execute(sql, (entry_id,))
    return bool(connection.changes())
