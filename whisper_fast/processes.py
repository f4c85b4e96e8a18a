"""Worker processes: spawned, never forked, replaced when one dies, and gone when the parent is."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from . import worker
from .errors import Closed, WorkerDied

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from .threads import Threads

__all__ = ["Processes"]


class Processes:
    """At most `size` workers, started at first use; functions, arguments and results must be picklable."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False
        self.deaths = 0  # pools that were replaced because a worker died
        self.outstanding = 0

    @property
    def started(self) -> int:
        """Workers that exist."""
        return len(workers(self._pool))

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> asyncio.Future[Any]:
        """Hand a call to a worker; the future raises WorkerDied when its worker does, Closed after `close()`.

        Raises what pickle raises for something that cannot be sent.
        """
        if self._closed:
            raise Closed("the worker processes are closed")
        work = pickle.dumps((fn, args), pickle.HIGHEST_PROTOCOL)
        try:
            running = self._started().submit(worker.call, work)
        except BrokenProcessPool:  # it broke while nobody waited for it
            self._replace(self._pool)
            running = self._started().submit(worker.call, work)
        return self._follow(running)

    async def close(self, grace: float, threads: Threads) -> None:
        """Cancel what waits, give what runs `grace` seconds, then kill it. `threads` lends one for the waiting."""
        self._closed = True
        pool, self._pool = self._pool, None
        if pool is None:
            return
        alive = workers(pool)
        ended = threads.submit(lambda: pool.shutdown(wait=True, cancel_futures=True), ()).future
        await asyncio.wait([ended], timeout=grace)
        if not ended.done():
            for process in alive:
                process.kill()
        await ended

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._size, mp_context=spawn, initializer=worker.begin)
        return self._pool

    def _replace(self, broken: ProcessPoolExecutor | None) -> None:
        """Forget a broken pool, once: all its calls report the same death."""
        if broken is not None and self._pool is broken:
            self._pool = None
            self.deaths += 1
            broken.shutdown(wait=False)

    def _follow(self, running: Future[Any]) -> asyncio.Future[Any]:
        """Return a future of the loop for one of the pool's; unlike asyncio's own it may be settled by a timeout."""
        loop, pool = asyncio.get_running_loop(), self._pool
        waiter: asyncio.Future[Any] = loop.create_future()
        self.outstanding += 1

        def settle(done: Future[Any]) -> None:
            self.outstanding -= 1
            broken = not done.cancelled() and isinstance(done.exception(), BrokenProcessPool)
            if broken and not self._closed:
                self._replace(pool)
            if not waiter.done():
                self._settle(waiter, done, broken)

        def ended(done: Future[Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, done)

        waiter.add_done_callback(lambda _: running.cancel())
        running.add_done_callback(ended)
        return waiter

    def _settle(self, waiter: asyncio.Future[Any], done: Future[Any], broken: bool) -> None:
        if done.cancelled() or (broken and self._closed):
            waiter.set_exception(Closed("the executor was closed before this call had ended"))
        elif broken:
            waiter.set_exception(WorkerDied("a worker process ended while it had this call; its pool was replaced"))
        elif error := done.exception():
            waiter.set_exception(error)
        else:
            waiter.set_result(done.result())


def workers(pool: ProcessPoolExecutor | None) -> list[multiprocessing.process.BaseProcess]:
    """Return the pool's processes; it has no public name for them before Python 3.14's `kill_workers`."""
    return list((getattr(pool, "_processes", None) or {}).values())
