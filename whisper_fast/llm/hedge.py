"""A second attempt for a call that takes longer than most do; the first answer counts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from whisper_fast.errors import WhisperFastError
from whisper_fast.flags import logged

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from .budget import Budget
    from .call import Call
    from .latency import Latency
    from .upstream import Visit

__all__ = ["BURST", "SHARE", "SOONEST", "Hedge", "Hedges"]

T = TypeVar("T")
GRAIN = 0.0005  # seconds that a timer of the loop may be early
WORTH = 0.15  # of the latest 20 or so that must have won, else only every tenth is made to see whether they do again
SOONEST = 0.005  # seconds; a call that is quicker is not worth another connection
SHARE, BURST = 0.07, 10.0  # extra requests for each answer, and how many at once after a calm time


class Hedges:
    """What the hedges of a pool share (Dean and Barroso, The Tail at Scale, CACM 2013).

    A call is hedged when it has no answer (a stream: no first piece) after the time that 93 of 100 calls to its
    endpoint need, at most 7 hedges for 100 answers, and only while a slot is free that nobody waits for. In an
    outage there are no answers, so the budget is soon spent, and an endpoint that is shut has no free slot. Where
    hedges hardly ever win, as when the slow calls are those with the long answers, nine of ten are left out, and
    where most calls need less than 5 ms there are none.

    A call that is watched costs a place in a queue: `start` is only asked when its time has come, and the loop has
    one timer for the head of the queue.
    """

    __slots__ = ("_clock", "_failed", "_left_out", "_losers", "_rate", "_seen", "budget", "won")

    def __init__(
        self, clock: Callable[[], float], budget: Budget, failed: Callable[[str, Exception], None] = logged
    ) -> None:
        self.budget = budget
        self._failed = failed
        self.won = 0
        self._rate = 0.5  # of those that won, of late
        self._left_out = 0
        self._clock = clock
        self._seen: set[Latency] = set()
        self._losers: set[asyncio.Task[Any]] = set()

    def watch(self, latency: Latency, visit: Visit, start: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Call `start(visit, *args)` when the visit is still pending after the time that most calls need."""
        visit.watch = start, args
        try:
            latency.watched.append((visit.begun + latency.high, visit))
            if latency.timer is None:
                self._arm(latency)
        except Exception as error:  # noqa: BLE001 - the call goes on without a second attempt
            visit.watch = None
            self._failed("hedging", error)

    def _arm(self, latency: Latency) -> None:
        """Set the timer for the first of the queue that is still pending."""
        watched = latency.watched
        while watched and watched[0][1].watch is None:
            watched.popleft()
        if watched:
            self._seen.add(latency)
            delay = max(0.0, watched[0][0] - self._clock())
            latency.timer = asyncio.get_running_loop().call_later(delay, self._due, latency)

    def _due(self, latency: Latency) -> None:
        latency.timer = None
        watched, now = latency.watched, self._clock() + GRAIN
        while watched and (watched[0][0] <= now or watched[0][1].watch is None):
            visit = watched.popleft()[1]
            if visit.watch is not None and self.budget.left >= 1 and self._worth():
                start, args = visit.watch
                try:
                    start(visit, *args)
                except Exception as error:  # noqa: BLE001 - as above
                    self._failed("hedging", error)
        self._arm(latency)

    def _worth(self) -> bool:
        if self._rate >= WORTH:
            return True
        self._left_out = (self._left_out + 1) % 10
        return self._left_out == 0

    def ended(self, won: bool) -> None:
        """Count a hedge that answered first, or did not."""
        self.won += won
        self._rate += (won - self._rate) / 20

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a cancelled task until its end."""
        self._losers.add(task)
        task.add_done_callback(self._losers.discard)

    async def close(self) -> None:
        """Watch nobody any more, and wait for the end of all that was cancelled."""
        for latency in self._seen:
            latency.watched.clear()
            if latency.timer is not None:
                latency.timer.cancel()
        if self._losers:
            await asyncio.wait(self._losers)


class Hedge(Generic[T]):
    """The second attempt of one call, begun at once: it interrupts the first one with its answer.

    `attempt` may be cancelled at any time and does not settle its visit: `settled` does that for an answer (a
    stream's is settled by whoever reads it on), and `discard` gives back what an answer holds that came too late.
    """

    __slots__ = ("_call", "_discard", "_hedges", "_settled", "_task", "_visit")

    def __init__(
        self,
        hedges: Hedges,
        call: Call,
        visit: Visit,
        attempt: Coroutine[Any, Any, T],
        settled: Callable[[Visit, T], None] | None = None,
        discard: Callable[[T], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        hedges.budget.spend()
        self._hedges = hedges
        self._call = call
        self._visit = visit
        self._settled = settled
        self._discard = discard
        self._task: asyncio.Task[T] | None = asyncio.get_running_loop().create_task(attempt, name="llm-hedge")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        visit = self._visit
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
        """Whether its result was neither taken nor given up."""
        return self._task is not None

    async def result(self) -> T:
        """Wait for its end and return what it brings; raises what it raises."""
        assert self._task is not None  # noqa: S101 - asked only while it is running
        await asyncio.wait([self._task])
        return self.take_result()

    def take_result(self) -> T:
        """Return what it has brought; raises what it raised."""
        assert self._task is not None  # noqa: S101 - asked only while it is running
        task, self._task = self._task, None
        answer = task.result()
        self._hedges.ended(won=True)
        return answer

    def cancel(self) -> None:
        """Give it up, whatever its state; harmless when its result was taken."""
        task, self._task = self._task, None
        if task is None:
            return
        self._hedges.ended(won=False)
        if not task.done():
            task.cancel()
            self._hedges.keep(task)
        elif self._discard is not None and not task.cancelled() and task.exception() is None:
            self._hedges.keep(asyncio.ensure_future(self._discard(task.result())))
