"""The writer: one thread that commits in groups, tells whoever waits, and outlives what the disk does to it.

A commit costs one fsync however many jobs are in it. While the disk works on one group, the next one gathers, so
the group grows with the load by itself and an idle database commits a single job at once; there is no timer.

When the disk fails, the whole group is undone and everybody in it is told; nothing more is written until a probe has
reached the disk, see `Health`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import apsw

from ..errors import StoreError
from .checkpoints import Checkpoints, checkpoint
from .compaction import Compaction
from .files import DISK_ERRORS, translate

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from .health import Health
    from .opened import Opened

__all__ = ["Writer"]

log = logging.getLogger(__name__)

GROUP: Final = 1024  # jobs in one commit at most: bounds how long the first of them waits for the last
PATIENCE: Final = 5000  # milliseconds that a write waits for another process
PROBE_PATIENCE: Final = 100  # the same for a probe
PROBE_BYTES: Final = 1 << 16  # what must find room before messages are taken again


class Write:
    """One job on its way to the disk, and the future of whoever waits for it."""

    __slots__ = ("error", "future", "job", "result")

    def __init__(self, job: Callable[[apsw.Connection], Any], future: asyncio.Future[Any]) -> None:
        self.job = job
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None

    def settle(self) -> None:
        if self.future.done():  # the waiter was cancelled: the commit stands all the same
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class Writer:
    """The thread and its queue.

    let_go     closes everybody else's connections, and keeps them closed in its block; for some seconds at most
    changed    called on the loop when somebody else has written, or may have
    traceless  called on the loop with the number of the last deletion whose traces are gone
    """

    def __init__(
        self,
        opened: Opened,
        health: Health,
        vfs: str | None,
        *,
        let_go: Callable[..., AbstractContextManager[bool]],
        changed: Callable[[], None],
        traceless: Callable[[int], None],
    ) -> None:
        self.health = health
        self.commits = 0
        self.writes = 0
        self.waiting = 0  # jobs whose waiters have not been told yet
        self.busy = False  # whether it is at a group now
        self._opened = opened
        self._vfs = vfs
        self._loop = asyncio.get_running_loop()
        self._let_go = let_go
        self._changed = changed
        self._traceless = traceless
        self._foreign = False
        self._jobs: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._last = False
        self._group: list[Write] = []
        self._log_pages = 0
        self._checkpoints = Checkpoints(opened.path, vfs, let_go)
        self._seen = 0
        self._compaction = Compaction(vfs, self._compacted)
        self._take(opened)
        self._thread = threading.Thread(target=self._run, name="whisper-fast-writer", daemon=True)
        self._start()

    def put(self, job: Callable[[apsw.Connection], Any], future: asyncio.Future[Any]) -> None:
        """Hand in a job; the future is done when it is on the disk, or cannot get there."""
        self.waiting += 1
        self._jobs.put(Write(job, future))

    def close(self) -> None:
        """Finish what was handed in and close the database."""
        self._jobs.put(None)
        self._thread.join()
        self._tend(self._checkpoints.close)
        self._opened.close()

    def _start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._last:
                self._group = self._gather(self._wait())
                self._serve(self._group)
            self._end()
        except BaseException as error:  # whatever it is, nobody may wait for ever
            log.exception("the writer has ended")
            self._refuse_all(StoreError(f"the writer has ended, restart the engine: {type(error).__name__}: {error}"))

    def _end(self) -> None:
        if self.health.problem is None:
            self._tend(self._finish)

    def _wait(self) -> float | None:
        """Return how long to wait for a job: until the next probe, or the next slice of a compaction."""
        return self.health.wait() if self.health.problem is not None else self._compaction.wait(idle=True)

    def _serve(self, group: list[Write]) -> None:
        busy = bool(group)
        try:
            if self.health.problem is not None and self.health.due(asked=busy):
                self._probe()
            if group:
                self.busy = True
                self._write(group)
                group = self._group = []  # they have been told: what fails from now on is not theirs
                self._checkpoint()
            if self.health.problem is None and self._compaction.wait(idle=not busy) == 0.0:
                self._tend(self._compact)
        except Exception as error:  # a fault of ours: everybody is told, and a new connection is tried
            log.exception("the writer met what it did not expect")
            self._fail(group, self._ours(error))
        finally:
            self.busy = False

    def _refuse_all(self, problem: StoreError) -> None:
        """Answer what is handed in from now until the end: nothing is written any more."""
        self.health.fell_ill(problem)
        self._refuse(self._group, problem)
        while not self._last:
            self._refuse(self._gather(None), problem)

    def _gather(self, timeout: float | None) -> list[Write]:
        """Wait for a job, `timeout` seconds at most, and take along what else is there."""
        group: list[Write] = []
        try:
            job = self._jobs.get(timeout=timeout)
            while job is not None:
                group.append(job)
                if len(group) == GROUP:
                    return group
                job = self._jobs.get_nowait()
            self._last = True
        except queue.Empty:
            pass
        return group

    def _write(self, group: list[Write]) -> None:
        if (problem := self.health.problem) is not None and self.health.refuses:
            self._refuse(group, problem)
            return
        try:
            self._commit(group)
        except BaseException as error:  # noqa: BLE001 - SQLite's errors, and whatever else ends a transaction
            self._fail(group, self._ours(error))
            return
        if self.health.problem is not None:
            self._probe()  # it fitted: before anybody is told, see whether all is well again
        self._look_for_deletions()
        self._count(group)
        self._tell(group)

    def _commit(self, group: list[Write]) -> None:
        """Bring a group to the disk, and notice whether somebody else had written before."""
        connection = self._opened.connection
        connection.execute("BEGIN IMMEDIATE")
        self._look_for_others()
        try:
            for write in group:
                write.result = write.job(connection)
        except DISK_ERRORS:
            raise
        except BaseException:  # noqa: BLE001 - a job's own error: it is undone alone, the others stand
            self._one_by_one(group)
        connection.execute("COMMIT")
        self._opened.check()

    def _one_by_one(self, group: list[Write]) -> None:
        """Begin the group anew with a savepoint for each job, which would cost every group a third of its time."""
        connection = self._opened.connection
        self._roll_back()
        connection.execute("BEGIN IMMEDIATE")
        for write in group:
            connection.execute("SAVEPOINT job")
            try:
                write.result = write.job(connection)
            except DISK_ERRORS:
                raise
            except BaseException as error:  # noqa: BLE001 - somebody else's code: its error goes to its waiter
                connection.execute("ROLLBACK TO job")
                write.error = self._of_job(error)
            connection.execute("RELEASE job")

    def _of_job(self, error: BaseException) -> BaseException:
        return error if isinstance(error, Exception) and not isinstance(error, apsw.Error) else self._ours(error)

    def _ours(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError):
            return error
        ours = translate(error, str(self._opened.path))
        ours.__cause__ = error
        return ours

    def _fail(self, group: list[Write], problem: StoreError) -> None:
        """Undo a group, tell everybody in it, and write nothing more until a probe succeeds."""
        self.health.fell_ill(problem)
        self._roll_back_quietly()
        self._count(group)
        self._refuse(group, problem)

    def _refuse(self, group: list[Write], problem: StoreError) -> None:
        for write in group:
            write.error = problem.copy()
        self._tell(group)

    def _roll_back(self) -> None:
        if self._opened.connection.in_transaction:
            self._opened.connection.execute("ROLLBACK")

    def _count(self, group: list[Write]) -> None:
        self.commits += 1
        self.writes += len(group)

    def _compacted(self, upto: int) -> None:
        with suppress(RuntimeError):  # a loop that is closed has nobody left
            self._loop.call_soon_threadsafe(self._traceless, upto)

    def _tell(self, group: list[Write]) -> None:
        """Wake everybody in a group with one call to the loop; a loop that is closed has nobody left."""
        foreign, self._foreign = self._foreign, False
        try:
            self._loop.call_soon_threadsafe(self._settle, group, foreign)
        except RuntimeError:
            log.debug("%d writes ended after their event loop", len(group))

    def _settle(self, group: list[Write], foreign: bool) -> None:
        if foreign:
            self._changed()
        self.waiting -= len(group)
        for write in group:
            write.settle()

    def _look_for_others(self) -> None:
        """Notice whether another connection has written since the last group (SQLite's data_version counts those)."""
        seen, self._seen = self._seen, self._opened.connection.pragma("data_version")
        if seen != self._seen:
            self._foreign = True
            self.health.found_damage(None)  # it may have been mended; if not, the next reader says so

    def _look_for_deletions(self) -> None:
        if self._opened.lock is not None:  # whoever else has the file open may keep traces in memory
            self._compaction.look(self._opened.connection)

    def _take(self, opened: Opened) -> None:
        self._opened = opened
        self._look_for_deletions()
        self._seen = opened.connection.pragma("data_version")
        opened.connection.set_wal_hook(self._logged)  # in place of SQLite's own checkpoint, which keeps silent

    def _logged(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self) -> None:
        """Bring the log into the database when it is long, after everybody was told."""
        if self.health.problem is None:
            self._tend(self._checkpoints.look, self._opened.connection, self._log_pages)

    def _compact(self) -> None:
        if self._checkpoints.running:
            self._compaction.later()
        else:
            self._checkpoints.settle()  # a compaction ends the log, too
            self._compaction.step(self._opened)

    def _finish(self) -> None:
        self._checkpoints.settle()
        self._compaction.finish(self._opened)

    def _tend(self, work: Callable[..., None], *args: Any) -> None:
        """Do what keeps the log short; where it fails nothing is written until a probe succeeds."""
        try:
            with self._opened.doubting():
                work(*args)
        except (apsw.Error, MemoryError, StoreError) as error:
            self._fail([], self._ours(error))

    def _probe(self) -> None:
        """Try whether a write reaches the disk again, on a new connection where that is needed."""
        try:
            if self.health.reopen or self._opened.closed or self._opened.doubtful:
                self._reopen()
            probe(self._opened.connection, read_through=self.health.damaged)
            with self._opened.doubting():
                checkpoint(self._opened.connection)
            self._opened.check()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is not well yet
            self._roll_back_quietly()
            self.health.still(self._ours(error))
        else:
            self.health.recovered()

    def _reopen(self) -> None:
        self._tend(self._checkpoints.settle)
        before = self._opened
        self._take(opened := before.again(self._vfs, self._let_go))
        self._foreign = True  # it cannot be known who wrote meanwhile
        if not opened.is_same(before):
            self.health.found_damage(None)

    def _roll_back_quietly(self) -> None:
        try:
            self._roll_back()
        except apsw.Error as error:  # the connection is opened anew before the next write
            log.debug("rolling back: %s", error)


def probe(connection: apsw.Connection, *, read_through: bool) -> None:
    """Write something that needs new pages, in a transaction that must reach the disk, and take it away again."""
    connection.set_busy_timeout(PROBE_PATIENCE)
    try:
        if read_through and (found := connection.execute("PRAGMA quick_check(1)").get) != "ok":
            raise apsw.CorruptError(f"{found:.200}")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DROP TABLE IF EXISTS probe")
        connection.execute("CREATE TABLE probe AS SELECT zeroblob(?) AS room", (PROBE_BYTES,))
        connection.execute("COMMIT")
        connection.execute("DROP TABLE probe")
    finally:
        connection.set_busy_timeout(PATIENCE)
