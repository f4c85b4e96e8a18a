"""What who waits for a batch is told when there is no result: a copy of the error, or that the time is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import DeadlineExceeded, own_copy

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from ._batch import Entry, Group

__all__ = ["expire_later", "fail_all", "side_by_side", "unwrapped"]

SHORTEST_TIMER = 0.001  # seconds; uvloop's timers tick in whole milliseconds


def expire_later(future: asyncio.Future[Any], seconds: float) -> asyncio.TimerHandle:
    """Fail `future` with DeadlineExceeded in `seconds`, if nothing else has settled it by then."""
    return future.get_loop().call_later(max(seconds, SHORTEST_TIMER), expire, future, seconds)


def expire(future: asyncio.Future[Any], timeout: float) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded(f"no result came within {timeout:g} s"))


def fail_all(entries: Iterable[Entry], error: BaseException) -> None:
    """Give each entry a copy of its own."""
    for entry in entries:
        entry.fail(own_copy(error))


def unwrapped(group: Group, return_exceptions: bool) -> list[Any]:
    """Return a group's results; raise its first failure, unless failures are to stand in their places."""
    if group.failed >= 0 and not return_exceptions:
        raise group.results[group.failed]
    return group.results


def side_by_side(group: Group) -> list[Any] | NDArray[np.float32]:
    """Return the float32 rows that a packing group was given as one array; a list if not all were such rows.

    Raises its first failure.
    """
    results = unwrapped(group, False)
    if not group.rows:
        return results
    import numpy as np

    array = np.frombuffer(group.packed, np.float32).reshape(len(results), -1)
    if group.rows == len(results):
        return array
    return [row if result is None else result for result, row in zip(results, array, strict=True)]
