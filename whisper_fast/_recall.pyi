from typing import final

import numpy as np
from numpy.typing import NDArray

from ._lexical import Postings
from ._vector import Rows

__all__ = ["PARTS", "WEIGHTS", "Question", "Words", "parts", "recall"]

PARTS: tuple[str, ...]
WEIGHTS: tuple[float, ...]

@final
class Words:
    """Vectors of whole words, int8 [n, d] with a float32 factor each: centred, of unit length. Immutable."""

    def __new__(cls, rows: NDArray[np.int8], scale: NDArray[np.float32], /) -> Words: ...
    def __len__(self) -> int: ...

@final
class Question:
    """What is asked of one user's rows as they are at this moment.

    `terms` are the question's stems, `numbers` their rows in `words`, 65,535 for none. `vector` is float32
    [dimension] of unit length, None for none. `allowed` has a byte for each scope: whether it may be seen.
    `since` and `until` are epoch seconds, both inclusive. Bit n of `months` and `days`: the question names that
    month, that day. `speaker` is the number of the one person whom it names. `weights` has one for each of PARTS.
    With `only`, the cosine of all other rows counts as average, which is 0. `path` is one of `_vector.paths()`.
    A question may be asked again, from any thread: it is answered from the rows that there were when it was made.
    Raises ValueError for what does not fit the rows or is not finite.
    """

    def __new__(
        cls,
        rows: Rows,
        postings: Postings,
        words: Words,
        terms: list[str],
        numbers: list[int],
        vector: NDArray[np.float32] | None,
        k: int,
        allowed: bytes,
        *,
        since: float = ...,
        until: float = ...,
        months: int = 0,
        days: int = 0,
        speaker: int = -1,
        now: float = 0.0,
        half_life: float = 0.0,
        weights: tuple[float, ...] | None = None,
        only: NDArray[np.uint32] | None = None,
        path: str | None = None,
    ) -> Question: ...
    def __len__(self) -> int:
        """Rows of which it is asked."""

def recall(questions: list[Question], /, *, threads: int = 1) -> list[list[tuple[int, float]]]:
    """Answer each question with its (row, score), best first; questions to many rows run without the GIL."""

def parts(question: Question, out: NDArray[np.float32], /) -> None:
    """Write the parts of each row's score to `out`, float32 [len(PARTS), rows]."""
