"""Old memories get vectors of the present embedder, in the background, while everything else goes on."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..errors import WhisperFastError
from . import rows
from .embedding import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..models.embedder import Embedder
    from ..store.sqlite import Database
    from .embedding import Embedding

__all__ = ["Reembedding"]

log = logging.getLogger(__name__)

BATCH: Final = 32  # memories embedded together: few enough that a question which comes meanwhile hardly waits
BEHIND: Final = 1  # priority of what nobody waits for
FIRST_PAUSE: Final = 1.0  # seconds after a failure, doubled each time
LONGEST_PAUSE: Final = 60.0


class Reembedding:
    """One pass over the store, from the first user to the last, that embeds what has no vector of this embedder.

    It starts anew after a restart and finds what is left; `wake` starts it when a memory was stored without a vector.
    `changed(users)` is called on the loop when vectors of these users were stored. A text that the embedder refuses
    is left as it is, and counted.
    """

    def __init__(self, database: Database, embed: Embedding, changed: Callable[[Iterable[str]], None]) -> None:
        self._database = database
        self._embed = embed
        self._changed = changed
        self._task: asyncio.Task[None] | None = None
        self._again = False
        self.total = 0
        self.done = 0
        self.refused = 0

    @property
    def embedder(self) -> Embedder:
        """The embedder whose vectors all memories get."""
        return self._embed.embedder

    def wake(self) -> None:
        """Begin a pass; one that runs is followed by another."""
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="memory-reembedding")

    async def finished(self) -> None:
        """Wait until a pass that runs has ended."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Stop; the next start goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def stats(self) -> dict[str, Any]:
        """Return the progress of the latest pass: memories to embed, embedded, refused, and whether it runs."""
        running = self._task is not None and not self._task.done()
        return {"total": self.total, "done": self.done, "refused": self.refused, "running": running}

    async def _run(self) -> None:
        while self._again:
            self._again = False
            pause = FIRST_PAUSE
            while True:
                try:
                    await self._pass()
                    break
                except WhisperFastError as error:
                    log.warning("memories are not embedded yet, tried again in %.0f s: %s", pause, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _pass(self) -> None:
        embedder, after = self.embedder, ("", 0)
        self.total = await self._database.read(partial(rows.count_outdated, embedder=embedder))
        self.done = self.refused = 0
        if self.total:
            log.info("%d memories are embedded again by %s", self.total, embedder.name)
        while self.total:
            read = partial(rows.outdated, embedder=embedder, after=after, size=BATCH)
            if not (found := await self._database.read(read)):
                await self._database.write(partial(rows.settle_embedder, embedder=embedder))
                log.info("%d memories were embedded again, %d were refused", self.done, self.refused)
                return
            await self._renew(found)
            after = found[-1].user, found[-1].id
            if self.done // 1000 != (self.done - len(found)) // 1000:
                log.info("%d of %d memories are embedded again", self.done, self.total)

    async def _renew(self, found: Sequence[rows.Outdated]) -> None:
        """Embed and store these memories; where the embedder refuses them together, one by one."""
        try:
            vectors = await self._embed([old.text for old in found], priority=BEHIND)
        except WhisperFastError as error:
            if error.retriable:
                raise
            if len(found) == 1:
                self.refused += 1
                log.warning("memory %d of a user was not embedded: %s", found[0].id, error)
                return
            for old in found:
                await self._renew([old])
            return
        fresh = list(zip(found, await asyncio.to_thread(pack, vectors), strict=True))
        await self._database.write(partial(rows.replace_vectors, embedder=self.embedder, vectors=fresh))
        self.done += len(found)
        self._changed({old.user for old in found})
