"""Recent conversation: what a user and the bot last said to each other in one place.

A place is (user, platform, channel, scope): nobody finds another user's words there, and what was said in private is
not at hand in public. The newest turns stay in memory, the rest is read once from the store when a place is cold.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from . import clock
from .cache import Cache

if TYPE_CHECKING:
    from collections.abc import Callable

    import apsw

    from .message import ChatMessage, Message
    from .store.sqlite import Database

__all__ = ["Conversations"]

Key = tuple[str, str, str, str]
TURN_BYTES = 700  # what Python keeps for a turn beside its text


class Exchange(NamedTuple):
    """One turn: what the user said and what the bot answered, as it goes into every later prompt."""

    turn: int
    said: ChatMessage
    answered: ChatMessage
    size: int


Recent = deque[Exchange]


def place(message: Message) -> Key:
    return message.user, message.platform, message.channel, message.scope


def weight(recent: Recent) -> int:
    return 200 + sum(kept.size for kept in recent)


def exchange(turn: int, text: str, reply: str) -> Exchange:
    said, answered = {"role": "user", "content": text}, {"role": "assistant", "content": reply}
    return Exchange(turn, said, answered, TURN_BYTES + len(text) + len(reply))


class Conversations:
    """The recent conversations of all places.

    `bootstrap` turns are read for a cold place, at most `longest` are kept, for `ttl` seconds after the last one.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_bytes: int,
        ttl: float,
        bootstrap: int,
        longest: int,
        caching: Callable[[], bool],
    ) -> None:
        self._database = database
        self._bootstrap = bootstrap
        self._longest = longest
        self._caching = caching
        self._cache: Cache[Key, Recent] = Cache(max_bytes, weigher=weight, ttl=ttl, clock=clock.for_kernels())

    async def recent(self, message: Message) -> list[ChatMessage]:
        """Return the messages before `message` in its place, oldest first. Raises StoreError."""
        return chat(await self._recent(place(message)))

    async def warm(self, key: Key) -> None:
        """Bring a place into memory before its user writes."""
        await self._recent(key)

    def insert(self, connection: apsw.Connection, turn: int, message: Message, reply: str) -> None:
        """Store one turn; call it inside a write job. The same turn is stored once."""
        sql = "INSERT OR IGNORE INTO conversation VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        connection.execute(sql, (*place(message), turn, message.at, message.text, reply))

    def publish(self, turn: int, message: Message, reply: str) -> None:
        """Show a stored turn to the turns that follow, where the place is in memory."""
        key = place(message)
        recent = self._cache.get(key)
        if recent is None:
            self._cache.pop(key)  # a load that began before this turn was stored must not be kept
        elif all(turn != known.turn for known in recent):
            longer = Recent(recent, maxlen=self._longest)
            longer.append(exchange(turn, message.text, reply))
            self._cache.put(key, longer)

    def forget(self, user: str) -> None:
        """Drop what is in memory of `user`; the rows are the store's."""
        for key in self._cache.keys():  # noqa: SIM118 - a snapshot, not a view: entries go while we walk
            if key[0] == user:
                self._cache.pop(key)

    def clear(self) -> None:
        """Drop all that is in memory: somebody else has written the store."""
        self._cache.clear()

    async def _recent(self, key: Key) -> Recent:
        if not self._caching():
            return await self._load(key)
        return await self._cache.get_or_load(key, self._load)

    async def _load(self, key: Key) -> Recent:
        return await self._database.read(lambda connection: newest(connection, key, self._bootstrap, self._longest))


def newest(connection: apsw.Connection, key: Key, count: int, longest: int) -> Recent:
    sql = """SELECT turn, text, reply FROM conversation
             WHERE user = ? AND platform = ? AND channel = ? AND scope = ? ORDER BY turn DESC LIMIT ?"""
    rows = connection.execute(sql, (*key, min(count, longest))).fetchall()
    return Recent((exchange(*row) for row in reversed(rows)), maxlen=longest)


def chat(recent: Recent) -> list[ChatMessage]:
    return [message for kept in recent for message in (kept.said, kept.answered)]
