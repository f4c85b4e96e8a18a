"""One timer of the event loop for all deadlines of a pool."""

from __future__ import annotations

import asyncio
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Alarm", "Sleeper"]

NEVER = 1 << 62
FAR = 86400.0  # seconds; no timer of the loop is set for longer


class Sleeper(Protocol):
    """Who is rung when its time is over."""

    def ring(self) -> None:
        """Do what is due; must not raise."""


class Alarm:
    """Rings each sleeper at most `tick` seconds after its time, on the caller's clock.

    A deadline is a place in the set of its tick, and the loop has one timer for the earliest set: a timer of the
    loop for each call would cost uvloop 4 us, a place in a set costs 0.2 us.
    """

    __slots__ = ("_clock", "_next", "_order", "_ticks", "_timer", "tick")

    def __init__(self, tick: float, clock: Callable[[], float]) -> None:
        self.tick = tick
        self._clock = clock
        self._ticks: dict[int, set[Sleeper]] = {}
        self._order: list[int] = []
        self._next = NEVER
        self._timer: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Sleeper]:
        """Iterate over all who wait."""
        return iter([sleeper for due in self._ticks.values() for sleeper in due])

    def set(self, at: float, sleeper: Sleeper) -> int:
        """Ring `sleeper` at `at`; return its tick, with which it can be cancelled."""
        tick = int(at / self.tick) + 1 if at < NEVER else NEVER
        try:
            self._ticks[tick].add(sleeper)
        except KeyError:
            self._ticks[tick] = {sleeper}
            heappush(self._order, tick)
            if tick < self._next:
                self._arm(tick)
        return tick

    def cancel(self, tick: int, sleeper: Sleeper) -> None:
        """Let `sleeper` sleep; harmless when it was rung."""
        due = self._ticks.get(tick)
        if due is not None:
            due.discard(sleeper)

    def close(self) -> None:
        """Ring nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._ticks.clear()
        self._order.clear()
        self._timer, self._next = None, NEVER

    def _arm(self, tick: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = tick
        delay = min(max(0.0, tick * self.tick - self._clock()), FAR)
        self._timer = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        self._timer, self._next = None, NEVER
        now = self._clock() + 0.001  # the loop's timers may be early by their grain
        while self._order and self._order[0] * self.tick <= now:
            for sleeper in self._ticks.pop(heappop(self._order)):
                sleeper.ring()
        while self._order and not self._ticks[self._order[0]]:
            del self._ticks[heappop(self._order)]
        if self._order:
            self._arm(self._order[0])
