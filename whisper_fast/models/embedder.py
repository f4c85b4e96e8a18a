"""Text to vectors: what an embedder is, and the static one that comes with the package."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .table import TokenTable
from .wordpiece import WordPiece

__all__ = ["Embedder", "StaticEmbedder"]

Floats = NDArray[np.float32]

MAX_CHARACTERS = 8192


@runtime_checkable
class Embedder(Protocol):
    """What turns texts into vectors; vectors are kept under `name`, so a change of meaning needs a new one."""

    @property
    def name(self) -> str:
        """The model and its version: vectors of different names are never compared."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def embed(self, texts: Sequence[str], /) -> Floats | Awaitable[Floats]:
        """Return unit rows, float32 [len(texts), dimension]; a text that says nothing has a zero row."""


class StaticEmbedder:
    """The weighted sum of a text's token vectors, distilled from all-MiniLM-L6-v2, at unit length.

    Order and context play no part: what it gives up against the model itself, it gains a thousandfold in time.
    Of a text its first 8,192 characters count (the model itself reads 256 tokens). Calls may come from several
    threads. Raises StoreCorrupt at construction if the table is damaged.
    """

    def __init__(self, table: TokenTable | None = None) -> None:
        table = table or TokenTable.shipped()
        self._row = table.row
        self._scale = table.scale
        self._factor = table.scale * table.weight
        self._tokens = WordPiece(table.vocabulary, table.vocabulary.index("[UNK]"))
        self.dimension: int = table.row.shape[1]
        self.name: str = f"minilm-l6-static-{self.dimension}-{table.checksum[:8]}"

    def embed(self, texts: Sequence[str], /) -> Floats:
        """Return unit rows, float32 [len(texts), dimension]; a text without a known token has a zero row."""
        rows = self._sums([text[:MAX_CHARACTERS] for text in texts], self._factor)
        length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        rows /= np.where(length > 0, length, 1)[:, None]
        return rows

    def word_vectors(self, words: Sequence[str], /) -> Floats:
        """Return each word's plain vector, float32 [len(words), dimension]: its pieces' sum, of any length.

        For callers that weigh words by counts of their own. A word that is not known has a zero row.
        """
        return self._sums(words, self._scale)

    def _sums(self, texts: Sequence[str], factor: Floats) -> Floats:
        pieces = [self._tokens.ids(text) for text in texts]
        sums = np.zeros((len(texts), self.dimension), np.float32)
        filled = [i for i, ids in enumerate(pieces) if ids]
        if not filled:
            return sums
        flat = np.array([i for ids in pieces for i in ids], np.intp)
        starts = np.cumsum([0, *(len(pieces[i]) for i in filled[:-1])])
        rows = self._row[flat] * factor[flat, None]
        sums[filled] = np.add.reduceat(rows, starts, axis=0)
        return sums
