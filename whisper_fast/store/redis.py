"""Recent turns that several engines share, in Redis. Never the truth: all of it may vanish at any moment.

Each engine keeps its own turns in SQLite and takes only other engines' turns from here, so that nothing of its own is
missing, doubled or back after `forget`, whatever Redis does. A place is a sorted set of turns by time, and a turn is
always the same bytes: to write it twice changes nothing, so there is no lock that could be lost or taken by another.

Redis is `joined` while it answers within `LIMIT` and its news are heard. Else it is not asked at all, until a ping
comes back in time and it takes what is written; what was not told it meanwhile is told then, and what was read
without it is read again. Whoever is left soon after it was joined is looked at later each time, up to `LONGEST`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as Gone
from redis.exceptions import RedisError, ResponseError

from .. import clock
from ..errors import StoreError
from .atomic import write_atomically
from .forgotten import digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    from redis.asyncio.client import PubSub

__all__ = ["Row", "Shared", "Told", "node_of"]

log = logging.getLogger(__name__)

Key = tuple[str, str, str, str]  # user, platform, channel, scope
Row = tuple[int, float, str, str]  # turn, epoch seconds, text, reply

LIMIT = 0.003  # seconds that a reader waits for Redis when SQLite has answered
SLOW = 3  # such waits in a row that were for nothing, and it is left alone
PATIENCE = 0.5  # seconds for a connection or a reply, off the way of a message
PROBE = 0.25  # seconds between two looks whether it is well again
LONGEST = 1.0  # the same, once it was well in vain
STEADY = 5.0  # seconds for which it must be joined not to be well in vain
TEXTS = 20  # different troubles that are logged between two steady times
SILENCE = 3  # looks without any sign of life, and the line for news is taken for dead
OWED = 10_000  # places that are remembered to be written, or read, when it is back
BATCH = 256  # turns in one round trip


class Told(msgspec.Struct, frozen=True, array_like=True):
    """One turn as it stands in Redis; `node` is the engine that stored it, `turn` its number there."""

    node: str
    user: str
    turn: int
    at: float
    text: str
    reply: str


class News(msgspec.Struct, frozen=True, array_like=True):
    """What changed: a place, or with `place` None all of a user, or with user "" all of everybody."""

    node: str
    user: str
    place: tuple[str, str, str] | None


class Shared:
    """The recent turns of all engines of one `namespace`, at most `longest` a place, `ttl` seconds after the last.

    source    awaited with a place: the turns of it that this engine has on its disk
    changed   called with a place, a user, or None for all: what is held in memory of it is old
    untold    awaited: the digests of who was forgotten by this engine and perhaps not here
    tell      awaited with digests: they are forgotten here now
    """

    def __init__(
        self,
        node: str,
        *,
        host: str,
        port: int,
        password: str | None = None,
        namespace: str = "whisper-fast",
        longest: int,
        ttl: float,
        source: Callable[[Key], Awaitable[list[Row]]],
        changed: Callable[[Key | str | None], None],
        untold: Callable[[], Awaitable[list[str]]],
        tell: Callable[[list[str]], Awaitable[object]],
    ) -> None:
        self._client = Redis(
            host=host,
            port=port,
            password=password,
            socket_timeout=PATIENCE,
            socket_connect_timeout=PATIENCE,
            retry=Retry(NoBackoff(), 0),
        )
        self.node = node
        self._prefix = f"{namespace}:1:"
        self._longest = longest
        self._ttl = max(1, round(ttl * 1000))
        self._source = source
        self._changed = changed
        self._untold = untold
        self._told_of = tell
        self.joined = False
        self._joined_at = 0.0
        self._pause = PROBE
        self._troubles: dict[str, None] = {}  # that are logged
        self._listening = False
        self._late = 0
        self._asked: list[tuple[Key, asyncio.Future[list[Told] | None]]] = []
        self._asking = asyncio.Event()
        self._writing = asyncio.Event()
        self._telling = asyncio.Lock()
        self._pushes: list[tuple[Key, Row]] = []
        self._owed: dict[Key, None] = {}
        self._forgotten: dict[str, str] = {}  # digest -> user, "" where only the digest is known
        self._missed: dict[Key, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.counts = dict.fromkeys(("reads", "late", "pushes", "news", "joins", "refused"), 0)

    def start(self) -> None:
        """Look for Redis, for as long as this is open; messages do not wait for it."""
        works = {"read": self._read, "write": self._write, "listen": self._listen}
        self._tasks = [asyncio.create_task(work(), name=f"redis-{name}") for name, work in works.items()]

    async def close(self) -> None:
        """Tell what is still to be told, if Redis is there to hear it, and leave."""
        if self.joined:
            with suppress(TimeoutError):
                async with asyncio.timeout(2 * PATIENCE):
                    await self._tell()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.joined = False
        self._answer_all()
        await self._client.aclose()

    def stats(self) -> dict[str, int]:
        """Return the counters, and whether Redis is joined."""
        return {**self.counts, "joined": int(self.joined), "owed": len(self._owed) + len(self._pushes)}

    # ---- reading

    def ask(self, key: Key) -> asyncio.Future[list[Told] | None]:
        """Ask for the turns of a place; one round trip for all who ask meanwhile. Hand it to `answer`."""
        future: asyncio.Future[list[Told] | None] = asyncio.get_running_loop().create_future()
        if self.joined:
            self._asked.append((key, future))
            self._asking.set()
        else:
            remember(self._missed, key)
            future.set_result(None)
        return future

    async def answer(self, key: Key, asked: asyncio.Future[list[Told] | None]) -> list[Told] | None:
        """Return what was asked for, oldest first; None where Redis does not say so within `LIMIT`."""
        if not asked.done():
            await asyncio.wait({asked}, timeout=LIMIT)
        if asked.done():
            found = asked.result()
            self._late = 0 if found is not None else self._late
            return found
        asked.add_done_callback(lambda _: self._changed(key))
        self.counts["late"] += 1
        self._late += 1
        if self._late >= SLOW:
            self._leave(f"{SLOW} answers in a row took longer than {LIMIT * 1000:g} ms")
        return None

    async def _read(self) -> None:
        while True:
            await self._asking.wait()
            self._asking.clear()
            batch, self._asked = self._asked[:BATCH], self._asked[BATCH:]
            if self._asked:
                self._asking.set()
            try:
                await self._fetch(batch)
            except (RedisError, OSError) as error:
                self._leave(error)
            finally:
                for key, future in batch:
                    self._miss(key, future)

    async def _fetch(self, batch: list[tuple[Key, asyncio.Future[list[Told] | None]]]) -> None:
        async with self._client.pipeline(transaction=False) as pipe:
            for key, _ in batch:
                pipe.zrange(self._place(key), 0, -1)
            results = await pipe.execute(raise_on_error=False)
        self.counts["reads"] += len(batch)
        for (key, future), result in zip(batch, results, strict=True):
            if unwell(result):
                raise result
            if not future.done():
                future.set_result(self._checked(key, result))

    def _checked(self, key: Key, result: Any) -> list[Told]:
        """Return the turns that are whole and this user's; whoever can write to Redis can put anything there."""
        turns = []
        for data in result if isinstance(result, list) else ():
            try:
                told = msgspec.msgpack.decode(data, type=Told)
            except msgspec.MsgspecError:
                self.counts["refused"] += 1
                continue
            if told.user == key[0]:
                turns.append(told)
            else:
                self.counts["refused"] += 1
        return turns

    def _miss(self, key: Key, future: asyncio.Future[list[Told] | None]) -> None:
        if not future.done():
            remember(self._missed, key)
            future.set_result(None)

    # ---- writing

    def push(self, key: Key, row: Row) -> None:
        """Tell the other engines of a turn that is on the disk; soon, or when Redis is back."""
        if self.joined and len(self._pushes) < OWED:
            self._pushes.append((key, row))
        else:
            remember(self._owed, key)
        self._writing.set()

    def owe(self, key: Key) -> None:
        """Tell the other engines of all turns of a place that are on the disk."""
        remember(self._owed, key)
        self._writing.set()

    def forget(self, user: str) -> None:
        """Delete a user's places, now or when Redis is back."""
        self._pushes = [push for push in self._pushes if push[0][0] != user]
        self._owed = {key: None for key in self._owed if key[0] != user}
        self._forgotten[digest(user)] = user
        self._writing.set()

    async def _write(self) -> None:
        await self._recall_forgotten()
        await self._look()
        while True:
            if not self.joined:
                await asyncio.sleep(self._pause)
                await self._look()
                continue
            await self._writing.wait()
            if self.joined:
                await self._tell()

    async def _recall_forgotten(self) -> None:
        try:
            self._forgotten = dict.fromkeys(await self._untold(), "") | self._forgotten
        except StoreError as error:
            log.warning("who was forgotten before is not told to Redis: %s", error)

    async def _look(self) -> None:
        began = clock.monotonic()
        try:
            await self._client.ping()
            if clock.monotonic() - began > 2 * LIMIT:
                self._warn(f"a ping took longer than {2000 * LIMIT:g} ms")
            elif self._listening:
                await self._client.set(f"{self._prefix}{{well}}", self.node, px=1)  # it takes what is written
                self._join()
        except (RedisError, OSError) as error:
            self._warn(error)

    async def _tell(self) -> None:
        async with self._telling:
            await self._tell_all()

    async def _tell_all(self) -> None:
        self._writing.clear()
        pushes, self._pushes = self._pushes, []
        owed, self._owed = self._owed, {}
        try:
            await self._delete(list(self._forgotten.items()))
            for at in range(0, len(pushes), BATCH):
                await self._add([(key, [row]) for key, row in pushes[at : at + BATCH]])
            while owed:
                key = next(iter(owed))
                await self._add([(key, await self._source(key))], whole=True)
                del owed[key]
        except (RedisError, OSError, StoreError) as error:
            self._leave(error)
            for key in [*(key for key, _ in pushes), *owed]:
                remember(self._owed, key)

    async def _delete(self, forgotten: list[tuple[str, str]]) -> None:
        for name, user in forgotten:
            index = self._index(name)
            await self._client.delete(index, *await self._members(index))
            await self._client.publish(self._channel, encode(News(self.node, user, None)))
        if forgotten:
            await self._told_of([name for name, _ in forgotten])
        for name, _ in forgotten:
            self._forgotten.pop(name, None)

    async def _members(self, index: str) -> Iterable[Any]:
        try:
            return await self._client.smembers(index)
        except ResponseError as error:
            if unwell(error):
                raise
            self._warn(f"an index of places is none: {error}")
            return ()

    async def _add(self, places: list[tuple[Key, list[Row]]], *, whole: bool = False) -> None:
        """Write turns; `whole` says that there are no others of the place on the disk."""
        places = [(key, turns) for key, turns in places if turns]
        if not places:
            return
        async with self._client.pipeline(transaction=False) as pipe:
            for key, turns in places:
                name, index = self._place(key), self._index(digest(key[0]))
                pipe.zadd(name, {encode(self._told(key, row)): row[1] for row in turns})
                pipe.zremrangebyrank(name, 0, -(self._longest + 1))
                pipe.pexpire(name, self._ttl)
                pipe.sadd(index, name)
                pipe.pexpire(index, self._ttl)
                pipe.publish(self._channel, encode(News(self.node, key[0], key[1:])))
                pipe.zcard(name)
            results = await pipe.execute(raise_on_error=False)
        for result in results:
            if unwell(result):
                raise result
        for at, (key, turns) in enumerate(places):
            answers = results[7 * at : 7 * at + 7]
            if any(isinstance(answer, Exception) for answer in answers):
                await self._mend(key, answers)
                continue
            self.counts["pushes"] += len(turns)
            if not whole and answers[6] == len(turns) == 1:  # a place that is new or was lost: it gets all
                self.owe(key)

    async def _mend(self, key: Key, answers: list[Any]) -> None:
        """Owe a place that was not taken; where something else stands under its name, that goes."""
        error = next(answer for answer in answers if isinstance(answer, Exception))
        self._warn(f"a turn was not taken: {error}")
        remember(self._owed, key)
        if str(error).startswith("WRONGTYPE"):
            place = isinstance(answers[0], Exception)
            await self._client.delete(self._place(key) if place else self._index(digest(key[0])))
            self._writing.set()

    def _told(self, key: Key, row: Row) -> Told:
        turn, at, text, reply = row
        return Told(self.node, key[0], turn, float(at), text, reply)

    # ---- listening

    async def _listen(self) -> None:
        while True:
            try:
                async with self._client.pubsub() as line:
                    await line.subscribe(self._channel)
                    await self._hear(line)
            except (RedisError, OSError) as error:
                self._leave(error)
            finally:
                self._listening = False
            await asyncio.sleep(PROBE)

    async def _hear(self, line: PubSub) -> None:
        silent = 0
        while silent < SILENCE:
            message = await line.get_message(timeout=PATIENCE)
            silent = silent + 1 if message is None else 0
            if message is None:
                await line.ping()
            elif message["type"] == "subscribe":
                self._listening = True
                self._changed(None)  # nobody told us what changed before
            elif message["type"] == "message":
                self._learn(message["data"])
        raise Gone("no sign of life")

    def _learn(self, data: bytes) -> None:
        try:
            news = msgspec.msgpack.decode(data, type=News)
        except msgspec.MsgspecError:
            self.counts["refused"] += 1
            return
        if news.node != self.node:
            self.counts["news"] += 1
            self._changed((news.user, *news.place) if news.place is not None else news.user or None)

    # ---- being joined

    def _join(self) -> None:
        self.joined = True
        self._joined_at = clock.monotonic()
        self._late = 0
        self.counts["joins"] += 1
        missed, self._missed = self._missed, {}
        for key in missed:
            self._changed(key)
        self._writing.set()
        log.info("Redis is joined")

    def _leave(self, why: object) -> None:
        if self.joined:
            steady = clock.monotonic() - self._joined_at > STEADY
            self._pause = PROBE if steady else min(2 * self._pause, LONGEST)
            if steady:
                self._troubles.clear()
            why = f"it is left alone until it is well: {why}"
        self.joined = False
        self._warn(why)
        self._writing.set()
        self._answer_all()

    def _warn(self, why: object) -> None:
        """Log a trouble unless it was logged since Redis was last joined for a while."""
        text = str(why)
        if text not in self._troubles and len(self._troubles) < TEXTS:
            self._troubles[text] = None
            log.warning("Redis: %s", text)

    def _answer_all(self) -> None:
        asked, self._asked = self._asked, []
        for key, future in asked:
            self._miss(key, future)

    # ---- names

    @property
    def _channel(self) -> str:
        return f"{self._prefix}changed"

    def _index(self, name: str) -> str:
        return f"{self._prefix}{{{name}}}:places"

    def _place(self, key: Key) -> str:
        return f"{self._prefix}{{{digest(key[0])}}}:{digest(key)}"


encode = msgspec.msgpack.Encoder().encode


def node_of(folder: Path) -> str:
    """Return the name of the engine whose data `folder` is, given at the first call. Raises StoreError."""
    path = folder / "node"
    try:
        if name := path.read_text(encoding="ascii").strip():
            return name
    except (OSError, UnicodeError):
        pass  # it has none yet, or one that cannot be read
    name = secrets.token_hex(8)
    write_atomically(path, [name.encode()])
    return name


def unwell(result: object) -> bool:
    """Whether a reply says that the server cannot serve now, or not us; any other error is about one key."""
    if not isinstance(result, Exception):
        return False
    word = str(result).partition(" ")[0]  # WRONGTYPE; the code of others where the client has no class for it
    return type(result) is not ResponseError or (word.isupper() and word != "WRONGTYPE")


def remember(keys: dict[Key, None], key: Key) -> None:
    """Note a place; beyond `OWED` the oldest is given up."""
    keys[key] = None
    if len(keys) > OWED:
        del keys[next(iter(keys))]
