"""A second attempt for a call that takes longer than most do; the first answer counts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from whisper_fast.errors import WhisperFastError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from .alarm import Alarm
    from .budget import Budget
    from .call import Call
    from .upstream import Visit

__all__ = ["Hedge", "Hedges"]

T = TypeVar("T")
SHARE, BURST = 0.07, 10.0  # extra requests for each answer, and how many at once after a calm time


class Hedges:
    """What the hedges of a pool share (Dean and Barroso, The Tail at Scale, CACM 2013).

    A call is hedged when it has no answer (a stream: no first piece) after the time that 93 of 100 calls to its
    endpoint need, at most 7 hedges for 100 answers, and only while a slot is free that nobody waits for. In an
    outage there are no answers, so the budget is soon spent, and an endpoint that is shut has no free slot.
    """

    __slots__ = ("_losers", "alarm", "budget", "won")

    def __init__(self, alarm: Alarm, budget: Budget) -> None:
        self.alarm = alarm
        self.budget = budget
        self.won = 0
        self._losers: set[asyncio.Task[Any]] = set()

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a cancelled task until its end."""
        self._losers.add(task)
        task.add_done_callback(self._losers.discard)

    async def close(self) -> None:
        """Wait for the end of all that was cancelled."""
        if self._losers:
            await asyncio.wait(self._losers)


class Hedge(Generic[T]):
    """The second attempt of one call: waits for its time, runs, and interrupts the first one with its answer.

    `take` returns a visit, or None where there is no room. `attempt` may be cancelled at any time and does not settle
    its visit: `settled` does that for an answer (a stream's is settled by whoever reads it on), and `discard` gives
    back what an answer holds that came too late.
    """

    __slots__ = ("_attempt", "_call", "_discard", "_hedges", "_settled", "_take", "_task", "_tick", "_visit")

    def __init__(
        self,
        hedges: Hedges,
        call: Call,
        at: float,
        take: Callable[[], Visit | None],
        attempt: Callable[[Visit], Coroutine[Any, Any, T]],
        settled: Callable[[Visit, T], None] | None = None,
        discard: Callable[[T], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._hedges = hedges
        self._call = call
        self._take = take
        self._attempt = attempt
        self._settled = settled
        self._discard = discard
        self._task: asyncio.Task[T] | None = None
        self._visit: Visit | None = None
        self._tick = hedges.alarm.set(at, self)

    def ring(self) -> None:
        """Start the second attempt, if the budget and the slots allow it."""
        self._tick = 0
        if self._hedges.budget.left < 1 or (visit := self._take()) is None:
            return
        self._hedges.budget.spend()
        self._visit = visit
        self._task = asyncio.get_running_loop().create_task(self._attempt(visit), name="llm-hedge")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        visit = self._visit
        assert visit is not None  # noqa: S101 - it was set before the task
        if task.cancelled():
            visit.left()
        elif isinstance(error := task.exception(), WhisperFastError):
            visit.failed(error)
        elif error is not None:
            visit.left()
        else:
            if self._settled is not None:
                self._settled(visit, task.result())
            if self._task is task:
                self._call.overtake()
            elif self._discard is not None:
                self._hedges.keep(asyncio.ensure_future(self._discard(task.result())))

    @property
    def running(self) -> bool:
        """Whether the second attempt was started and was not given up."""
        return self._task is not None

    async def result(self) -> T:
        """Wait for the second attempt and return what it brings; raises what it raises."""
        assert self._task is not None  # noqa: S101 - asked only while it is running
        await asyncio.wait([self._task])
        return self.take_result()

    def take_result(self) -> T:
        """Return what the second attempt has brought; raises what it raised."""
        assert self._task is not None  # noqa: S101 - it was started
        task, self._task = self._task, None
        answer = task.result()
        self._hedges.won += 1
        return answer

    def cancel(self) -> None:
        """Give the second attempt up, whatever its state; harmless when its result was taken."""
        if self._tick:
            self._hedges.alarm.cancel(self._tick, self)
            self._tick = 0
        task, self._task = self._task, None
        if task is None:
            return
        if not task.done():
            task.cancel()
            self._hedges.keep(task)
        elif self._discard is not None and not task.cancelled() and task.exception() is None:
            self._hedges.keep(asyncio.ensure_future(self._discard(task.result())))
