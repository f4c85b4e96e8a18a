"""Micro-batching: many callers, one call of the function that costs as much for thirty-two items as for one.

It is work-conserving. An idle batcher dispatches what came within one turn of the event loop at once; while a batch
runs the next one fills. `max_batch` and `max_wait` are bounds, never a pause: an item that has waited `max_wait`
behind a running batch starts a further one beside it. What goes into a batch, and in what order, is compiled: see
`pyx/_batch.pyx`, and `pyx/_buckets.pyx` for batches of items of one length.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import msgspec

from . import clock
from ._batch import Assembly, Entry, Group, deliver, still_wanted
from ._buckets import Buckets
from .errors import BatchMismatch, Closed, Overloaded, own_copy
from .executor import coroutine_function
from .waiter import expire_later, fail_all, side_by_side, unwrapped

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from .executor import Executor

__all__ = ["BatcherStats", "MicroBatcher"]

T = TypeVar("T")
R = TypeVar("R")

INFINITY = float("inf")
SHORTEST_TIMER = 0.001  # seconds; uvloop's timers tick in whole milliseconds
CLOSING_GRACE = 1.0  # seconds that a cancelled batch function has to end
UNORDERED = (str, bytes, Mapping, Set)


class BatcherStats(msgspec.Struct, frozen=True):
    """What a batcher has done, and what is in it now.

    `batches` were released because they were full, would have broken the cost budget, only items of other lengths
    waited (padding), nothing ran (idle), or an item had waited `max_wait` (linger); `direct` are calls of one item
    while batching was off. `calls` counts every call of the function, those that look for the item at fault included.
    `padded` is the share of padding in what the function was given, where lengths are known.
    Now `waiting` items wait, and `serving` are in the `running` batches or alone.
    """

    items: int
    batches: int
    calls: int
    full: int
    cost: int
    padding: int
    idle: int
    linger: int
    direct: int
    waiting: int
    running: int
    padded: float
    serving: int


class MicroBatcher(Generic[T, R]):
    """Collects items of many callers into calls `fn(list) -> sequence of one result an item`, sync or async.

    max_batch, max_wait   items in a batch; seconds after which an item no longer waits for the batch before it
    cost, max_cost        what an item costs, and what a batch may cost; an item above that goes alone
    max_padding           `cost` is a length, each item is paid as the longest of its batch, and at most this share of
                          a batch (from 0 to below 1) may be padding; None: items of any lengths go together
    executor              runs a `fn` that is not a coroutine function (`kind="auto"`); without one it runs inline
    enabled               asked at each submit: while it says False every item is a call of its own
    max_queue             items that may wait; above it Overloaded is raised and nothing is kept
    max_concurrent        batches that may run at once when items linger: of a function in `executor` no more than
                          there are processors, of one that blocks the loop never more than one

    Inside a batch smaller priorities come first, users take turns, and each user's items go by their deadline. A
    batch that raises is halved until the items at fault are alone (2 log2(n) further calls for one of n), and only
    their waiters get the error. An error that is `retriable` (see errors) says nothing about an item: all get it.
    """

    def __init__(
        self,
        fn: Callable[[list[T]], Any],
        *,
        max_batch: int = 32,
        max_wait: float = 0.1,
        cost: Callable[[T], float] | None = None,
        max_cost: float | None = None,
        max_padding: float | None = None,
        executor: Executor | None = None,
        enabled: Callable[[], bool] | None = None,
        max_queue: int = 10_000,
        max_concurrent: int = 4,
        name: str = "batch",
    ) -> None:
        if not max_wait >= 0:
            raise ValueError(f"max_wait is {max_wait!r}; it must be at least 0 seconds")
        for bound, value in (("max_queue", max_queue), ("max_concurrent", max_concurrent)):
            if value < 1:
                raise ValueError(f"{bound} is {value!r}; it must be at least 1")
        if max_padding is not None and cost is None:
            raise ValueError("max_padding is set; it needs `cost`, which says how long an item is")
        limits = max_batch, INFINITY if max_cost is None else max_cost
        self._queue: Assembly | Buckets = (
            Assembly(*limits, clock.for_kernels())
            if max_padding is None
            else Buckets(*limits, max_padding, clock.for_kernels())
        )
        self._fn = fn
        self._executor = None if coroutine_function(fn) else executor
        self._max_concurrent = max_concurrent if self._executor is None else min(max_concurrent, os.cpu_count() or 1)
        self._overlaps = True  # whether a second batch can run beside the first, as far as is known
        self._cost = cost
        self._enabled = enabled
        self._max_wait = max_wait
        self._max_queue = max_queue
        self._name = name
        self._running = 0
        self._scheduled = False
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: dict[asyncio.Task[None], list[Entry]] = {}  # each with those it must answer now
        self._released = {"full": 0, "cost": 0, "padding": 0, "idle": 0, "linger": 0, "direct": 0}
        self._items = self._calls = 0

    @property
    def max_wait(self) -> float:
        """Seconds that an item waits at most for the batch before it; may be changed while it runs."""
        return self._max_wait

    @max_wait.setter
    def max_wait(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError(f"max_wait is {seconds!r}; it must be at least 0 seconds")
        self._max_wait = seconds
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._linger_later()

    @property
    def max_concurrent(self) -> int:
        """Batches that may run at once."""
        return self._max_concurrent

    # ---- for callers

    async def submit(self, item: T, *, user: object = None, priority: int = 0, timeout: float | None = None) -> R:
        """Return the function's result for `item`. Cancelling it takes the item out of the queue.

        Raises Overloaded, Closed, DeadlineExceeded after `timeout` seconds, BatchMismatch, and whatever the function
        (or the cost function) raises for this item.
        """
        self._check_room(1)
        future = self._own_loop().create_future()
        entry = self._append(item, future, user, priority, timeout)
        timer = None if timeout is None else expire_later(future, timeout)
        try:
            return await future  # type: ignore[no-any-return]
        finally:
            if timer is not None:
                timer.cancel()
            self._queue.remove(entry)
            del entry, future  # an error would keep itself alive through its traceback and this frame

    async def submit_many(
        self,
        items: Iterable[T],
        *,
        user: object = None,
        priority: int = 0,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[R]:
        """Return the results of all items, in their order; they may share batches with other callers' items.

        Waits for all of them; then the first failure is raised, or stands in its place if `return_exceptions`.
        """
        group = await self._grouped(list(items), False, user, priority, timeout)
        return unwrapped(group, return_exceptions)

    async def submit_rows(
        self, items: Iterable[T], *, user: object = None, priority: int = 0, timeout: float | None = None
    ) -> Sequence[R] | NDArray[np.float32]:
        """Return what `submit_many` does, as one float32 array [len(items), width] if the results are such rows.

        Whatever batches they came in, the rows lie side by side and belong to the caller.
        """
        group = await self._grouped(list(items), True, user, priority, timeout)
        return side_by_side(group)

    async def _grouped(
        self, items: list[T], packing: bool, user: object, priority: int, timeout: float | None
    ) -> Group:
        """Let all items wait, and wait for the last of them."""
        self._check_room(len(items))
        group = Group(len(items), self._own_loop().create_future(), packing)
        if not items:
            return group
        entries = self._append_many(items, group, user, priority, timeout)
        timer = None if timeout is None else expire_later(group.future, timeout)
        try:
            await group.future
            return group
        finally:
            if timer is not None:
                timer.cancel()
            for entry in entries if group.left else ():
                self._queue.remove(entry)
            del group, entries  # as above

    def stats(self) -> BatcherStats:
        """Return the counters and what waits now."""
        return BatcherStats(
            items=self._items,
            batches=sum(self._released.values()) - self._released["direct"],
            calls=self._calls,
            waiting=len(self._queue),
            running=self._running,
            padded=self._queue.padded if isinstance(self._queue, Buckets) else 0.0,
            serving=sum(map(len, self._tasks.values())),
            **self._released,
        )

    async def drain(self) -> None:
        """Return when everything that was accepted has been answered."""
        while self._tasks or len(self._queue):
            await (asyncio.wait(self._tasks) if self._tasks else asyncio.sleep(0))

    async def close(self) -> None:
        """Take no more; whoever still waits gets Closed. A function that ignores its cancellation is left behind."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        while left := self._queue.fill():
            for waiter in left:
                waiter.fail(Closed("the batcher was closed before this item's turn came"))
        tasks = list(self._tasks)
        for task in tasks:
            for waiter in self._tasks[task]:
                waiter.fail(Closed("the batcher was closed while this item's batch was running"))
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSING_GRACE)

    async def __aenter__(self) -> MicroBatcher[T, R]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.drain()
        await self.close()

    # ---- append, linger

    def _check_room(self, count: int) -> None:
        if self._closed:
            raise Closed("the batcher is closed")
        waiting = len(self._queue)
        if waiting + count > self._max_queue:
            raise Overloaded(f"{waiting} items wait and {count} came; at most {self._max_queue} may wait")

    def _append(self, item: T, to: Any, user: object, priority: int, timeout: float | None, index: int = 0) -> Entry:
        """Let one item wait, or serve it at once while batching is off. Raises what a bad cost raises."""
        self._items += 1
        if self._enabled is not None and not self._enabled():
            return self._serve_alone(Entry(item, to, index))
        cost = 1.0 if self._cost is None else self._cost(item)
        deadline = INFINITY if timeout is None else clock.monotonic() + timeout
        entry = self._queue.append(item, to, user, priority, deadline, cost, index)
        if self._running or not self._scheduled:
            self._wake()
        return entry

    def _append_many(
        self, items: list[T], group: Group, user: object, priority: int, timeout: float | None
    ) -> list[Entry]:
        """Let all items wait and return what stands for them; one whose cost is no cost has failed at once."""
        if isinstance(self._queue, Assembly) and self._cost is None and (self._enabled is None or self._enabled()):
            deadline = INFINITY if timeout is None else clock.monotonic() + timeout
            run = self._queue.append_many(items, group, user, priority, deadline)
            self._items += len(items)
            self._wake()
            return [run] if run is not None else []
        entries = []
        for index, item in enumerate(items):
            try:
                entries.append(self._append(item, group, user, priority, timeout, index))
            except Exception as error:  # noqa: BLE001 - whatever a cost function raises is for its item alone
                Entry(item, group, index).fail(own_copy(error))
        return entries

    def _serve_alone(self, entry: Entry) -> Entry:
        self._released["direct"] += 1
        self._start(self._serve([entry]), [entry])
        return entry

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._tasks or len(self._queue):
                raise RuntimeError("a batcher serves one event loop; give the other loop a batcher of its own")
            self._loop = loop
        return loop

    def _wake(self) -> None:
        """See to it that what waits will go: in this turn of the loop, or when its time behind a batch is over."""
        if self._running:
            self._linger_later()
        elif not self._scheduled and len(self._queue):
            self._scheduled = True
            self._own_loop().call_soon(self._dispatch)

    def _linger_later(self) -> None:
        """See to it that the oldest item does not wait longer than `max_wait` behind a running batch."""
        oldest = self._queue.oldest
        if self._timer is not None or oldest is None or not self._has_place_beside():
            return
        delay = oldest + self._max_wait - clock.monotonic()
        if delay != INFINITY:
            self._timer = self._own_loop().call_later(max(delay, SHORTEST_TIMER), self._linger)

    def _linger(self) -> None:
        self._timer = None
        if self._overdue():
            self._dispatch(lingered=True)
        self._linger_later()

    def _has_place_beside(self) -> bool:
        return self._overlaps and 0 < self._running < self._max_concurrent

    def _overdue(self) -> bool:
        oldest = self._queue.oldest
        return oldest is not None and clock.monotonic() - oldest >= self._max_wait

    # ---- dispatch

    def _dispatch(self, lingered: bool = False) -> None:
        self._scheduled = False
        if (self._running == 0 or (lingered and self._has_place_beside())) and (batch := self._release(lingered)):
            self._running += 1
            self._start(self._work(batch), batch)
            self._linger_later()

    def _release(self, lingered: bool) -> list[Entry]:
        """Take the next batch out of the queue and note why it goes now."""
        batch = self._queue.fill()
        if batch:
            why = self._queue.released_by
            self._released[("linger" if lingered else "idle") if why == "empty" else why] += 1
        return batch

    def _start(self, work: Any, waiters: list[Entry]) -> None:
        task = self._own_loop().create_task(work, name=self._name)
        self._tasks[task] = waiters
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]

    async def _work(self, batch: list[Entry]) -> None:
        """Serve one batch after the other until nothing waits, or others are at it."""
        task = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            while batch:
                self._tasks[task] = batch
                await self._serve(batch)
                await asyncio.sleep(0)  # those who got their answers may go on first
                overdue = self._overdue()
                batch = self._release(overdue) if self._running == 1 or overdue else []
        finally:
            self._running -= 1
            if not self._closed:
                self._wake()

    # ---- one batch

    async def _serve(self, waiters: list[Entry]) -> None:
        """Call the function for those who still wait, and give each its result or error."""
        waiters, items = still_wanted(waiters)
        if not waiters:
            return
        try:
            results = await self._call(items)
            check_results(results, len(waiters))
            for waiter, error in deliver(waiters, results):
                waiter.fail(own_copy(error))
        except Exception as error:  # noqa: BLE001 - whatever a batch function raises is for its waiters
            await self._blame(waiters, error)
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            fail_all(waiters, Closed("the batch was cancelled while it ran") if cancelled else error)
            if not cancelled or cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                raise

    async def _call(self, items: list[T]) -> Any:
        self._calls += 1
        if self._executor is not None:
            return await self._executor.run(self._fn, items)
        results = self._fn(items)
        self._overlaps = isawaitable(results)
        return await results if self._overlaps else results

    async def _blame(self, waiters: list[Entry], error: Exception) -> None:
        """Find the items at fault: each half is a call of its own, down to single items."""
        shared = isinstance(error, BatchMismatch) or getattr(error, "retriable", False)
        if shared or len(waiters) == 1:
            fail_all(waiters, error)
            return
        middle = len(waiters) // 2
        await self._serve(waiters[:middle])
        await self._serve(waiters[middle:])


def check_results(results: Any, expected: int) -> None:
    """Raise BatchMismatch unless `results` is a sequence of the expected length."""
    if not isinstance(results, Sized) or isinstance(results, UNORDERED):
        found = type(results).__name__
        raise BatchMismatch(f"the batch function returned {found}; it must return a sequence, one result an item")
    if len(results) != expected:
        raise BatchMismatch(f"the batch function returned {len(results)} results for {expected} items")
