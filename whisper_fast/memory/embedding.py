"""Texts to checked vectors, wherever the embedder does its work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from inspect import iscoroutinefunction
from sys import getsizeof
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._vector import Rows
from ..cache import Cache
from ..errors import InvalidMessage
from ..models.embedder import StaticEmbedder
from .rows import Vector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..models.embedder import Embedder

__all__ = ["Embedding", "checked", "pack"]

QUESTION_BYTES: Final = 4 << 20  # of vectors of questions are kept
QUESTION_OWN_BYTES: Final = 250  # Python's own, of one of them
INLINE_CHARACTERS: Final = 8192  # the static embedder takes less time for so few than a thread would


class Embedding:
    """Calls an embedder, or `through` in its place, checks what it returns, and keeps the vectors of questions.

    `through(texts, user=..., priority=...)` is told whose texts they are, and a larger number for what can wait.
    """

    def __init__(
        self,
        embedder: Embedder,
        through: Callable[..., Awaitable[Any]] | None = None,
        caching: Callable[[], bool] = lambda: True,
    ) -> None:
        self.embedder = embedder
        self._through = through or self._direct
        self._caching = caching
        self._questions: Cache[str, NDArray[np.float32]] = Cache(QUESTION_BYTES, weigher=weight)

    async def __call__(
        self, texts: Sequence[str], *, user: str | None = None, priority: int = 0
    ) -> NDArray[np.float32]:
        """Return float32 [len(texts), dimension]. Raises InvalidMessage for what is no such array, or not finite."""
        if not texts:
            return np.empty((0, self.embedder.dimension), np.float32)
        found = await self._through(texts, user=user, priority=priority)
        return checked(found, len(texts), self.embedder)

    async def questions(self, texts: Sequence[str], *, user: str | None = None) -> list[NDArray[np.float32]]:
        """Return a vector a text, read-only; one that was asked lately is not embedded again."""
        if not self._caching():
            return list(await self(texts, user=user))
        found = zip(texts, self._questions.get_many(texts), strict=True)
        known = {text: vector for text, vector in found if vector is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        for text, vector in zip(missing, await self(missing, user=user), strict=True):
            kept = vector.copy()
            kept.flags.writeable = False
            known[text] = kept
            self._questions.put(text, kept)
        return [known[text] for text in texts]

    @property
    def cache(self) -> Cache[str, NDArray[np.float32]]:
        """The vectors of questions: they can be made again, its bound may be changed."""
        return self._questions

    async def _direct(self, texts: Sequence[str], **_: Any) -> Any:
        embedder = self.embedder
        if iscoroutinefunction(embedder.embed):
            return await embedder.embed(texts)
        if isinstance(embedder, StaticEmbedder) and sum(map(len, texts)) <= INLINE_CHARACTERS:
            return embedder.embed(texts)
        found = await asyncio.to_thread(embedder.embed, texts)
        return await found if isinstance(found, Awaitable) else found


def weight(text: str, vector: NDArray[np.float32]) -> int:
    return getsizeof(text) + vector.nbytes + QUESTION_OWN_BYTES


def checked(vectors: Any, count: int, embedder: Embedder) -> NDArray[np.float32]:
    """Return `vectors` as float32 [count, dimension]. Raises InvalidMessage that names the embedder."""
    try:
        rows = np.ascontiguousarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidMessage(f"embedder {embedder.name} gave no array of vectors: {error}") from None
    if rows.shape != (count, embedder.dimension):
        raise InvalidMessage(
            f"embedder {embedder.name} gave vectors of shape {rows.shape}; expected {(count, embedder.dimension)}"
        )
    if not np.isfinite(rows).all():
        raise InvalidMessage(f"embedder {embedder.name} gave a vector with a value that is not finite")
    return rows


def pack(vectors: NDArray[np.float32]) -> list[Vector]:
    """Return each row of float32 [n, dimension] as it is stored."""
    rows = Rows(vectors.shape[1])
    return [Vector(*rows.packed(rows.append(vector, 0, 0.0))) for vector in vectors]
