"""The database: one writer that commits in groups, readers beside it, and what may be asked of them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, ClassVar, TypeVar

from ..errors import Closed
from .files import DATABASE
from .health import Health
from .opened import Opened
from .readers import Readers
from .schema import want_compaction
from .writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import apsw

    from ..errors import StoreError

__all__ = ["Database"]

T = TypeVar("T")


class Database:
    """The one SQLite file of a data folder; `writer` is what brings jobs to the disk."""

    writer: ClassVar[type[Writer]] = Writer

    def __init__(self, opened: Opened, vfs: str | None) -> None:
        self.path = opened.path
        self.folder = opened.path.parent
        self._closed = False
        self._exclusive = opened.lock is not None
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[], None]] = []
        self._health = Health()
        self._readers = Readers(opened.path, vfs, self._health.found_damage)
        self._compacted = 0
        self._reading = 0
        self._compactions: list[tuple[int, asyncio.Future[None]]] = []
        self._writer = self.writer(
            opened,
            self._health,
            vfs,
            let_go=self._readers.let_go,
            changed=self._changed,
            traceless=self._traceless,
        )

    @classmethod
    async def open(
        cls, folder: Path, *, name: str = DATABASE, exclusive: bool = True, vfs: str | None = None
    ) -> Database:
        """Open the database `name` in `folder`, made if it is not there, and bring its schema up to date.

        `exclusive` is what an engine asks for: a second one on the same folder gets StoreLocked. `vfs` names
        one of SQLite's, None is the system's. Raises StoreError.
        """
        opened = await asyncio.to_thread(Opened.make, folder / name, exclusive=exclusive, vfs=vfs)
        try:
            return cls(opened, vfs)
        except BaseException:
            opened.close()
            raise

    @property
    def problem(self) -> StoreError | None:
        """Why nothing is written at present, None while the disk takes what it is given."""
        return self._health.problem

    @property
    def damage(self) -> StoreError | None:
        """What could not be read because a page is damaged, until the file is another one."""
        return self._health.damage

    @property
    def commits(self) -> int:
        """Groups that were brought to the disk or refused by it."""
        return self._writer.commits

    @property
    def writes(self) -> int:
        """Jobs in those groups."""
        return self._writer.writes

    @property
    def waiting(self) -> int:
        """Jobs that are not known to be on the disk yet."""
        return self._writer.waiting

    @property
    def writing(self) -> bool:
        """Whether the writer is at a group of jobs, so that those who wait do wait for the disk."""
        return self._writer.busy

    @property
    def reading(self) -> int:
        """Questions that have no answer yet; `READERS` of them are answered at once."""
        return self._reading

    async def write(self, job: Callable[[apsw.Connection], T]) -> T:
        """Run `job` in the writer's transaction; when this returns, what it wrote is on the disk.

        A job that raises is undone by itself, the rest of its group stands. A group with one is run once more: what
        a job does besides SQL must bear that. Raises what the job raises; StoreError where the disk fails, and then
        the job may have been stored all the same, or not.
        """
        return await self.submit(job)

    def submit(self, job: Callable[[apsw.Connection], T]) -> asyncio.Future[T]:
        """Hand in a job as `write` does, in the order of the calls; the future is done when it is on the disk."""
        if self._closed:
            raise Closed("the database is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._writer.put(job, future)
        return future

    async def read(self, job: Callable[[apsw.Connection], T]) -> T:
        """Run `job` in a reader thread with a connection of its own. Raises what the job raises; StoreError."""
        if self._closed:
            raise Closed("the database is closed")
        self._reading += 1
        try:
            return await self._loop.run_in_executor(self._readers.threads, partial(self._readers.read, job))
        finally:
            self._reading -= 1

    async def compact(self) -> None:
        """Wait until no file of the folder holds a trace of what was deleted before; it begins by itself, too.

        Backups that were made before the deletion are not touched. Beside an engine it only notes the wish: the
        engine does it after its next message. Raises StoreError, Closed.
        """
        number = await self.write(want_compaction)
        if self._exclusive and number > self._compacted:
            gone: asyncio.Future[None] = self._loop.create_future()
            self._compactions.append((number, gone))
            await gone

    def on_foreign_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the loop when another process has written: what is cached may be old."""
        self._listeners.append(listener)

    async def look(self) -> None:
        """Find out whether another process has written, as each write does besides. Raises StoreError."""
        await self.write(lambda _: None)

    async def close(self) -> None:
        """Finish what was handed in, then close every connection and give the folder back."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._shut)
        for _, gone in self._compactions:
            if not gone.done():
                gone.set_exception(Closed("the database was closed before what was deleted had left no trace"))

    def _shut(self) -> None:
        self._readers.close()
        self._writer.close()

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def _traceless(self, upto: int) -> None:
        self._compacted = upto
        for number, gone in self._compactions:
            if number <= upto and not gone.done():
                gone.set_result(None)
        self._compactions = [(number, gone) for number, gone in self._compactions if not gone.done()]
