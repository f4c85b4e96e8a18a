"""Memories between their preparation and the recalls that find them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from . import rows
from .embedding import pack
from .segment import item_terms

if TYPE_CHECKING:
    import apsw
    import numpy as np
    from numpy.typing import NDArray

    from ..models.embedder import Embedder
    from .item import Item
    from .segment import Segment

__all__ = ["Pending"]


class Pending:
    """Checked and embedded memories of one user on their way to the disk: packed, and cut into terms.

    `changes` is what the store had counted when they were made, see `MemoryStore.publish`. They are `bare` where the
    embedder did not answer: stored without vectors, which come later.
    """

    __slots__ = ("_embedder", "_items", "_new", "_vectors", "_words", "bare", "changes", "ids", "user")

    def __init__(
        self, user: str, items: list[Item], vectors: NDArray[np.float32] | None, embedder: Embedder, changes: int
    ) -> None:
        self.user = user
        self.changes = changes
        self.ids: list[int] = []
        self._embedder = embedder
        self._items = items
        self.bare = vectors is None
        self._vectors = [rows.NO_VECTOR] * len(items) if vectors is None else pack(vectors)
        self._words = [item_terms(item) for item in items]
        self._new: list[bool] = []

    @property
    def new(self) -> int:
        """How many of them `insert` stored; the others were known by their source."""
        return sum(self._new)

    def insert(self, connection: apsw.Connection) -> list[int]:
        """Store the memories, inside a write job; return their ids. One whose source is known keeps its first id."""
        if self._items:
            name = rows.NO_EMBEDDER if self.bare else self._embedder.name
            embedder = rows.embedder_id(connection, name, 0 if self.bare else self._embedder.dimension)
            put = partial(rows.insert, connection, self.user, embedder)
            stored = list(map(put, self._items, self._vectors))
            self.ids = [number for number, _ in stored]
            self._new = [new for _, new in stored]
        return self.ids

    def extend(self, segment: Segment) -> None:
        """Add what `insert` stored to the user's segment."""
        memories = zip(self.ids, self._items, self._vectors, self._words, self._new, strict=True)
        for number, item, vector, words, new in memories:
            if new:
                segment.append(number, item, vector, words)
