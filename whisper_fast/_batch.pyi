from collections.abc import Callable
from typing import final

__all__ = ["Assembly"]

@final
class Assembly:
    max_batch: int
    max_cost: float
    released_by: str

    def __new__(cls, max_batch: int, max_cost: float = ..., clock: Callable[[], float] | None = None) -> Assembly: ...
    def __len__(self, /) -> int: ...
    @property
    def oldest(self) -> float | None: ...
    def append(
        self,
        item: object,
        user: object = None,
        priority: int = 0,
        deadline: float = ...,
        cost: float = 1.0,
    ) -> None: ...
    def remove(self, item: object) -> bool: ...
    def fill(self) -> list[object]: ...
