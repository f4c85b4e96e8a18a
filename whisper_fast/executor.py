"""Where a blocking function runs: inline, in a thread, or in a process, whichever costs least."""

from __future__ import annotations

import asyncio
from importlib import import_module
from inspect import iscoroutinefunction
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import msgspec

from .cache import Cache
from .errors import Closed, DeadlineExceeded
from .profile import Place, Profile, Pulse, copying, identity, known_by_name, name_of
from .threads import Job, Threads
from .waiter import expire_later

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from .processes import Processes

__all__ = ["Executor", "ExecutorStats", "FunctionStats", "Kind", "Load", "coroutine_function"]

T = TypeVar("T")
Kind = Literal["auto", "inline", "thread", "process"]

FUNCTIONS = 1024  # functions whose cost is remembered
ALWAYS_SHORT = 100e-6  # seconds: what the loop may be held for, where even the cheapest hop wakes two threads
LONGEST_LIMIT = 500e-6  # seconds: a hop that took longer was waiting for something else
SMOOTHING = 1 / 16
SETTLED = 1.0  # seconds after which it no longer matters to a program's start that worker processes start


class FunctionStats(msgspec.Struct, frozen=True):
    """What was learnt of one function: where it runs, why, and its smoothed cost in seconds a call."""

    kind: Place
    why: str
    calls: int
    wall: float
    cpu: float


class Load(NamedTuple):
    """A pool at this moment: how many workers it may have, calls that run and wait, and those it has ended so far."""

    size: int
    busy: int
    waiting: int
    done: int


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
        """Return `fn(*args)`; `kind="auto"` learns by measuring where it is cheapest (see `Profile`).

        In a process the arguments and the result are copies. After `timeout` seconds DeadlineExceeded is raised: a
        worker process is killed for it, a thread stays busy until the function ends, and what runs inline cannot be
        interrupted at all. A call that is `idempotent` is done once more when its worker dies. Raises what `fn`
        raises; Closed, Overloaded; WorkerDied; TypeError for a coroutine function.
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
            return await self._in_process(profile, fn, args, timeout, idempotent)
        raise ValueError(f"kind is {kind!r}; allowed are 'auto', 'inline', 'thread' and 'process'")

    def resize(self, *, threads: int | None = None, processes: int | None = None) -> None:
        """Change how many there may be while it runs; what is above ends with the call that it is at."""
        for name, size in (("threads", threads), ("processes", processes)):
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size!r}; there must be at least 1")
        if threads is not None:
            self._threads.resize(threads)
        if processes is not None:
            self._process_count = processes
            if self._processes is not None:
                self._processes.resize(processes)

    @property
    def threads(self) -> Load:
        """What the threads have to do now."""
        pool = self._threads
        return Load(pool.size, pool.busy, pool.waiting, pool.done)

    @property
    def processes(self) -> Load:
        """What the worker processes have to do now."""
        pool = self._processes
        if pool is None:
            return Load(self._process_count, 0, 0, 0)
        return Load(pool.size, pool.busy, pool.waiting, pool.done)

    def warm(self) -> None:
        """Start all worker processes now, without waiting for them."""
        self._workers().warm()

    async def warm_up(self) -> None:
        """Start all worker processes when the start of the program is over; the loop goes on meanwhile."""
        await asyncio.sleep(SETTLED)
        await asyncio.to_thread(import_module, "whisper_fast.processes")  # 30 ms
        if not self._closed:
            self.warm()

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
            profile = Profile(name_of(fn), movable=known_by_name(fn))
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
        pulse = Pulse(job.future.get_loop()) if profile.may_move else None
        try:
            result = plain(await (job if timeout is None else within(timeout, job.future, job)))
        finally:
            held = 0.0 if pulse is None else pulse.held()
            if job.wall:
                self._learn(profile, job)
            wall, cpu = job.wall, job.cpu
            del job  # breaks the same cycle as in `within`
        if profile.worth_a_process(wall, cpu, held):
            profile.could_move(wall, await self._threads.submit(copying, ((fn, args), result)))
        return result  # type: ignore[no-any-return]

    async def _in_process(
        self, profile: Profile, fn: Callable[..., T], args: tuple[Any, ...], timeout: float | None, idempotent: bool
    ) -> T:
        workers = self._workers()
        began, at_once = perf_counter(), not workers.waiting and workers.busy < workers.started
        call = workers.submit(fn, args, idempotent=idempotent)
        try:
            if timeout is None:
                return await call.future  # type: ignore[no-any-return]
            return await within(timeout, call.future, call.future)  # type: ignore[no-any-return]
        except DeadlineExceeded:
            workers.expire(call)
            raise
        finally:
            if at_once and call.wall:
                profile.ran_in_process(call.wall, perf_counter() - began - call.wall)
            del call  # breaks the same cycle as in `within`

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


async def within(seconds: float, future: asyncio.Future[Any], answer: Awaitable[Any]) -> Any:
    """Await `answer`, which comes through `future`; raises DeadlineExceeded after `seconds`."""
    timer = expire_later(future, seconds)
    try:
        return await answer
    finally:
        timer.cancel()
        del future, answer  # an error would keep itself alive: error, traceback, this frame, future, error


def plain(value: T) -> T:
    """Return `value`; raises TypeError if it is a coroutine, which nobody would run."""
    if isinstance(value, CoroutineType):
        value.close()
        raise TypeError("the function returned a coroutine; await it, an executor runs plain functions")
    return value


def coroutine_function(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives a coroutine; looks into partials and objects with an async `__call__`."""
    return iscoroutinefunction(fn) or iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004 - asks its kind
