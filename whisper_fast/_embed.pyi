from typing import final

import numpy as np
from numpy.typing import NDArray

__all__ = ["TokenSums"]

@final
class TokenSums:
    def __new__(cls, rows: NDArray[np.int8], factors: NDArray[np.float32], /) -> TokenSums: ...
    def sum_into(self, out: NDArray[np.float32], texts: list[list[int]], /, *, unit: bool = False) -> None: ...
