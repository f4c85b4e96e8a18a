"""One call under way, which its deadline, a faster answer or the pool's end may interrupt."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from whisper_fast.errors import LLMTimeout, WhisperFastError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from .alarm import Alarm

__all__ = ["Call", "Overtaken"]


class Overtaken(WhisperFastError):
    """Another attempt of the same call was faster; never leaves the pool."""


class Call:
    """A budget of seconds that runs between `arm` and `disarm`, and the task that waits inside `with call:`.

    `strike(error)` raises `error` where the task waits, or at its next entry when it is outside; this is how
    asyncio.timeout works (cancel, then uncancel), but it may be left and entered again, so a stream can keep
    one timer and still never interrupt its reader between two pieces. `overtake` raises Overtaken once.
    """

    # Defaults of the class: most calls never change them, and a call is made for every request.
    _tick = 0  # of the alarm; 0 while the budget does not run
    _armed_at = 0.0
    _cancelling = 0
    _error: WhisperFastError | None = None
    _task: asyncio.Task[object] | None = None
    _outside: asyncio.Future[None] | None = None
    _overtaken = False

    def __init__(self, budget: float, alarm: Alarm, clock: Callable[[], float]) -> None:
        self.budget = self._left = budget
        self._alarm = alarm
        self._clock = clock

    @property
    def left(self) -> float:
        """Seconds of the budget that are not used up; none after a strike."""
        if self._error is not None:
            return 0.0
        return self._left - (self._clock() - self._armed_at) if self._tick else self._left

    def arm(self, now: float) -> None:
        """Let the budget run from `now` on; harmless when it does already."""
        if not self._tick:
            self._armed_at = now
            self._tick = self._alarm.set(now + self._left, self)

    def disarm(self) -> None:
        """Stop the budget, what is left stays; harmless when it does not run."""
        if self._tick:
            self._alarm.cancel(self._tick, self)
            self._left = self.left
            self._tick = 0

    def end(self) -> None:
        """Stop the budget for good."""
        if self._tick:
            self._alarm.cancel(self._tick, self)
            self._tick = 0

    def strike(self, error: WhisperFastError) -> None:
        """End the call with `error`; only the first strike counts."""
        if self._error is None:
            self._error = error
            if self._task is not None:
                self._task.cancel()

    def overtake(self) -> None:
        """Raise Overtaken where the task waits, this once; nothing happens when it is outside or struck."""
        if self._error is None and self._task is not None and not self._overtaken:
            self._overtaken = True
            self._task.cancel()

    def outside(self) -> asyncio.Future[None] | None:
        """Return what is done once the task has left, None when no task is inside."""
        if self._task is not None and self._outside is None:
            self._outside = asyncio.get_running_loop().create_future()
        return self._outside

    def ring(self) -> None:
        """End the call: its time is over."""
        self.strike(LLMTimeout(f"the language model did not finish within {self.budget:g} s"))

    def __enter__(self) -> None:
        if self._error is not None:
            raise self._error
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - coroutines run in tasks
        self._cancelling = task.cancelling()
        self._task = task

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._outside is not None and not self._outside.done():
            self._outside.set_result(None)
        overtaken = self._overtaken
        if task is None or not (overtaken or self._error):
            return
        self._overtaken = False
        cancels = task.uncancel()
        if overtaken and self._error:
            cancels = task.uncancel()  # each of the two had cancelled it
        if cancels <= self._cancelling and kind is asyncio.CancelledError:
            raise (self._error or Overtaken("another attempt was faster")) from None
