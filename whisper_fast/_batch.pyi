from asyncio import Future
from collections.abc import Callable, Iterable
from typing import Any, final

__all__ = ["Assembly", "Entry", "Group", "deliver", "still_wanted"]

@final
class Group:
    future: Future[Any]
    results: list[Any]
    left: int
    failed: int
    rows: int
    packed: bytearray

    def __new__(cls, size: int, future: Future[Any], packing: bool = False) -> Group: ...

@final
class Entry:
    item: Any

    def __new__(cls, item: object, to: Future[Any] | Group | None = None, index: int = 0) -> Entry: ...
    def answer(self, value: object) -> None: ...
    def fail(self, error: BaseException) -> None: ...

def still_wanted(entries: list[Entry]) -> tuple[list[Entry], list[Any]]: ...
def deliver(entries: list[Entry], results: Iterable[Any]) -> list[tuple[Entry, Exception]]: ...

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
        to: Future[Any] | Group | None = None,
        user: object = None,
        priority: int = 0,
        deadline: float = ...,
        cost: float = 1.0,
        index: int = 0,
    ) -> Entry: ...
    def append_many(
        self, items: list[Any], group: Group, user: object = None, priority: int = 0, deadline: float = ...
    ) -> Entry | None: ...
    def remove(self, entry: Entry) -> bool: ...
    def fill(self) -> list[Entry]: ...
