"""Which users have an index, and how it is built, followed, kept and dropped while recalls go on."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from ..cache import Cache
from ..errors import StoreError
from . import rows
from .index import Content, Index, available

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from ..models.embedder import Embedder
    from ..store.sqlite import Database

__all__ = ["Indexing"]

log = logging.getLogger(__name__)

UNSAVED: Final = 0.1  # share of an index that may have changed before it is written again


class Indexing:
    """The indexes of one store's users, made in threads from SQLite, which stays the truth.

    An index comes at the first recall over at least `at_least` memories: from its file if that is of exactly what
    the store holds, else built anew. Until then, and whenever it is being changed, recalls are exact. `enabled` is
    asked each time; without hnswlib there are no indexes.
    """

    def __init__(
        self,
        database: Database,
        embedder: Embedder,
        *,
        at_least: int,
        max_bytes: float,
        enabled: Callable[[], bool] = lambda: True,
    ) -> None:
        self._database = database
        self._embedder = embedder
        self._folder = database.folder / "indexes"
        self._at_least = at_least
        self._enabled = enabled
        self._indexes: Cache[str, Index] = Cache(max_bytes, weigher=attrgetter("nbytes"))
        self._deleted: dict[str, list[int]] = {}
        self._work: dict[str, asyncio.Task[None]] = {}
        self._saved: dict[str, int] = {}  # what is loaded -> how many memories its file holds
        self._installed = available()
        self._closed = False
        self._counts = dict.fromkeys(("built", "loaded", "refused"), 0)

    def of(self, user: str, size: int) -> Index | None:
        """Return the index of a user with `size` memories; None, and one is made ready, where there is none yet."""
        if size < self._at_least or not self._installed or not self._enabled():
            return None
        index = self._indexes.get(user)
        if index is None or index.worn:
            self._start(user, self._make)
            return None
        return index

    def added(self, user: str) -> None:
        """Say that the store holds further memories of `user`."""
        if user in self._indexes:
            self._start(user, self._follow)

    def removed(self, user: str, number: int) -> None:
        """Say that a memory is gone."""
        if user in self._indexes or user in self._work:
            self._deleted.setdefault(user, []).append(number)
            self.added(user)

    async def forget(self, user: str) -> None:
        """Drop the index of `user`, and its file."""
        self.drop(user)
        await asyncio.to_thread(self._path(user).unlink, missing_ok=True)

    def drop(self, user: str | None = None) -> None:
        """Drop an index, or all: what they were made of has changed otherwise than by single memories."""
        for name in [user] if user is not None else [*self._work, *self._saved]:
            self._indexes.pop(name)
            self._deleted.pop(name, None)
            self._saved.pop(name, None)
            if (task := self._work.pop(name, None)) is not None:
                task.cancel()

    @property
    def cache(self) -> Cache[str, Index]:
        """The indexes that are in memory."""
        return self._indexes

    async def close(self) -> None:
        """End the work that goes on, and write what has changed."""
        self._closed = True
        tasks = list(self._work.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for user, size in list(self._saved.items()):
            index = self._indexes.get(user)
            if index is not None and len(index) != size:
                await self._save(user, index)
        self._indexes.clear()

    def stats(self) -> dict[str, int]:
        """Return how many indexes there are, their bytes, how they came, and how many are being worked at."""
        held = self._indexes.stats()
        return {"held": held.entries, "bytes": int(held.weight), **self._counts, "at_work": len(self._work)}

    def _start(self, user: str, work: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        if user in self._work or self._closed:
            return
        task = self._work[user] = asyncio.create_task(work(user), name="memory-index")
        task.add_done_callback(partial(self._ended, user))

    def _ended(self, user: str, task: asyncio.Task[None]) -> None:
        if self._work.get(user) is task:
            del self._work[user]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("an index could not be made ready, recalls stay exact: %s", error)

    async def _make(self, user: str) -> None:
        self._indexes.pop(user)
        content = await self._content(user)
        index = await asyncio.to_thread(self._loaded, self._path(user), content)
        if index is not None:
            self._counts["loaded"] += 1
            self._saved[user] = len(index)
        else:
            index = await asyncio.to_thread(Index.built, content)
            self._counts["built"] += 1
            self._saved[user] = 0
        self._indexes.put(user, index)
        await self._follow(user)

    async def _follow(self, user: str) -> None:
        """Bring an index up to what the store holds, and write it when much has changed."""
        index = self._indexes.get(user)
        while index is not None:
            gone = self._deleted.pop(user, [])
            for number in gone:
                await asyncio.to_thread(index.remove, number)
            content = await self._content(user, index.highest)
            if not len(content.ids) and not gone:
                break
            await asyncio.to_thread(index.add, content.ids.tolist(), content.vectors())
            self._indexes.reweigh(user)
        if index is not None and abs(len(index) - self._saved.get(user, 0)) > UNSAVED * len(index):
            await self._save(user, index)

    async def _save(self, user: str, index: Index) -> None:
        content = await self._content(user)
        if not index.holds(content):
            return
        try:
            await asyncio.to_thread(index.save, self._path(user), content.stamp())
            self._saved[user] = len(index)
        except StoreError as error:
            log.warning("an index was not written, it will be built again: %s", error)

    def _loaded(self, path: Path, content: Content) -> Index | None:
        if not path.exists():
            return None
        try:
            return Index.loaded(path, content)
        except (StoreError, OSError) as error:
            self._counts["refused"] += 1
            log.warning("an index file is not used and made anew: %s", error)
            return None

    async def _content(self, user: str, after: int = 0) -> Content:
        return await self._database.read(partial(rows.content, user=user, embedder=self._embedder, after=after))

    def _path(self, user: str) -> Path:
        """Return the file of a user's index; its name tells nothing of the user."""
        return self._folder / f"{hashlib.blake2b(user.encode(), digest_size=16).hexdigest()}.hnsw"
