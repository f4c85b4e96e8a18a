"""Pace: each message is let go when it is due, to some ten microseconds, and what was late is counted.

A loop's own timers do not serve: uvloop's count whole milliseconds, asyncio's wait in whole milliseconds of epoll,
and spinning would take the processor that is to be measured. Linux has a timer that is a file (timerfd_create(2)):
the loop waits for it as it waits for a socket. Elsewhere the last millisecond is spun away.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import clock
from .._metrics import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from .traffic import Arrival, Arrivals

__all__ = ["Pace"]

MONOTONIC: Final = 1
ABSOLUTE: Final = 1
TICK: Final = 0.001  # seconds
INSTANT: Final = 1e-9  # seconds: sums of times are not exact


class Pace:
    """Hands every arrival to `send`, in order, when it is due; seconds count from `began` (clock.monotonic).

    `late` holds by how many seconds each was let go too late, because the loop was busy or the machine was.
    """

    def __init__(self, arrivals: Arrivals, send: Callable[[Arrival], object], began: float) -> None:
        self.late = Histogram()
        self._arrivals = arrivals
        self._send = send
        self._began = began
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._timer: Timer | None = None
        self._set = -1.0  # the time that the timer is set to

    async def run(self) -> None:
        """Return when the last message was let go. Raises what `send` raises."""
        self._timer = timer(self._loop, self._wake)
        try:
            self._arm()
            await self._end
        finally:
            self._timer.close()
            self._timer = None

    def over(self, user: int) -> None:
        """Tell the arrivals that a user's message has come to its end, and when."""
        self._arrivals.over(user, clock.monotonic() - self._began)
        self._arm()

    def _arm(self) -> None:
        """Set the timer where it has to be: it costs a call of the system."""
        if self._timer is not None and (at := self._arrivals.next) != self._set:
            self._set = at
            self._timer.arm(self._began + at)

    def _wake(self) -> None:
        try:
            self._let_go()
        except BaseException as error:  # noqa: BLE001 - it is raised where `run` is awaited
            if not self._end.done():
                self._end.set_exception(error)
        if not self._end.done():
            self._set = -1.0  # what has rung has to be set anew
            self._arm()
        elif self._timer is not None:
            self._timer.close()

    def _let_go(self) -> None:
        while not self._end.done() and (late := clock.monotonic() - self._began - self._arrivals.next) > -INSTANT:
            arrival = self._arrivals.take()
            if arrival is None:
                self._end.set_result(None)
            else:
                self.late.observe(max(0.0, late))
                self._send(arrival)


class Timer(Protocol):
    """Something that calls `wake` at a time."""

    def arm(self, at: float) -> None:
        """Call at `at` (clock.monotonic) instead of whatever was set."""

    def close(self) -> None:
        """Never call again; may be called twice."""


def timer(loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> Timer:
    """Return the most exact timer that there is; in virtual time the loop's own is exact."""
    if clock.for_kernels() is not None:
        return LoopTimer(loop, wake, tick=0.0)
    if (found := libc()) is not None and (
        number := found.timerfd_create(MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    ) >= 0:
        return FileTimer(loop, wake, number)
    return LoopTimer(loop, wake, tick=TICK)


class FileTimer:
    """A timer that is a file descriptor."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None], number: int) -> None:
        self._loop = loop
        self._number = number
        self._set = libc().timerfd_settime
        self._when = ItimerSpec()
        self._reference = ctypes.byref(self._when)
        loop.add_reader(number, wake)

    def arm(self, at: float) -> None:
        """Set the time; a file that could be read cannot until then."""
        seconds = int(at)
        self._when.value.seconds = seconds
        self._when.value.nanoseconds = max(1, int((at - seconds) * 1e9))  # all zero would stop it
        self._set(self._number, ABSOLUTE, self._reference, None)

    def close(self) -> None:
        """Give the file back."""
        if self._number >= 0:
            self._loop.remove_reader(self._number)
            os.close(self._number)
            self._number = -1


class LoopTimer:
    """The loop's own timer up to `tick` seconds before, from then on every turn of the loop looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None], tick: float) -> None:
        self._loop = loop
        self._wake = wake
        self._tick = tick
        self._at = 0.0
        self._handle: asyncio.Handle | None = None

    def arm(self, at: float) -> None:
        """Set the time."""
        self.close()
        self._at = at
        wait = at - clock.monotonic() - self._tick
        self._handle = self._loop.call_later(wait, self._look) if wait > 0 else self._loop.call_soon(self._look)

    def close(self) -> None:
        """Cancel what is set."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _look(self) -> None:
        if clock.monotonic() < self._at - INSTANT:
            self.arm(self._at)
        else:
            self._wake()


class TimeSpec(ctypes.Structure):
    """A time of the kernel's."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class ItimerSpec(ctypes.Structure):
    """An interval, which is none here, and the first time."""

    _fields_ = (("interval", TimeSpec), ("value", TimeSpec))


@cache
def libc() -> Any:
    """Return the C library where it has timerfd, else None."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None
