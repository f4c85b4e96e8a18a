from typing import final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Postings"]

@final
class Postings:
    """The inverted index of one user's texts, scored by BM25.

    The score of a row for a question is the sum, over the question's distinct terms t, of
    `idf(t) * f / (f + k1 * (1 - b + b * length / mean length))`, where f is how often the row holds t and
    `idf(t) = ln(1 + (n - df + 0.5) / (df + 0.5))` over the n rows that are not removed, df of which hold t
    (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009, in the form that Lucene uses).

    Terms are kept as their 64-bit hashes, counts up to 255. Raises ValueError for a negative `k1` or a `b`
    outside 0 to 1.
    """

    @property
    def k1(self) -> float: ...
    @property
    def b(self) -> float: ...
    @property
    def kernel(self) -> object:
        """What `_recall` reads: a capsule that is valid as long as this object."""
    @property
    def live(self) -> int:
        """Rows that are not removed."""
    @property
    def nbytes(self) -> int:
        """Bytes held."""
    def __new__(cls, k1: float = 0.8, b: float = 0.2) -> Postings: ...
    def __len__(self) -> int: ...
    def append(self, terms: list[str], words: list[int] | None = None) -> int:
        """Add a row that holds `terms`; return its number, counted from 0.

        `words` are the rows of the terms' words in a table of word vectors, 65,535 for none.
        """
    def remove(self, row: int) -> None:
        """Take a row out of the index and its statistics. Raises IndexError for a row that never was."""
    def score(self, terms: list[str], out: NDArray[np.float32]) -> None:
        """Add each row's score to `out`, float32 [at least len(self)]. Raises ValueError for a smaller one."""
