from typing import final

from typing_extensions import Buffer

__all__ = ["TokenSums"]

@final
class TokenSums:
    def __new__(cls, rows: Buffer, factors: Buffer, /) -> TokenSums: ...
    def sum_into(self, out: Buffer, texts: list[list[int]], /, *, unit: bool = False) -> None: ...
