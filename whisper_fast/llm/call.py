"""One call under way, which its deadline or the pool's end may interrupt."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from whisper_fast.errors import LLMTimeout, WhisperFastError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Call"]


class Call:
    """A budget of seconds that runs between `arm` and `disarm`, and the task that waits inside `with call:`.

    `strike(error)` raises `error` where the task waits, or at its next entry when it is outside; this is how
    asyncio.timeout works (cancel, then uncancel), but it may be left and entered again, so a stream can keep
    one timer and still never interrupt its reader between two pieces.
    """

    __slots__ = ("_armed_at", "_cancelling", "_error", "_left", "_outside", "_task", "_timer", "budget")

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._left = budget
        self._armed_at = 0.0
        self._error: WhisperFastError | None = None
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._outside: asyncio.Future[None] | None = None
        self._cancelling = 0

    @property
    def left(self) -> float:
        """Seconds of the budget that are not used up; none after a strike."""
        if self._error is not None:
            return 0.0
        return self._left if self._timer is None else self._left - (monotonic() - self._armed_at)

    def arm(self) -> None:
        """Let the budget run."""
        self._armed_at = monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, self._left), self._expire)

    def disarm(self) -> None:
        """Stop the budget, what is left stays; harmless when it does not run."""
        if self._timer is not None:
            self._timer.cancel()
            self._left = self.left
            self._timer = None

    def end(self) -> None:
        """Stop the budget for good."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def strike(self, error: WhisperFastError) -> None:
        """End the call with `error`; only the first strike counts."""
        if self._error is None:
            self._error = error
            if self._task is not None:
                self._task.cancel()

    def outside(self) -> asyncio.Future[None] | None:
        """Return what is done once the task has left, None when no task is inside."""
        if self._task is not None and self._outside is None:
            self._outside = asyncio.get_running_loop().create_future()
        return self._outside

    def _expire(self) -> None:
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
        struck = self._error
        if struck is None or task is None:
            return
        if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise struck from None
