"""Where a blocking function runs: inline, in a thread, or in a process, whichever costs least."""

from __future__ import annotations

import asyncio
from functools import partial
from inspect import iscoroutinefunction
from time import perf_counter
from types import BuiltinFunctionType, CoroutineType, MethodType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from .cache import Cache
from .errors import Closed, DeadlineExceeded
from .threads import Job, Threads
from .waiter import expire_later

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from .processes import Processes

__all__ = ["Executor", "ExecutorStats", "FunctionStats", "Kind", "coroutine_function"]

T = TypeVar("T")
Kind = Literal["auto", "inline", "thread", "process"]
Place = Literal["inline", "thread"]

FUNCTIONS = 1024  # functions whose cost is remembered
SHORT_CALLS = 8  # calls in a row that must be short before a function first goes inline
MOST_SHORT_CALLS = 4096
ALWAYS_SHORT = 100e-6  # seconds: what the loop may be held for, where even the cheapest hop wakes two threads
LONGEST_LIMIT = 500e-6  # seconds: a hop that took longer was waiting for something else
LONG_INLINE = 1e-3  # seconds
SMOOTHING = 1 / 16


class FunctionStats(msgspec.Struct, frozen=True):
    """What was learnt of one function: where it runs, why, and its smoothed cost in seconds a call."""

    kind: Place
    why: str
    calls: int
    wall: float
    cpu: float


class ExecutorStats(msgspec.Struct, frozen=True):
    """What the executor is doing; `hop` is the smoothed cost in seconds of going to a thread and back."""

    threads: int
    threads_busy: int
    threads_waiting: int
    processes: int
    processes_outstanding: int
    worker_deaths: int
    workers_killed: int
    workers_recycled: int
    quarantined: int
    hop: float
    functions: dict[str, FunctionStats]


class Profile:
    """What is known of one function.

    It starts in a thread. After `SHORT_CALLS` calls in a row that each took, as wall time and as CPU time, less than

        limit = min(max(measured hop, 0.1 ms), 0.5 ms)

    it runs inline: going elsewhere would cost more than staying. One inline call above 1 ms sends it back to
    threads, and the number of short calls in a row that it then needs is four times what it was, up to 4,096.
    Between the limit and 1 ms nothing changes, so a function near the border does not flap.
    """

    __slots__ = ("calls", "cpu", "kind", "name", "needed", "short", "wall", "why")

    def __init__(self, name: str) -> None:
        self.name = name
        self.kind: Place = "thread"
        self.why = "not measured yet"
        self.calls = self.short = 0
        self.needed = SHORT_CALLS
        self.wall = self.cpu = 0.0

    def ran_in_thread(self, wall: float, cpu: float, limit: float) -> None:
        """Learn from a call in a thread."""
        self._count(wall)
        self.cpu += (cpu - self.cpu) * (SMOOTHING if self.calls > 1 else 1.0)
        if max(wall, cpu) >= limit:
            self.short = 0
            self.why = f"a call took {wall * 1e6:.0f} us, a hop is worth it from {limit * 1e6:.0f} us"
            return
        self.short += 1
        if self.short >= self.needed:
            self.kind = "inline"
            self.why = f"{self.short} calls in a row took less than {limit * 1e6:.0f} us"

    def ran_inline(self, wall: float) -> None:
        """Learn from a call on the loop."""
        self._count(wall)
        if wall > LONG_INLINE:
            self.kind = "thread"
            self.why = f"an inline call held the loop for {wall * 1e3:.1f} ms"
            self.short = 0
            self.needed = min(4 * self.needed, MOST_SHORT_CALLS)

    def _count(self, wall: float) -> None:
        self.calls += 1
        self.wall += (wall - self.wall) * (SMOOTHING if self.calls > 1 else 1.0)


class Executor:
    """Runs functions that are not coroutine functions; belongs to one event loop.

    `threads` and `processes` bound how many there are; both start when they are first needed. `max_waiting` calls may
    wait for a thread. `close()`, or leaving `async with`, gives what runs `grace` seconds.
    """

    def __init__(
        self,
        threads: int = 8,
        processes: int = 4,
        *,
        max_waiting: int = 10_000,
        grace: float = 5.0,
        worker_memory: int = 512 << 20,
    ) -> None:
        for name, size in (("threads", threads), ("processes", processes)):
            if size < 1:
                raise ValueError(f"{name} is {size!r}; there must be at least 1")
        self._threads = Threads(threads, max_waiting=max_waiting)
        self._process_count = processes
        self._worker_memory = worker_memory
        self._max_waiting = max_waiting
        self._processes: Processes | None = None
        self._profiles: Cache[Any, Profile] = Cache(FUNCTIONS)
        self._hop = ALWAYS_SHORT
        self._grace = grace
        self._closed = False

    async def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        kind: Kind = "auto",
        timeout: float | None = None,
        idempotent: bool = False,
    ) -> T:
        """Return `fn(*args)`; `kind="auto"` learns by measuring whether a thread or inline is cheaper.

        After `timeout` seconds DeadlineExceeded is raised; the function itself runs on, its thread or process stays
        busy until it ends, and what runs inline cannot be interrupted at all. Raises what `fn` raises; Closed,
        Overloaded; WorkerDied; TypeError for a coroutine function.
        """
        if self._closed:
            raise Closed("the executor is closed")
        profile = self._profile(fn)
        if kind == "auto":
            kind = profile.kind
        if kind == "inline":
            return self._inline(profile, fn, args)
        if kind == "thread":
            return await self._in_thread(profile, fn, args, timeout)
        if kind == "process":
            return await self._in_process(fn, args, timeout, idempotent)
        raise ValueError(f"kind is {kind!r}; allowed are 'auto', 'inline', 'thread' and 'process'")

    def stats(self) -> ExecutorStats:
        """Return what runs where, and what was learnt of each function and why."""
        workers = self._processes
        return ExecutorStats(
            threads=self._threads.started,
            threads_busy=self._threads.busy,
            threads_waiting=self._threads.waiting,
            processes=workers.started if workers else 0,
            processes_outstanding=workers.outstanding if workers else 0,
            worker_deaths=workers.deaths if workers else 0,
            workers_killed=workers.killed if workers else 0,
            workers_recycled=workers.recycled if workers else 0,
            quarantined=workers.quarantined if workers else 0,
            hop=self._hop,
            functions={
                p.name: FunctionStats(kind=p.kind, why=p.why, calls=p.calls, wall=p.wall, cpu=p.cpu)
                for p in self._profiles.get_many(self._profiles.keys())
                if p is not None
            },
        )

    async def close(self) -> None:
        """Take no more, fail what waits with Closed, and give what runs the grace time.

        Threads that then still run are left behind as daemons; worker processes are killed.
        """
        self._closed = True
        if self._processes is not None:
            await self._processes.close(self._grace)
        await self._threads.close(self._grace)

    async def __aenter__(self) -> Executor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _profile(self, fn: Callable[..., Any]) -> Profile:
        key = identity(fn)
        profile = self._profiles.get(key)
        if profile is None:
            if coroutine_function(fn):
                raise TypeError(f"{name_of(fn)} is a coroutine function; await it, an executor runs plain functions")
            profile = Profile(name_of(fn))
            self._profiles.put(key, profile)
        return profile

    def _inline(self, profile: Profile, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        begin = perf_counter()
        try:
            return plain(fn(*args))
        finally:
            profile.ran_inline(perf_counter() - begin)

    async def _in_thread(
        self, profile: Profile, fn: Callable[..., T], args: tuple[Any, ...], timeout: float | None
    ) -> T:
        job = self._threads.submit(fn, args)
        try:
            return plain(await answered(job.future, timeout))  # type: ignore[no-any-return]
        finally:
            if job.wall:
                self._learn(profile, job)
            del job  # breaks the same cycle as in `answered`

    async def _in_process(
        self, fn: Callable[..., T], args: tuple[Any, ...], timeout: float | None, idempotent: bool
    ) -> T:
        workers = self._workers()
        call = workers.submit(fn, args, idempotent=idempotent)
        try:
            return await answered(call.future, timeout)  # type: ignore[no-any-return]
        except DeadlineExceeded:
            workers.expire(call)
            raise
        finally:
            del call  # breaks the same cycle as in `answered`

    def _learn(self, profile: Profile, job: Job) -> None:
        hop = perf_counter() - job.submitted - job.wall
        self._hop += (hop - self._hop) * SMOOTHING
        profile.ran_in_thread(job.wall, job.cpu, min(max(self._hop, ALWAYS_SHORT), LONGEST_LIMIT))

    def _workers(self) -> Processes:
        if self._processes is None:
            from .processes import Processes  # the machinery of processes is not needed by every start

            self._processes = Processes(
                self._process_count, memory=self._worker_memory, max_waiting=self._max_waiting
            )
        return self._processes


async def answered(future: asyncio.Future[Any], timeout: float | None) -> Any:
    """Await a future that nobody else awaits; raises DeadlineExceeded after `timeout` seconds."""
    timer = None if timeout is None else expire_later(future, timeout)
    try:
        return await future
    finally:
        if timer is not None:
            timer.cancel()
        del future  # an error would keep itself alive: error, traceback, this frame, future, error


def plain(value: T) -> T:
    """Return `value`; raises TypeError if it is a coroutine, which nobody would run."""
    if isinstance(value, CoroutineType):
        value.close()
        raise TypeError("the function returned a coroutine; await it, an executor runs plain functions")
    return value


def coroutine_function(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives a coroutine; looks into partials and objects with an async `__call__`."""
    return iscoroutinefunction(fn) or iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004 - asks its kind


def identity(fn: Any) -> Any:
    """Return what stands for all calls of one piece of code: closures, partials and bound methods share it."""
    while isinstance(fn, partial):
        fn = fn.func
    if isinstance(fn, MethodType):
        fn = fn.__func__
    code = getattr(fn, "__code__", None)
    if code is not None:
        return code
    return fn if isinstance(fn, (type, BuiltinFunctionType)) else type(fn)


def name_of(fn: Any) -> str:
    while isinstance(fn, partial):
        fn = fn.func
    return f"{getattr(fn, '__module__', None) or 'builtins'}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"
