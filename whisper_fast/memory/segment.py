"""Everything that is recalled from of one user, in memory: vectors, postings, texts.

A segment is never the truth: it can be built again from the store at any time. It is extended and cut on the loop;
the kernels take what they need under the GIL, so a recall may run in another thread meanwhile.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from sys import getsizeof
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from .._lexical import Postings
from .._vector import Rows
from ..message import Recalled
from .scopes import may_see
from .terms import terms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from .index import Index
    from .item import Item
    from .rows import Vector

__all__ = ["Segment", "item_terms"]

PAUSE: Final = 30 * 60.0  # seconds of silence that end a session
TERM_CHARACTERS: Final = 64 << 10  # of one text are searched by words
SEGMENT_BYTES: Final = 1500  # Python's own, of an empty segment
ITEM_BYTES: Final = 88  # and of a memory: an id, a time, a tuple and its place in the list
SESSION_BYTES: Final = 200
NEAR: Final = 200  # memories that an index proposes, and as many by words: twenty times what a turn recalls
DENSE_WEIGHT: Final = 0.7  # as in `Rows.recall`


def item_terms(item: Item) -> list[str]:
    """Return the terms under which a memory is found: its words, and its speaker's name."""
    found = terms(item.text[:TERM_CHARACTERS])
    return found + terms(item.speaker) if item.speaker else found


class Segment:
    """The memories of one user in the order in which they were stored."""

    __slots__ = ("_at", "_bytes", "_highest", "_ids", "_items", "_last", "_postings", "_rising", "_rows", "_scopes")

    def __init__(self, dimension: int) -> None:
        self._rows = Rows(dimension)
        self._postings = Postings()
        self._ids = array("q")
        self._highest = 0
        self._rising = True
        self._at = array("d")
        self._items: list[tuple[str, bytes | None, str] | None] = []  # text, metadata, scope; None once deleted
        self._scopes: dict[str, int] = {}
        self._last: dict[tuple[str, str | None], int] = {}  # (scope, session) -> its newest row
        self._bytes = SEGMENT_BYTES

    def __len__(self) -> int:
        return self._rows.live

    @property
    def rows(self) -> int:
        """Rows that a recall scans, deleted ones among them."""
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes + self._rows.nbytes + self._postings.nbytes

    def append(self, number: int, item: Item, vector: Vector, words: list[str]) -> None:
        """Add a memory; one that is there already changes nothing. `words` are its `item_terms`.

        One without a vector has the direction of nothing: it is found by its words.
        """
        if self._row(number) is not None:
            return
        scope = self._scopes.setdefault(item.scope, len(self._scopes))
        previous = self._previous((item.scope, item.session), item.at)
        row = self._rows.append_packed(
            vector.packed or bytes(self._rows.dimension), vector.scale, scope, item.at, previous
        )
        self._ids.append(number)
        self._rising = self._rising and number > self._highest
        self._highest = max(self._highest, number)
        self._at.append(item.at)
        self._items.append((item.text, item.metadata, item.scope))
        self._last[item.scope, item.session] = row
        self._bytes += ITEM_BYTES + getsizeof(item.text) + getsizeof(item.metadata)
        self._bytes += SESSION_BYTES if previous < 0 else 0
        self._postings.append(words)  # last: a recall in another thread sees as many rows as have postings

    def remove(self, number: int) -> None:
        """Hide a memory for ever."""
        row = self._row(number)
        if row is not None:
            self._rows.remove(row)
            self._postings.remove(row)
            self._items[row] = None

    def recall(self, query: list[str], vector: NDArray[np.float32] | None, k: int, scope: str) -> list[Recalled]:
        """Return the `k` memories that fit best of those that `scope` may see, best first; see `Rows.recall`.

        A query that says nothing to us, no term and no direction, gets the newest.
        """
        dense = vector if vector is not None and vector.any() else None
        if not query and dense is None:
            return self._newest(k, scope)
        lexical = np.zeros(len(self._postings), np.float32)
        self._postings.score(query, lexical)
        allowed = bytes(may_see(scope, told) for told in tuple(self._scopes))
        return self._recalled(self._rows.recall(dense, lexical, k, allowed=allowed))

    def recall_near(
        self, query: list[str], vector: NDArray[np.float32], k: int, scope: str, index: Index
    ) -> list[Recalled] | None:
        """Return what `recall` does, with cosines of those memories alone that `index` or the words propose.

        All others count as of average cosine. None where that may miss what `recall` finds: the index is being
        changed, it is far behind, or it proposes too few that `scope` may see.
        """
        near = index.search(vector, max(NEAR, 4 * k)) if self._rising else None
        behind = range(bisect_right(self._ids, index.highest), len(self._rows))
        if near is None or len(behind) > NEAR:
            return None
        fused = np.zeros(len(self._postings), np.float32)
        self._postings.score(query, fused)
        cosines = self._cosines({*self._wordy(fused), *behind}, vector)
        for number, cosine in zip(*(column.tolist() for column in near), strict=True):
            row = self._row(number)
            if row is not None and row < len(fused):
                cosines[row] = cosine
        allowed = bytes(may_see(scope, told) for told in tuple(self._scopes))
        seen = sum(1 for row in cosines if (item := self._items[row]) and may_see(scope, item[2]))
        if seen < k or not cosines:
            return None
        mean, deviation = index.spread(vector)
        rows = np.fromiter(cosines, np.int64, len(cosines))
        values = np.fromiter(cosines.values(), np.float32, len(cosines))
        fused[rows] += DENSE_WEIGHT * (values - mean) / max(deviation, 1e-6)
        return self._recalled(self._rows.recall(None, fused, k, allowed=allowed))

    def _wordy(self, scores: NDArray[np.float32]) -> list[int]:
        """Return the rows that fit best by words."""
        [matching] = scores.nonzero()
        if len(matching) > NEAR:
            matching = matching[np.argpartition(-scores[matching], NEAR)[:NEAR]]
        found: list[int] = matching.tolist()
        return found

    def _cosines(self, rows: Iterable[int], vector: NDArray[np.float32]) -> dict[int, float]:
        packed = {row: self._rows.packed(row) for row in rows}
        if not packed:
            return {}
        values = np.frombuffer(b"".join(row for row, _ in packed.values()), np.int8).reshape(len(packed), -1)
        scales = np.array([scale for _, scale in packed.values()], np.float32)
        return dict(zip(packed, (values @ vector * scales).tolist(), strict=True))

    def _newest(self, k: int, scope: str) -> list[Recalled]:
        visible = [(self._at[row], row) for row, item in enumerate(self._items) if item and may_see(scope, item[2])]
        return self._recalled((row, 0.0) for _, row in sorted(visible, reverse=True)[:k])

    def _recalled(self, hits: Iterable[tuple[int, float]]) -> list[Recalled]:
        found = []
        for row, score in hits:
            if item := self._items[row]:  # else deleted while another thread looked for it
                text, packed, scope = item
                metadata = None if packed is None else msgspec.json.decode(packed)
                found.append(Recalled(self._ids[row], text, score, self._at[row], scope, metadata))
        return found

    def _row(self, number: int) -> int | None:
        if number > self._highest:
            return None
        if self._rising:
            row = bisect_left(self._ids, number)
            return row if row < len(self._ids) and self._ids[row] == number else None
        try:
            return self._ids.index(number)
        except ValueError:
            return None

    def _previous(self, session: tuple[str, str | None], at: float) -> int:
        row = self._last.get(session, -1)
        if row >= 0 and session[1] is None and abs(at - self._at[row]) > PAUSE:
            return -1
        return row
