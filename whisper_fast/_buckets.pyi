from asyncio import Future
from collections.abc import Callable
from typing import final

from ._batch import Entry, Group

__all__ = ["Buckets"]

@final
class Buckets:
    max_batch: int
    max_cost: float
    max_padding: float
    released_by: str

    def __new__(
        cls,
        max_batch: int,
        max_cost: float = ...,
        max_padding: float = 0.05,
        clock: Callable[[], float] | None = None,
    ) -> Buckets: ...
    def __len__(self, /) -> int: ...
    @property
    def oldest(self) -> float | None: ...
    @property
    def padded(self) -> float: ...
    def append(
        self,
        item: object,
        to: Future[object] | Group | None = None,
        user: object = None,
        priority: int = 0,
        deadline: float = ...,
        cost: float = 1.0,
        index: int = 0,
    ) -> Entry: ...
    def remove(self, entry: Entry) -> bool: ...
    def fill(self) -> list[Entry]: ...
