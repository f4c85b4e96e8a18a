"""Threads that an event loop hands functions to, with as little as possible between the two.

A job goes into one C queue (`SimpleQueue`) and its result comes back through a deque; however many results are ready,
the loop is woken once for all of them. What a hop costs is the waking of two threads, twice each where the one that
wakes finds the interpreter taken by the one that woke it. So the queue is given a job in the last moment before its
task lets the loop go on, and the loop is woken by a write that lets go of the interpreter meanwhile, not by
`call_soon_threadsafe`, which keeps it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from contextvars import copy_context
from queue import Empty, SimpleQueue
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

from .errors import Closed, Overloaded, own_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextvars import Context

__all__ = ["Job", "Threads"]

RING = (1).to_bytes(8, "little")
JOINING = 1.0  # seconds; a thread that has said good-bye needs microseconds


class Job:
    """One call: what to run, where its result goes, and what it cost."""

    __slots__ = ("_queue", "args", "context", "cpu", "error", "fn", "future", "result", "submitted", "wall")

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        future: asyncio.Future[Any],
        queue: SimpleQueue[Job | None],
    ) -> None:
        self.fn = fn
        self.args = args
        self.future = future
        self._queue = queue
        self.context: Context = copy_context()
        self.submitted = perf_counter()
        self.result: Any = None
        self.error: BaseException | None = None
        self.wall = self.cpu = 0.0  # seconds, as measured in the thread

    def __await__(self) -> Generator[Any, None, Any]:
        """Go to a thread, and come back with the result; a job is awaited once."""
        self._queue.put(self)
        return (yield from self.future)

    def run(self) -> None:
        """Call the function; whatever it raises is kept for the caller."""
        wall, cpu = perf_counter(), thread_time()
        try:
            self.result = self.context.run(self.fn, *self.args)
        except BaseException as error:  # noqa: BLE001 - the caller's to handle, and a thread must not end by it
            self.error = error
        self.cpu = thread_time() - cpu
        self.wall = perf_counter() - wall

    def settle(self) -> None:
        """On the loop: hand over the result, if somebody still waits for it."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            stop = isinstance(self.error, StopIteration)  # no future can carry that one
            self.future.set_exception(own_copy(self.error) if stop else self.error)


def bell() -> tuple[int, int]:
    """Return the descriptors for reading and for writing of what wakes a loop."""
    if hasattr(os, "eventfd"):
        number = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return number, number
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


class Threads:
    """At most `size` daemon threads, started when they are needed, for one event loop at a time."""

    def __init__(self, size: int, *, max_waiting: int, name: str = "whisper-fast-thread") -> None:
        self._size = size
        self._max_waiting = max_waiting
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: deque[Job] = deque()
        self._running: set[Job] = set()
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell: tuple[int, int] | None = None  # read and write end
        self._waking = False
        self._outstanding = 0  # handed over and not come back
        self.done = 0  # jobs that have come back
        self._closed = False
        self._left: deque[threading.Thread] = deque()
        self._all_left: asyncio.Future[None] | None = None

    @property
    def size(self) -> int:
        """Threads that there may be."""
        return self._size

    @property
    def started(self) -> int:
        """Threads that exist."""
        return len(self._threads)

    @property
    def busy(self) -> int:
        """Threads inside a function now, whether or not its caller still waits."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that no thread has taken yet."""
        return max(0, self._outstanding - len(self._running) - len(self._done))

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Job:
        """Return a job for a thread; await it at once, for it counts from now on. Raises Closed, Overloaded."""
        if self._closed:
            raise Closed("the threads are closed")
        if self._outstanding >= self._max_waiting + self._size:
            raise Overloaded(f"{self._outstanding} calls wait for {self._size} threads")
        loop = self._home()
        job = Job(fn, args, loop.create_future(), self._jobs)
        self._outstanding += 1
        if self._outstanding > len(self._threads) and len(self._threads) < self._size:
            self._start()
        return job

    def resize(self, size: int) -> None:
        """Have at most `size` threads from now on; those above it end with the call that they are at."""
        for _ in range(min(len(self._threads), self._size) - size):
            self._jobs.put(None)
        self._size = size

    async def close(self, grace: float) -> None:
        """Fail what no thread has taken, and wait at most `grace` seconds for what runs."""
        self._closed = True
        if self._loop is None:
            return
        loop = self._home()
        self._fail_waiting()
        self._all_left = loop.create_future()
        for _ in self._threads:
            self._jobs.put(None)
        self._leave()
        await asyncio.wait([self._all_left], timeout=grace)
        for thread in self._left:
            thread.join(JOINING)
        for job in list(self._running):
            job.error = Closed(f"the executor was closed, and the call did not end within {grace:g} s")
            job.settle()
        self._unhang(loop)

    def _home(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("an executor serves one event loop; give the other loop an executor of its own")
            if self._bell is None:
                self._bell = bell()
            loop.add_reader(self._bell[0], self._heard)
            self._loop = loop
        return loop

    def _unhang(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the bell down; a thread that is left behind may still ring it, so then it is not closed."""
        if self._bell is None:
            return
        loop.remove_reader(self._bell[0])
        if len(self._left) == len(self._threads):
            for end in set(self._bell):
                os.close(end)
        self._bell = None

    def _start(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail_waiting(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None:
                job.error = Closed("the executor was closed before this call's turn came")
                self._done.append(job)
                self._deliver()

    # ---- in the threads

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.done():  # else its caller has gone before its turn came
                self._running.add(job)
                job.run()
                self._running.discard(job)
            self._done.append(job)
            del job  # an idle thread keeps nothing alive
            self._ring()
        self._left.append(threading.current_thread())
        self._ring()

    def _ring(self) -> None:
        """Wake the loop, unless it is being woken."""
        bell = self._bell
        if not self._waking and bell is not None:
            self._waking = True
            os.write(bell[1], RING)

    # ---- on the loop

    def _heard(self) -> None:
        if self._bell is not None:
            os.read(self._bell[0], 4096)
        self._deliver()
        if self._left:
            self._leave()

    def _deliver(self) -> None:
        self._waking = False  # before the first look: who comes after it wakes the loop again
        while self._done:
            job = self._done.popleft()
            self._outstanding -= 1
            self.done += 1
            job.settle()

    def _leave(self) -> None:
        if not self._closed:
            self._retire()
        elif len(self._left) == len(self._threads) and self._all_left is not None and not self._all_left.done():
            self._all_left.set_result(None)

    def _retire(self) -> None:
        """Forget threads that have left because there were too many; the last word may have come since."""
        while self._left:
            self._threads.remove(self._left.popleft())
        while self._outstanding > len(self._threads) and len(self._threads) < self._size:
            self._start()
