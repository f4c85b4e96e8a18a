"""The memories of all users: each has a segment of its own, and there is no question that spans two of them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from ..cache import Cache
from ..errors import InvalidMessage, WhisperFastError
from ..flags import either, logged
from ..message import Recalled, checked_user
from ..models.embedder import StaticEmbedder
from ..store.files import DATABASE
from ..store.schema import everyone
from ..store.sqlite import Database
from . import rows
from .chroma import ChromaMemory
from .embedding import Embedding, checked
from .indexing import Indexing
from .item import Item, as_item, checked_question
from .pending import Pending
from .recalling import Recalling
from .reembedding import Reembedding
from .segment import TERM_CHARACTERS, Segment, item_terms
from .words import words

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
    from datetime import datetime

    import apsw
    import numpy as np
    from numpy.typing import NDArray

    from ..models.embedder import Embedder
    from .index import Index

__all__ = ["MemoryStore"]

log = logging.getLogger(__name__)
T = TypeVar("T")

CACHE_BYTES: Final = 256 << 20
INLINE_CHARACTERS: Final = 16_384  # so many characters are cut into terms on the loop, in about a millisecond
ANN_ROWS: Final = 1_000_000  # benches/bench_index.py: below 200,000 a whole recall is not quicker through hnswlib
INLINE_ITEMS: Final = 256  # so many memories are checked and shown on the loop; a longer list is read back instead
PAGE: Final = 500  # memories read at a time by an export


class MemoryStore:
    """What is remembered of each user, on disk and, for those who were here lately, in memory.

    embed        `await embed(texts, user=, priority=)` in place of `embedder.embed`, say through a batcher
    cache_bytes  how much the segments of all users may take in memory together
    batching     whether questions that come together are answered together; asked each time
    caching      whether segments and vectors of questions are kept; asked each time
    ann          whether users with `ann_rows` memories or more are searched through hnswlib; asked each time
    failed       told by its flag's name which of these raised; the plain way was taken

    `start` begins what goes on in the background, `close` ends it. Every method raises InvalidMessage for a user,
    scope or value that cannot be, StoreError for what the disk does.
    """

    def __init__(
        self,
        database: Database,
        embedder: Embedder,
        *,
        embed: Callable[..., Awaitable[Any]] | None = None,
        cache_bytes: float = CACHE_BYTES,
        batching: Callable[[], bool] = lambda: True,
        caching: Callable[[], bool] = lambda: True,
        ann: Callable[[], bool] = lambda: True,
        ann_rows: int = ANN_ROWS,
        failed: Callable[[str, Exception], None] = logged,
    ) -> None:
        self._database = database
        self._embed = Embedding(embedder, embed, caching)
        self._embedder = embedder
        self._caching = caching
        self._failed = failed
        self._cache: Cache[str, Segment] = Cache(cache_bytes, weigher=attrgetter("nbytes"))
        self._changes = 0  # how often something was taken away: what was prepared before is not shown, but read again
        self._recalling = Recalling(batching)
        self._writes: set[asyncio.Task[Any]] = set()
        self._indexing = Indexing(database, embedder, at_least=ann_rows, max_bytes=cache_bytes, enabled=ann)
        self._reembedding = Reembedding(database, self._embed, self._renewed)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: str | os.PathLike[str], embedder: Embedder | None = None
    ) -> AsyncIterator[MemoryStore | ChromaMemory]:
        """Open a store of its own in a folder, or in the file `path` if that ends in `.db`; close it at the end.

        Without an embedder the static one of this package is used. The address of a Chroma server gives its memories
        behind the same calls (`ChromaMemory`). Raises SettingsError, StoreError.
        """
        embedder = embedder if embedder is not None else await asyncio.to_thread(StaticEmbedder)
        async with AsyncExitStack() as stack:
            if isinstance(path, str) and "://" in path:
                yield await stack.enter_async_context(ChromaMemory.open(path, embedder))
                return
            place = Path(path)
            folder, name = (place.parent, place.name) if place.suffix == ".db" else (place, DATABASE)
            database = await Database.open(folder, name=name)
            stack.push_async_callback(database.close)
            store = cls(database, embedder)
            database.on_foreign_change(store.clear_cache)
            stack.push_async_callback(store.close)
            await store.start()
            yield store

    async def start(self) -> None:
        """Read what all recalls need, and begin to embed again in the background what another embedder has left."""
        await asyncio.to_thread(words)  # else the first recall would do it on the loop
        self._reembedding.wake()

    async def close(self) -> None:
        """Store what was handed in, and end what goes on in the background; the next start takes it up."""
        await self._reembedding.close()
        await self.settle()
        await self._recalling.close()
        await self._indexing.close()

    async def reembedded(self) -> dict[str, Any]:
        """Wait until every memory has been through the present embedder; return the counts, see `stats`."""
        await self._reembedding.finished()
        return self._reembedding.stats()

    async def add(
        self,
        user: str,
        text: str,
        *,
        scope: str = "dm",
        at: datetime | float | None = None,
        speaker: str | None = None,
        session: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        source: str | None = None,
    ) -> int:
        """Remember a text; return its id, counted per user from 1, when it is on the disk.

        `scope` says where it was told, `at` when (None: now). `session` names the conversation it belongs to; without
        one a pause of 30 minutes ends a session. What has the same `source` is stored once.
        """
        item = {"text": text, "scope": scope, "at": at, "speaker": speaker, "session": session}
        [number] = await self.add_many(user, [{**item, "metadata": metadata, "source": source}])
        return number

    async def add_many(self, user: str, items: Iterable[str | Mapping[str, Any]]) -> list[int]:
        """Remember texts, or mappings of `add`'s arguments, all or none; return their ids."""
        pending = await self.prepare(user, items)
        return await self._write(pending.insert, lambda _: self.publish(pending))

    async def add_new(self, user: str, items: Iterable[str | Mapping[str, Any]]) -> int:
        """Remember as `add_many` does; return how many of them were not known by their `source`."""
        pending = await self.prepare(user, items)
        await self._write(pending.insert, lambda _: self.publish(pending))
        return pending.new

    async def prepare(self, user: str, items: Iterable[str | Mapping[str, Any]], *, vectors: Any = None) -> Pending:
        """Check and embed memories. `vectors`, if known, are [len(items), dimension]; else the embedder is asked.

        What comes back is stored by its `insert`, in a write job, and after that shown by `publish`.
        """
        checked_user(user)
        given = list(items)
        checked_items = as_items(given) if len(given) <= INLINE_ITEMS else await asyncio.to_thread(as_items, given)
        if vectors is None:
            vectors = await self._vectors(user, [item.text for item in checked_items])
        else:
            vectors = checked(vectors, len(checked_items), self._embedder)
        new = partial(Pending, user, checked_items, vectors, self._embedder, self._changes)
        if sum(min(len(item.text), TERM_CHARACTERS) for item in checked_items) <= INLINE_CHARACTERS:
            return new()
        return await asyncio.to_thread(new)

    def publish(self, pending: Pending) -> None:
        """Show stored memories to the recalls that follow; on the loop, after the commit."""
        try:
            self._show(pending)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the cache: the truth is on the disk
            self._cache.clear()
            self._failed("caching", error)

    def _show(self, pending: Pending) -> None:
        if pending.bare:
            self._reembedding.wake()
        self._indexing.added(pending.user)
        segment = self._cache.get(pending.user)
        if segment is None or pending.changes != self._changes or len(pending.ids) > INLINE_ITEMS:
            self._cache.pop(pending.user)  # also tells a load that runs that it may have read too early
            return
        try:
            pending.extend(segment)
        except BaseException:
            self._cache.pop(pending.user)  # half an append is worse than none: the truth is read again
            raise
        self._cache.reweigh(pending.user)

    async def recall(
        self, user: str, query: str, *, k: int = 10, scope: str = "dm", vector: Any = None
    ) -> list[Recalled]:
        """Return at most `k` memories of `user` that fit `query`, best first, of those that `scope` may see.

        `vector`, if known, is the query's, [dimension]; an empty one means: by words alone.
        """
        query = checked_question(user, query, k, scope)
        segment = await self._segment(user)
        if not k or not segment:
            return []
        if vector is None:
            [vector] = await self._embed.questions([query], user=user)
        else:
            vector = checked([vector], 1, self._embedder)[0] if len(vector) else None
        return await self._ask(user, segment, query, vector, k, scope)

    async def recall_many(
        self, questions: Iterable[tuple[str, str]], *, k: int = 10, scope: str = "dm"
    ) -> list[list[Recalled]]:
        """Answer many (user, query), each from that user's memories alone; the queries are embedded together."""
        asked = [(user, checked_question(user, query, k, scope)) for user, query in questions]
        vectors = await self._embed.questions([query for _, query in asked])
        answers = (
            self.recall(user, query, k=k, scope=scope, vector=vector)
            for (user, query), vector in zip(asked, vectors, strict=True)
        )
        return list(await asyncio.gather(*answers))

    async def forget(self, user: str) -> None:
        """Delete all that is remembered of `user`."""
        checked_user(user)
        await self._write(partial(rows.delete_user, user=user), lambda _: self._drop(user))
        await self._indexing.forget(user)

    async def forget_everyone(self) -> None:
        """Delete all that is remembered of all users, of one after the other."""
        for user in await self._database.read(everyone):
            await self.forget(user)

    async def delete(self, user: str, number: int) -> bool:
        """Delete one memory by its id; return whether it was there."""
        checked_user(user)
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidMessage(f"id is {number!r:.80}; it must be what add returned")
        return await self._write(partial(rows.delete, user=user, number=number), lambda _: self._drop(user, number))

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        """Yield all memories of `user` in their order, as `add_many` takes them."""
        checked_user(user)
        after = 0
        while found := await self._database.read(partial(rows.page, user=user, after=after, size=PAGE)):
            for after, item in found:  # noqa: B007 - the last one is where the next page begins
                yield item.as_dict()

    async def warm(self, user: str, *, guess: bool = False) -> bool:
        """Bring a user's memories into memory before they are asked for; say whether they were not there.

        A `guess` takes only room that is free, and is the first to go.
        """
        checked_user(user)
        if not self._caching() or user in self._cache:
            return False
        await self._cache.warm(user, self._load, guess=guess)
        return True

    def cool(self, user: str) -> None:
        """Let go of what `warm` has read and nobody asked for."""
        self._cache.pop(user)

    def clear_cache(self) -> None:
        """Drop all segments, they are read again when they are needed: somebody else has written the store."""
        self._changes += 1
        self._cache.clear()
        self._indexing.drop()
        self._reembedding.wake()

    async def settle(self) -> None:
        """Wait until what was handed in is on the disk, whoever stopped waiting for it."""
        if self._writes:
            await asyncio.wait(self._writes)

    def caches(self) -> dict[str, Cache[str, Any]]:
        """Return what is kept in memory and can be read again: its bounds may be changed."""
        return {"segments": self._cache, "indexes": self._indexing.cache, "questions": self._embed.cache}

    def stats(self) -> dict[str, Any]:
        """Return what is held in memory and how often it served."""
        cache = self._cache.stats()
        return {
            "segments": cache.entries,
            "bytes": int(cache.weight),
            "hits": cache.hits,
            "misses": cache.misses,
            "loads": cache.loads,
            "evictions": cache.evictions,
            "recalling": msgspec.to_builtins(self._recalling.stats()),
            "index": self._indexing.stats(),
            "reembedding": self._reembedding.stats(),
        }

    async def _ask(
        self, user: str, segment: Segment, query: str, vector: NDArray[np.float32] | None, k: int, scope: str
    ) -> list[Recalled]:
        index = self._indexing.of(user, len(segment)) if vector is not None else None
        scan = partial(answer, segment, query, vector, k, scope)
        exactly = partial(asyncio.to_thread, scan)
        if index is not None:
            return await either("ann", partial(asyncio.to_thread, scan, index), exactly, self._failed)
        question = segment.question(query, vector, k, scope) if len(query) <= INLINE_CHARACTERS else None
        if question is None:
            return await exactly()
        together = partial(self._recalled, segment, question, user)
        return await either("batching", together, exactly, self._failed)

    async def _recalled(self, segment: Segment, question: Any, user: str) -> list[Recalled]:
        return segment.recalled(await self._recalling(question, user))

    async def _vectors(self, user: str, texts: list[str]) -> NDArray[np.float32] | None:
        """Return the vectors of memories; None where the embedder may answer later: they are stored without."""
        try:
            return await self._embed(texts, user=user)
        except WhisperFastError as error:
            if not error.retriable:
                raise
            log.warning("%d memories are stored without vectors, which come later: %s", len(texts), error)
            return None

    def _renewed(self, users: Iterable[str]) -> None:
        """Read the segments of these users again: their vectors have changed."""
        for user in users:
            self._cache.pop(user)
            self._indexing.drop(user)

    async def _segment(self, user: str) -> Segment:
        if not self._caching():
            return await self._load(user)
        cached, plain = partial(self._cache.get_or_load, user, self._load), partial(self._load, user)
        return await either("caching", cached, plain, self._failed)

    async def _load(self, user: str) -> Segment:
        return await self._database.read(partial(built, user=user, embedder=self._embedder))

    async def _write(self, job: Callable[[apsw.Connection], T], then: Callable[[T], None]) -> T:
        """Run a write job, and `then` once it is on the disk, even if the caller stops waiting."""

        async def write() -> T:
            result = await self._database.write(job)
            then(result)
            return result

        task = asyncio.create_task(write(), name="memory-write")
        self._writes.add(task)
        task.add_done_callback(self._written)
        return await asyncio.shield(task)

    def _written(self, task: asyncio.Task[Any]) -> None:
        self._writes.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if nobody waits for it any more

    def _drop(self, user: str, number: int | None = None) -> None:
        self._changes += 1
        segment = self._cache.get(user)
        if number is not None:
            self._indexing.removed(user, number)
        if segment is None or number is None:
            self._cache.pop(user)
        else:
            segment.remove(number)


def as_items(given: list[str | Mapping[str, Any]]) -> list[Item]:
    return [as_item(item) for item in given]


def answer(
    segment: Segment,
    query: str,
    vector: NDArray[np.float32] | None,
    k: int,
    scope: str,
    index: Index | None = None,
) -> list[Recalled]:
    if index is not None and vector is not None and vector.any():
        found = segment.recall_near(query, vector, k, scope, index)
        if found is not None:
            return found
    return segment.recall(query, vector, k, scope)


def built(connection: apsw.Connection, user: str, embedder: Embedder) -> Segment:
    """Return the segment of a user; what another embedder knew is found by its words until it is renewed.

    Each memory goes from the cursor into the segment: a list of them all would wake the garbage collector.
    """
    segment = Segment(embedder.dimension)
    for number, item, vector in rows.select(connection, user, embedder):
        segment.append(number, item, vector or rows.NO_VECTOR, item_terms(item))
    return segment
