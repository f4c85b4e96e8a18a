"""Questions of many users at once to one call of the kernel, which runs without the GIL."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

from .._recall import recall
from ..batcher import MicroBatcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._recall import Question
    from ..batcher import BatcherStats

__all__ = ["Recalling"]

Hits = list[tuple[int, float]]

INLINE_ROWS: Final = 20_000  # over more in all the loop would be held for about a millisecond
BATCH: Final = 16  # questions; more of them wait for as long as these take
BATCH_ROWS: Final = 100_000  # some milliseconds of one core
MOST_WAITING: Final = 100_000
THREADS: Final = min(4, os.cpu_count() or 1)


class Recalling:
    """Answers what is asked in one turn of the loop together: few rows on the loop, more in threads beside it."""

    def __init__(self, batching: Callable[[], bool]) -> None:
        self._batcher: MicroBatcher[Question, Hits] = MicroBatcher(
            answer,
            max_batch=BATCH,
            cost=len,
            max_cost=BATCH_ROWS,
            max_queue=MOST_WAITING,
            enabled=batching,
            name="recall",
        )

    async def __call__(self, question: Question, user: str) -> Hits:
        """Return (row, score) of what fits best. Raises Closed, Overloaded."""
        return await self._batcher.submit(question, user=user)

    def stats(self) -> BatcherStats:
        """Return how many questions shared a call."""
        return self._batcher.stats()

    async def close(self) -> None:
        """Answer what was asked, and take no more."""
        await self._batcher.drain()
        await self._batcher.close()


async def answer(questions: list[Question]) -> list[Hits]:
    """Ask the kernel, in a thread where it takes long."""
    if sum(map(len, questions)) <= INLINE_ROWS:
        return recall(questions)
    return await asyncio.to_thread(recall, questions, threads=THREADS)
