"""Recent conversation: what a user and the bot last said to each other in one place.

A place is (user, platform, channel, scope): nobody finds another user's words there, and what was said in private is
not at hand in public. The newest turns stay in memory, the rest is read once from the store when a place is cold.
Where engines share a Redis, a place also holds what the user and the other engines said there, in the order of time.
"""

from __future__ import annotations

import sys
from collections import deque
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from . import clock
from .cache import Cache
from .flags import either, logged
from .prompt import History, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import apsw

    from .message import ChatMessage, Message
    from .store.redis import Row, Shared
    from .store.sqlite import Database

__all__ = ["Conversations"]

Key = tuple[str, str, str, str]


class Exchange(NamedTuple):
    """One turn: what the user said and what the bot answered, as it goes into every later prompt.

    `node` is the engine that stored it, "" for this one, and `turn` its number there; `messages` is what was said and
    answered, `tokens` what the prompt reckons for each of the two, `size` the bytes that their texts take.
    """

    node: str
    turn: int
    at: float
    messages: tuple[ChatMessage, ChatMessage]
    tokens: tuple[int, int]
    size: int


Recent = deque[Exchange]
TURN, MESSAGES, TOKENS, SIZE = map(attrgetter, ("turn", "messages", "tokens", "size"))


def place(message: Message) -> Key:
    return message.user, message.platform, message.channel, message.scope


def weight(key: Key, recent: Recent) -> int:
    """Return the bytes that an entry takes in memory, its key's texts included."""
    texts: int = sum(map(SIZE, recent))
    return EMPTY_BYTES + sum(map(sys.getsizeof, key)) + len(recent) * TURN_BYTES + texts


def exchange(turn: int, at: float, text: str, reply: str, node: str = "") -> Exchange:
    messages = {"role": "user", "content": text}, {"role": "assistant", "content": reply}
    size = sys.getsizeof(text) + sys.getsizeof(reply)
    return Exchange(node, turn, at, messages, (words(text), words(reply)), size)


SAMPLE = exchange(1 << 20, 1.0, "", "")
EMPTY_BYTES = sys.getsizeof(deque()) + sys.getsizeof(("",) * 4)
TURN_BYTES = sum(map(sys.getsizeof, (SAMPLE, *SAMPLE[1:], *SAMPLE.messages)))  # kept for a turn beside its texts


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
        failed: Callable[[str, Exception], None] = logged,
    ) -> None:
        self._database = database
        self._bootstrap = min(bootstrap, longest)
        self._longest = longest
        self._caching = caching
        self._failed = failed
        self._cache: Cache[Key, Recent] = Cache(
            max_bytes, weigher=weight, ttl=ttl, on_evict=self._gone, clock=clock.for_kernels()
        )
        self._places: dict[str, set[Key]] = {}  # by user: what is held, or was lately asked for
        self._shared: Shared | None = None

    def share(self, shared: Shared) -> None:
        """Tell other engines what is said here, and hear what is said there."""
        self._shared = shared

    async def recent(self, message: Message) -> History:
        """Return the messages before `message` in its place, oldest first. Raises StoreError."""
        return chat(await self._recent(place(message)))

    async def warm(self, user: str, seconds: float | None = None) -> None:
        """Load where `user` wrote last, as a guess for `seconds` or else for as long as usual. Raises StoreError."""
        if not self._caching() or (key := await self._database.read(partial(latest, user=user))) is None:
            return
        await self._cache.warm(key, self._load, guess=seconds is not None, ttl=seconds)

    def insert(self, connection: apsw.Connection, turn: int, message: Message, reply: str) -> None:
        """Store one turn; call it inside a write job. The same turn is stored once."""
        sql = "INSERT OR IGNORE INTO conversation VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        connection.execute(sql, (*place(message), turn, message.at, message.text, reply))

    def publish(self, turn: int, message: Message, reply: str) -> None:
        """Show a stored turn to the turns that follow, where the place is in memory, and to other engines."""
        key = place(message)
        new = exchange(turn, message.at, message.text, reply)
        try:
            self._show(key, new)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the cache: the truth is on the disk
            self.changed(None)
            self._failed("caching", error)
        if self._shared is not None:
            self._shared.push(key, row(new))

    def _show(self, key: Key, new: Exchange) -> None:
        turn, recent = new.turn, self._cache.peek(key)
        if recent is None:
            self._cache.pop(key)  # a load that began before this turn was stored must not be kept
        elif turn not in map(TURN, recent) or all(kept.turn != turn or kept.node for kept in recent):
            longer = Recent(recent, maxlen=self._longest)
            longer.append(new)
            self._cache.put(key, longer)

    def forget(self, user: str) -> None:
        """Drop what is in memory of `user`, and in Redis; the rows are the store's."""
        self.changed(user)
        if self._shared is not None:
            self._shared.forget(user)

    def changed(self, what: Key | str | None) -> None:
        """Drop what is in memory of a place, of a user, or, with None, of all: somebody else knows better."""
        if what is None:
            self._cache.clear()
            self._places.clear()
        elif isinstance(what, tuple):
            self._cache.pop(what)
            self._gone(what)
        else:
            for key in self._places.pop(what, ()):
                self._cache.pop(key)

    async def stored(self, key: Key) -> list[Row]:
        """Return the newest turns of a place that this engine has on its disk, oldest first. Raises StoreError."""
        return [row(kept) for kept in await self._read(key, self._longest)]

    @property
    def cache(self) -> Cache[Key, Recent]:
        """What is kept in memory and can be read again: its bound may be changed."""
        return self._cache

    def stats(self) -> dict[str, float]:
        """Return what is held in memory and how often it served."""
        cache = self._cache.stats()
        return {
            "places": cache.entries,
            "bytes": cache.weight,
            "hits": cache.hits,
            "misses": cache.misses,
            "loads": cache.loads,
            "evictions": cache.evictions,
        }

    async def _recent(self, key: Key) -> Recent:
        if not self._caching():
            return await self._read(key, self._bootstrap)
        cached, plain = partial(self._cache.get_or_load, key, self._load), partial(self._read, key, self._bootstrap)
        return await either("caching", cached, plain, self._failed)

    def _gone(self, key: Key, _: Recent | None = None) -> None:
        if (keys := self._places.get(key[0])) is not None:
            keys.discard(key)
            if not keys:
                del self._places[key[0]]

    async def _load(self, key: Key) -> Recent:
        self._places.setdefault(key[0], set()).add(key)
        try:
            return await self._gather(key)
        except BaseException:
            self._gone(key)
            raise

    async def _gather(self, key: Key) -> Recent:
        if self._shared is None:
            return await self._read(key, self._bootstrap)
        asked = self._shared.ask(key)  # both are asked at once
        own = await self._read(key, self._bootstrap)
        told = await self._shared.answer(key, asked)
        if told is None:
            return own
        held = {one.turn for one in told if one.node == self._shared.node}
        if not held.issuperset(kept.turn for kept in own):
            self._shared.owe(key)
        others = [
            exchange(one.turn, one.at, one.text, one.reply, one.node) for one in told if one.node != self._shared.node
        ]
        return Recent(merged(own, others)[-self._bootstrap :] if self._bootstrap else (), maxlen=self._longest)

    async def _read(self, key: Key, count: int) -> Recent:
        return await self._database.read(lambda connection: newest(connection, key, count, self._longest))


def newest(connection: apsw.Connection, key: Key, count: int, longest: int) -> Recent:
    sql = """SELECT turn, at, text, reply FROM conversation
             WHERE user = ? AND platform = ? AND channel = ? AND scope = ? ORDER BY turn DESC LIMIT ?"""
    rows = connection.execute(sql, (*key, count)).fetchall()
    return Recent((exchange(*row) for row in reversed(rows)), maxlen=longest)


def latest(connection: apsw.Connection, user: str) -> Key | None:
    """Return the place of the user's newest turn; None for somebody who never wrote."""
    sql = "SELECT user, platform, channel, scope FROM conversation WHERE user = ? ORDER BY turn DESC LIMIT 1"
    row = connection.execute(sql, (user,)).fetchone()
    return None if row is None else (row[0], row[1], row[2], row[3])


def merged(own: Iterable[Exchange], others: list[Exchange]) -> list[Exchange]:
    """Return both in the order of time; own turns keep their own order whatever the clock did between them."""
    others.sort(key=lambda kept: (kept.at, kept.node, kept.turn))
    result, at = [], 0
    for kept in own:
        while at < len(others) and others[at].at <= kept.at:
            result.append(others[at])
            at += 1
        result.append(kept)
    return result + others[at:]


def row(kept: Exchange) -> Row:
    said, answered = kept.messages
    return kept.turn, kept.at, said["content"], answered["content"]


def chat(recent: Recent) -> History:
    messages, tokens = map(MESSAGES, recent), map(TOKENS, recent)
    return History(chain.from_iterable(messages), list(chain.from_iterable(tokens)))
