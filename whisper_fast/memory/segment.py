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
from .._recall import Question, recall
from .._vector import Rows
from ..message import Recalled
from .question import Asked, ends_asking
from .scopes import may_see
from .terms import analysed, terms
from .words import words

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from .index import Index
    from .item import Item
    from .rows import Vector
    from .terms import Term

__all__ = ["Segment", "item_terms"]

PAUSE: Final = 30 * 60.0  # seconds of silence that end a session
TERM_CHARACTERS: Final = 64 << 10  # of one text are searched by words
SEGMENT_BYTES: Final = 1500  # Python's own, of an empty segment
ITEM_BYTES: Final = 18  # and of a memory beside its text: an id and a place in the list
METADATA_BYTES: Final = 100
SESSION_BYTES: Final = 200
NEAR: Final = 200  # memories that an index proposes, and as many by words: twenty times what a turn recalls
MOST_SPEAKERS: Final = (1 << 15) - 1


def item_terms(item: Item) -> list[Term]:
    """Return the terms under which a memory is found."""
    return analysed(item.text[:TERM_CHARACTERS])


class Segment:
    """The memories of one user in the order in which they were stored."""

    __slots__ = (
        "_bytes", "_highest", "_ids", "_last", "_metadata",
        "_postings", "_rising", "_rows", "_scopes", "_speakers", "_texts",
    )  # fmt: skip

    def __init__(self, dimension: int) -> None:
        self._rows = Rows(dimension)
        self._postings = Postings()
        self._ids = array("q")
        self._highest = 0
        self._rising = True
        self._texts: list[str | None] = []  # None once deleted
        self._metadata: dict[int, bytes] = {}  # row -> JSON
        self._scopes: dict[str, int] = {}  # in the order of their numbers
        self._speakers: dict[str, int] = {}  # 0 is nobody
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

    def append(self, number: int, item: Item, vector: Vector, found: list[Term]) -> None:
        """Add a memory; one that is there already changes nothing. `found` are its `item_terms`.

        One without a vector has the direction of nothing: it is found by its words.
        """
        if self._row(number) is not None:
            return
        scope = self._scopes.setdefault(item.scope, len(self._scopes))
        previous = self._previous((item.scope, item.session), item.at)
        speaker = self._speakers.setdefault(item.speaker, len(self._speakers) + 1) if item.speaker else 0
        asks = ends_asking(item.text)
        place = scope, item.at, previous, min(speaker, MOST_SPEAKERS), asks
        row = self._rows.append_packed(vector.packed or bytes(self._rows.dimension), vector.scale, *place)
        self._ids.append(number)
        self._rising = self._rising and number > self._highest
        self._highest = max(self._highest, number)
        self._texts.append(item.text)
        self._last[item.scope, item.session] = row
        self._bytes += ITEM_BYTES + getsizeof(item.text) + (SESSION_BYTES if previous < 0 else 0)
        if item.metadata is not None:
            self._metadata[row] = item.metadata
            self._bytes += METADATA_BYTES + getsizeof(item.metadata)
        # Last: a recall in another thread sees as many rows as have postings.
        self._postings.append([stem for stem, _ in found], [word for _, word in found])

    def remove(self, number: int) -> None:
        """Hide a memory for ever."""
        row = self._row(number)
        if row is not None:
            self._texts[row] = None  # first: whoever recalls in another thread finds a scope for each text
            self._rows.remove(row)
            self._postings.remove(row)

    def recall(self, query: str, vector: NDArray[np.float32] | None, k: int, scope: str) -> list[Recalled]:
        """Return the `k` memories that fit best of those that `scope` may see, best first; see `_recall`.

        A query that says nothing to us, no term and no direction, gets the newest.
        """
        question = self.question(query, vector, k, scope)
        return self._newest(k, scope) if question is None else self.recalled(recall([question])[0])

    def question(
        self,
        query: str,
        vector: NDArray[np.float32] | None,
        k: int,
        scope: str,
        only: NDArray[np.uint32] | None = None,
    ) -> Question | None:
        """Return what the kernel is asked, None for a query that says nothing to us.

        With `only`, the other rows are not compared with `vector`; they count as of average cosine.
        """
        asked = Asked.of(query, self._speakers)
        if not asked.terms and (vector is None or not vector.any()):
            return None
        return Question(
            self._rows,
            self._postings,
            words(),
            asked.terms,
            asked.numbers,
            vector,
            k,
            self._allowed(scope),
            months=asked.months,
            days=asked.days,
            speaker=asked.speaker,
            only=only,
        )

    def recall_near(
        self, query: str, vector: NDArray[np.float32], k: int, scope: str, index: Index
    ) -> list[Recalled] | None:
        """Return what `recall` does, with cosines of those memories alone that `index` or the words propose.

        All others count as of average cosine. None where that may miss what `recall` finds: the index is being
        changed, it is far behind, or it proposes too few that `scope` may see.
        """
        near = index.search(vector, max(NEAR, 4 * k)) if self._rising else None
        behind = range(bisect_right(self._ids, index.highest), len(self._postings))
        if near is None or len(behind) > NEAR:
            return None
        proposed = {row for number in near[0].tolist() if (row := self._row(number)) is not None}
        proposed.update(self._wordy(query), behind)
        only = np.fromiter(sorted(row for row in proposed if row < len(self._postings)), np.uint32)
        allowed = self._allowed(scope)
        seen = sum(1 for row in only.tolist() if self._texts[row] is not None and allowed[self._rows.told(row)[0]])
        question = self.question(query, vector, k, scope, only)
        return None if seen < k or question is None else self.recalled(recall([question])[0])

    def _wordy(self, query: str) -> list[int]:
        """Return the rows that fit best by words."""
        scores = np.zeros(len(self._postings), np.float32)
        self._postings.score(terms(query[:TERM_CHARACTERS]), scores)
        [matching] = scores.nonzero()
        if len(matching) > NEAR:
            matching = matching[np.argpartition(-scores[matching], NEAR)[:NEAR]]
        found: list[int] = matching.tolist()
        return found

    def _newest(self, k: int, scope: str) -> list[Recalled]:
        allowed, told = self._allowed(scope), map(self._rows.told, range(len(self._texts)))
        visible = [(at, row) for row, (number, at) in enumerate(told) if number < len(allowed) and allowed[number]]
        return self.recalled((row, 0.0) for _, row in sorted(visible, reverse=True)[:k])

    def recalled(self, hits: Iterable[tuple[int, float]]) -> list[Recalled]:
        """Return the memories of (row, score)."""
        found, scopes = [], tuple(self._scopes)
        for row, score in hits:
            scope, at = self._rows.told(row)
            if (text := self._texts[row]) is not None:  # else deleted while another thread looked for it
                packed = self._metadata.get(row)
                metadata = None if packed is None else msgspec.json.decode(packed)
                found.append(Recalled(self._ids[row], text, score, at, scopes[scope], metadata))
        return found

    def _allowed(self, scope: str) -> bytes:
        """Return a byte a scope's number: whether what was told there may be seen from `scope`."""
        return bytes([may_see(scope, told) for told in tuple(self._scopes)])

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
        if row >= 0 and session[1] is None and abs(at - self._rows.told(row)[1]) > PAUSE:
            return -1
        return row
