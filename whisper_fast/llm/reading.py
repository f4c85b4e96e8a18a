"""A stream that is being read: the pieces of one attempt, all that came in one network read at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from whisper_fast.message import ChatMessage, Delta, Usage

    from .upstream import Visit

__all__ = ["Reading"]


class Reading:
    """The pieces of one visit; whoever reads them settles the visit with `end`."""

    __slots__ = ("_batched", "_pieces", "usage", "visit")

    def __init__(self, visit: Visit, messages: Sequence[ChatMessage], params: dict[str, Any]) -> None:
        self.visit = visit
        self.usage: Usage | None = None
        batches = visit.upstream.batches
        self._batched = batches is not None
        self._pieces: AsyncIterator[Any] = (
            visit.upstream.provider.stream(messages, **params)
            if batches is None
            else batches(messages, visit.spent, **params)
        )

    async def next(self) -> Sequence[Delta]:
        """Return the next pieces, at least one; raises StopAsyncIteration at the end."""
        got = await anext(self._pieces)
        pieces: Sequence[Delta] = got if self._batched else (got,)
        self.usage = pieces[-1].usage or self.usage
        return pieces

    async def close(self) -> None:
        """End the attempt, wherever it stands."""
        close = getattr(self._pieces, "aclose", None)
        if close is not None:
            await close()

    async def leave(self) -> None:
        """End the attempt that nobody reads any more."""
        try:
            await self.close()
        finally:
            self.visit.left()
