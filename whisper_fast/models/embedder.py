"""Text to vectors: what an embedder is, and the static one that comes with the package."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .._embed import TokenSums
from .table import TokenTable
from .wordpiece import WordPiece

__all__ = ["Embedder", "StaticEmbedder", "bounds"]

Floats = NDArray[np.float32]

MAX_CHARACTERS = 4096
TOGETHER: Final = 4096  # characters in one batch of a model that is paid by length: about 0.15 s of a core
SPREAD: Final = 0.2  # of the lengths in one batch: with less, batches are too small (bench_batched_embeddings.py)


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


def bounds(embedder: Embedder) -> dict[str, Any]:
    """Return what `MicroBatcher` is to know of texts for this embedder.

    One with a method `length(text)`, in characters, is faster on texts of one length: it gets such together, and few
    at once when they are long. To any other a batch is a number of texts.
    """
    length = getattr(embedder, "length", None)
    return {} if length is None else {"cost": length, "max_cost": TOGETHER, "max_padding": SPREAD}


class StaticEmbedder:
    """The weighted sum of a text's token vectors, distilled from all-MiniLM-L6-v2, at unit length.

    Order and context play no part: what it gives up against the model itself, it gains in time.
    Of a text its first 4,096 characters count (the model itself reads 256 tokens). Calls may come from several
    threads. Raises StoreCorrupt at construction if the table is damaged.
    """

    def __init__(self, table: TokenTable | None = None) -> None:
        table = table or TokenTable.shipped()
        self._weighted = TokenSums(table.row, table.scale * table.weight)
        self._tokens = WordPiece(table.vocabulary, table.vocabulary.index("[UNK]"))
        self.dimension: int = table.row.shape[1]
        self.name: str = f"minilm-l6-static-{self.dimension}-{table.checksum[:8]}"

    def embed(self, texts: Sequence[str], /) -> Floats:
        """Return unit rows, float32 [len(texts), dimension]; a text without a known token has a zero row."""
        rows = np.empty((len(texts), self.dimension), np.float32)
        tokens = self._tokens
        self._weighted.sum_into(rows, [tokens.ids(text[:MAX_CHARACTERS]) for text in texts], unit=True)
        return rows
