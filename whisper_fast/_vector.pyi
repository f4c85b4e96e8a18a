from typing import final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rows", "paths", "simd"]

def paths() -> tuple[str, ...]:
    """Return the scan paths that run on this machine, best first: avx512vnni, avx2, neon, scalar."""

def simd() -> str:
    """Return the scan path in use."""

@final
class Rows:
    """The vectors of one user, in int8 with a float32 scale each, scanned exactly.

    A vector is brought to unit length and quantised symmetrically: `packed = round(127 * x / max|x|)`,
    `x ~ packed * scale`. Beside it stand a scope (0 to 4,294,967,294), a time in seconds and the row
    said last before it in the same session. Every scan path gives the same integers, hence scores equal to the last
    bit.

    A vector is float32 [dimension]; one with a value that is not finite is refused with ValueError, and so is
    everything else that does not fit. Questions may run in other threads while rows are appended.
    """

    @property
    def dimension(self) -> int: ...
    @property
    def kernel(self) -> object:
        """What `_recall` reads: a capsule that is valid as long as this object."""
    @property
    def live(self) -> int:
        """Rows that are not removed."""
    @property
    def nbytes(self) -> int:
        """Bytes held."""
    def __new__(cls, dimension: int) -> Rows: ...
    def __len__(self) -> int: ...
    def append(
        self,
        vector: NDArray[np.float32],
        scope: int,
        at: float,
        previous: int = -1,
        speaker: int = 0,
        asks: bool = False,
    ) -> int:
        """Add a row said at `at` seconds after row `previous` (-1: the first of its session); return its number.

        `speaker` is from 0 to 32,767, `asks` says that the text ends with a question mark.
        """
    def append_packed(
        self,
        row: bytes,
        scale: float,
        scope: int,
        at: float,
        previous: int = -1,
        speaker: int = 0,
        asks: bool = False,
    ) -> int:
        """Add a row as `packed` gave it."""
    def packed(self, row: int) -> tuple[bytes, float]:
        """Return a row's int8 values and its scale, to be stored. Raises IndexError for a row that never was."""
    def told(self, row: int) -> tuple[int, float]:
        """Return a row's scope, 4,294,967,295 once it is removed, and time. Raises IndexError as `packed` does."""
    def remove(self, row: int) -> None:
        """Hide a row for ever. Raises IndexError for a row that never was."""
    def top_k(
        self,
        query: NDArray[np.float32],
        k: int,
        *,
        allowed: bytes | None = None,
        since: float = ...,
        until: float = ...,
        path: str | None = None,
    ) -> list[tuple[int, float]]:
        """Return the `k` rows nearest to `query` with their cosines, best first, ties by the lower row.

        Only rows that are visible count: not removed, `allowed[scope]` not 0, and said from `since` to `until`.
        """
