"""One embedder for many callers: their texts go to it together, and each alone where that is off or has failed."""

from __future__ import annotations

from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from ..batcher import MicroBatcher
from ..errors import BatchMismatch
from ..flags import either
from .embedder import bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..executor import Executor
    from .embedder import Embedder

__all__ = ["Batched"]


class Batched:
    """Batches the texts of all callers for `embedder`, which runs on `executor` unless it is asynchronous.

    enabled   whether to batch, asked each time
    failed    told when batching raised what a text alone does not

    `batcher` is what collects them, for whoever looks how it fares.
    """

    def __init__(
        self,
        embedder: Embedder,
        executor: Executor,
        *,
        max_batch: int,
        max_wait: float,
        enabled: Callable[[], bool],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._embedder = embedder
        self._executor = executor
        self._max_batch = max_batch
        self._failed = failed
        self.batcher: MicroBatcher[str, Any] = MicroBatcher(
            embedder.embed,
            max_batch=max_batch,
            max_wait=max_wait,
            executor=executor,
            enabled=enabled,
            **bounds(embedder),
        )

    async def one(self, text: str, *, user: str | None = None, priority: int = 0) -> Any:
        """Return the vector of a text. Raises what the embedder raises for it, Overloaded, Closed."""
        together = partial(self.batcher.submit, text, user=user, priority=priority)
        return await either("batching", together, partial(self._alone, text), self._failed)

    async def many(self, texts: Sequence[str], *, user: str | None = None, priority: int = 0) -> Any:
        """Return the vectors of all texts, as one array where they are rows; raises what `one` raises."""

        async def each() -> list[Any]:
            return [await self._alone(text) for text in texts]

        together = partial(self.batcher.submit_rows, texts, user=user, priority=priority)
        return await either("batching", together, each, self._failed)

    def stats(self) -> dict[str, Any]:
        """Return the batcher's counters, and the most texts of a batch."""
        return {**asdict(self.batcher.stats()), "max_batch": self._max_batch}

    async def close(self) -> None:
        """Take no more texts; whoever waits gets Closed."""
        await self.batcher.close()

    async def _alone(self, text: str) -> Any:
        embed: Callable[[list[str]], Any] = self._embedder.embed
        found = await (embed([text]) if iscoroutinefunction(embed) else self._executor.run(embed, [text]))
        if len(found) != 1:
            raise BatchMismatch(f"embedder {self._embedder.name} returned {len(found)} vectors for one text")
        return found[0]
