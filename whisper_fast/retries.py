"""What failed and may succeed later is tried again: later each time, and not all at the same moment."""

from __future__ import annotations

import asyncio
import logging
from random import uniform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Retries", "pause"]

log = logging.getLogger(__name__)

FIRST, LONGEST = 1.0, 60.0  # seconds
CLOSE_SECONDS = 1.0  # that a cancelled try has to end


def pause(failures: int, at_least: float | None = None) -> float:
    """Return the seconds to wait after the `failures`-th failure: 2^(failures - 1), at most 60, times 0.5 to 1.5.

    The jitter spreads those that failed together. `at_least` is what the other side has asked for, in seconds.
    """
    doubled = min(LONGEST, FIRST * 2.0 ** min(failures - 1, 30)) * uniform(0.5, 1.5)
    return max(doubled, (at_least or 0.0) * uniform(1.0, 1.5))


class Retries:
    """Calls `again(key, failures)` when the pause of a failure is over; knows of each no more than its key."""

    def __init__(self, again: Callable[[int, int], Coroutine[None, None, None]]) -> None:
        self._again = again
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False

    def __len__(self) -> int:
        return len(self._timers)

    def __contains__(self, key: int) -> bool:
        return key in self._timers

    def later(self, *keys: int, failures: int, at_least: float | None = None) -> float:
        """Try `keys`, which failed together, again after a pause, in their order; return its seconds."""
        delay = pause(failures, at_least)
        for number, key in enumerate(keys):
            self._after(delay + number / 1000, key, failures)
        return delay

    def soon(self, key: int) -> None:
        """Try `key` at the loop's next turn."""
        self._after(0.0, key, 0)

    def forget(self, key: int) -> None:
        """Do not try `key` again by itself: somebody else does."""
        if timer := self._timers.pop(key, None):
            timer.cancel()

    async def close(self) -> None:
        """Try nothing any more; what is under way is cancelled and waited for."""
        self.closed = True
        for key in tuple(self._timers):
            self.forget(key)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)
            for task in left:
                log.warning("%s ignores that it is cancelled; it is left behind", task.get_name())

    def _after(self, delay: float, key: int, failures: int) -> None:
        if not self.closed:
            self.forget(key)
            self._timers[key] = asyncio.get_running_loop().call_later(delay, self._due, key, failures)

    def _due(self, key: int, failures: int) -> None:
        del self._timers[key]
        task = asyncio.get_running_loop().create_task(self._again(key, failures), name=f"retry:{key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
