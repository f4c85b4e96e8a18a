"""The engine's edges to disk and threads, replaced by ones that are inline and deterministic."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from ...engine import Engine
from ...executor import Executor
from ...store.sqlite import Database
from ...store.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import apsw

    from ..faulty_disk import FaultyDisk

__all__ = ["simulated_engine"]

T = TypeVar("T")


def simulated_engine(disk: FaultyDisk, delay: Callable[[], float], made: list[Database]) -> type[Engine]:
    """Return an engine on that disk; `delay()` draws how long a commit or a thread takes, in seconds.

    Each database that is opened is put into `made`.
    """

    class InlineWriter(Writer):
        """The writer's own code, called by a timer in the place of its thread."""

        _timer: asyncio.TimerHandle | None = None

        def _start(self) -> None:
            self._idle()

        def put(self, job: Callable[[apsw.Connection], Any], future: asyncio.Future[Any]) -> None:
            super().put(job, future)
            self._later(delay())

        def close(self) -> None:
            while not self._jobs.empty():
                self._work()
            self._end()
            self._checkpoints.close()
            self._opened.close()

        def _later(self, seconds: float) -> None:
            if self._timer is not None:
                if self._timer.when() <= self._loop.time() + seconds:
                    return
                self._timer.cancel()
            self._timer = self._loop.call_later(seconds, self._work)

        def _work(self) -> None:
            self._timer = None
            self._serve(self._gather(0))
            if not self._jobs.empty():
                self._later(delay())
            else:
                self._idle()

        def _idle(self) -> None:
            if not disk.dead and (seconds := self._wait()) is not None:
                self._later(max(seconds, 0.001))

    class InlineDatabase(Database):
        writer = InlineWriter

        @classmethod
        async def open(cls, folder: Path, *, vfs: str | None = disk.name, **more: Any) -> Database:
            made.append(await super().open(folder, vfs=vfs, **more))
            return made[-1]

    class InlineExecutor(Executor):
        """Runs a function where it is asked to, and hands the result over later."""

        async def run(self, fn: Callable[..., T], *args: Any, **_: Any) -> T:
            result = fn(*args)
            await asyncio.sleep(delay())
            return result

    class SimulatedEngine(Engine):
        database = InlineDatabase
        executor = InlineExecutor
        watched = False

    return SimulatedEngine
