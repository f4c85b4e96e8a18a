"""Who waits for a batch: one item with its future, or one item of a group that shares a future."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import DeadlineExceeded, own_copy

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

__all__ = ["Failure", "Group", "Member", "Waiter", "expire_later", "fail_all", "unwrapped"]

SHORTEST_TIMER = 0.001  # seconds; uvloop's timers tick in whole milliseconds


class Waiter:
    """One item, and the future of whoever waits for its result."""

    __slots__ = ("future", "item", "taken")

    def __init__(self, item: Any, future: asyncio.Future[Any]) -> None:
        self.item = item
        self.future = future
        self.taken = False

    def answer(self, value: Any) -> None:
        """Hand over the result; an exception among the results is its item's failure."""
        if isinstance(value, Exception):
            self.fail(value)
        elif not self.future.done():
            self.future.set_result(value)

    def fail(self, error: BaseException) -> None:
        """Hand over a copy of the error."""
        if not self.future.done():
            self.future.set_exception(own_copy(error))
            self.future.exception()  # seen, even if its task is being cancelled at this moment


class Group:
    """The results of one `submit_many`, and the future that is done when the last of them is there."""

    __slots__ = ("future", "left", "results")

    def __init__(self, size: int, future: asyncio.Future[Any]) -> None:
        self.future = future
        self.left = size
        self.results: list[Any] = [None] * size


class Failure:
    """Marks a result that is to be raised."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Member(Waiter):
    """One item of a group."""

    __slots__ = ("answered", "group", "index")

    def __init__(self, item: Any, group: Group, index: int) -> None:
        super().__init__(item, group.future)
        self.group = group
        self.index = index
        self.answered = False

    def answer(self, value: Any) -> None:
        """Put the result into its place; only the first one counts."""
        if self.answered:
            return
        self.answered = True
        group = self.group
        group.results[self.index] = Failure(value) if isinstance(value, Exception) else value
        group.left -= 1
        if not group.left and not group.future.done():
            group.future.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Put a copy of the error into its place."""
        self.answer(Failure(own_copy(error)))


def expire_later(future: asyncio.Future[Any], seconds: float) -> asyncio.TimerHandle:
    """Fail `future` with DeadlineExceeded in `seconds`, if nothing else has settled it by then."""
    return future.get_loop().call_later(max(seconds, SHORTEST_TIMER), expire, future, seconds)


def expire(future: asyncio.Future[Any], timeout: float) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded(f"no result came within {timeout:g} s"))


def fail_all(waiters: Iterable[Waiter], error: BaseException) -> None:
    """Give each waiter a copy of its own."""
    for waiter in waiters:
        waiter.fail(error)


def unwrapped(results: list[Any], return_exceptions: bool) -> list[Any]:
    """Return a group's results; raise its first failure, unless failures are to stand in their places."""
    for index, result in enumerate(results):
        if isinstance(result, Failure):
            if not return_exceptions:
                raise result.error
            results[index] = result.error
    return results
