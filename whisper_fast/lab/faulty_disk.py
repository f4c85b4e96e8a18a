"""A disk that fails when it is told to: a VFS of SQLite's over real files, with a power switch.

    with FaultyDisk(seed=7) as disk:
        database = await Database.open(folder, vfs=disk.name)
        disk.fail("xSync", nth=3, code=apsw.SQLITE_IOERR_FSYNC)   # the third sync from now, once
        disk.fail("xWrite", code=apsw.SQLITE_FULL, times=None)    # every write, until heal()
        disk.cut_power(after=40)                                  # at the 40th call from now
        ...
        disk.power_on()                                           # the files now hold what survived

The files lie where the caller says; `memory_folder()` is a place that costs no disk. Shared memory (the `-shm` file)
is SQLite's own business: a power cut removes it, faults in it are injected one floor below, by `xSetSystemCall`.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import apsw

from .platter import Event, Platter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["METHODS", "FaultyDisk", "memory_folder"]

METHODS: Final = {
    "xOpen": apsw.SQLITE_CANTOPEN,
    "xDelete": apsw.SQLITE_IOERR_DELETE,
    "xAccess": apsw.SQLITE_IOERR_ACCESS,
    "xRead": apsw.SQLITE_IOERR_READ,
    "xWrite": apsw.SQLITE_IOERR_WRITE,
    "xTruncate": apsw.SQLITE_IOERR_TRUNCATE,
    "xSync": apsw.SQLITE_IOERR_FSYNC,
    "xFileSize": apsw.SQLITE_IOERR_FSTAT,
    "xLock": apsw.SQLITE_IOERR_LOCK,
    "xUnlock": apsw.SQLITE_IOERR_UNLOCK,
    "xCheckReservedLock": apsw.SQLITE_IOERR_CHECKRESERVEDLOCK,
}
"""The calls that can fail, each with the error that a disk gives there."""

numbers = count()


@dataclass(slots=True)
class Fault:
    """From the `after`-th matching call on, `times` calls fail (None: all)."""

    method: str | None
    suffix: str
    after: int
    times: int | None
    code: int
    fatal: bool

    def strikes(self, method: str, file: str) -> bool:
        if self.method not in (None, method) or not file.endswith(self.suffix) or self.times == 0:
            return False
        self.after -= 1
        if self.after > 0:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class FaultyDisk:
    """The disk; `name` is its VFS. `seed` decides what is lost, and nothing else does.

    calls    how often each method was called
    journal  every `Event` since the start where `record` is asked for, notes of the caller among them
    """

    def __init__(self, *, seed: int = 0, record: bool = False) -> None:
        self.name = f"faulty-{os.getpid()}-{next(numbers)}"
        self.calls: Counter[str] = Counter()
        self.journal: list[Event] | None = [] if record else None
        self._random = Random(seed)
        self._platter = Platter()
        self._faults: list[Fault] = []
        self._cut_at: int | None = None
        self._dead = False
        self._lock = threading.Lock()
        self._open: set[FaultyFile] = set()
        self._vfs = FaultyVFS(self)

    def __enter__(self) -> FaultyDisk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the VFS away; every connection over it must be closed."""
        self._vfs.unregister()

    def fail(
        self,
        method: str | None = None,
        *,
        nth: int = 1,
        code: int | None = None,
        times: int | None = 1,
        suffix: str = "",
        fatal: bool = False,
    ) -> None:
        """Let the `nth` call of `method` (None: of any) from now fail, and those after it, `times` in all.

        `suffix` narrows it to files that end so (`.db`, `-wal`); `code` is SQLite's, the fitting one by default.
        After a `fatal` one every call fails: the process dies with it.
        """
        usual = apsw.SQLITE_IOERR if method is None else METHODS[method]
        with self._lock:
            self._faults.append(Fault(method, suffix, nth, times, usual if code is None else code, fatal))

    def heal(self) -> None:
        """Take back every fault; a power cut stays one until `power_on`."""
        with self._lock:
            self._faults.clear()

    def cut_power(self, after: int = 1) -> None:
        """Let the `after`-th call from now find the power gone, and every one after it; 0: at once."""
        with self._lock:
            self._dead = after == 0
            self._cut_at = self.calls.total() + after

    def freeze(self) -> None:
        """Let every call fail from now on, as for a process that is dead; nothing is lost by it."""
        with self._lock:
            self._dead = True

    def thaw(self) -> None:
        """Serve the next process: the machine ran on, so what was written is there, synced or not."""
        with self._lock:
            self._faults.clear()
            self._dead, self._cut_at = False, None

    @property
    def dead(self) -> bool:
        """Whether the power is gone."""
        return self._dead

    def restart(self) -> None:
        """Undo a cut as if it had been the death of the process alone: nothing is lost, and nothing more is certain.

        Every connection must have been closed.
        """
        with self._lock:
            for name in self._platter.names:
                Path(name + "-shm").unlink(missing_ok=True)
            self._faults.clear()
            self._dead, self._cut_at = False, None

    def power_on(self) -> None:
        """Put what survived into the files; every connection must have been closed."""
        with self._lock:
            left = self._platter.survivors(self._random)
            for name in self._platter.names:
                for path in (Path(name), Path(name + "-shm")):
                    path.unlink(missing_ok=True)
            for name, content in left.items():
                Path(name).write_bytes(content)
            self._platter = Platter()
            self._faults.clear()
            self._dead, self._cut_at = False, None

    def note(self, what: bytes) -> None:
        """Write into the journal what else happened at this moment."""
        self.happened(Event("note", "", 0, what))

    def happened(self, event: Event) -> None:
        """Follow an event; called by the files."""
        with self._lock:
            if self.journal is not None:
                self.journal.append(event)
            self._platter.apply(event, self._random)

    def opened(self, file: FaultyFile) -> None:
        """Know a file that is open; called by the files."""
        with self._lock:
            self._open.add(file)

    def closed(self, file: FaultyFile) -> None:
        """Know that it is not any more; called by the files."""
        with self._lock:
            self._open.discard(file)

    def warn(self, file: FaultyFile) -> None:
        """Let the next sync through every other handle of the same file fail as well; called by the files."""
        with self._lock:
            for other in self._open - {file}:
                other.warned = other.warned or other.path == file.path

    def called(self, method: str, file: str) -> None:
        """Count a call; raises the error that is due. Called by the files before they do anything."""
        with self._lock:
            self.calls[method] += 1
            if self._cut_at is not None and self.calls.total() >= self._cut_at:
                self._dead = True
            if self._dead:
                raise apsw.exception_for(apsw.SQLITE_IOERR)
            struck = [fault for fault in self._faults if fault.strikes(method, file)]
            self._dead = any(fault.fatal for fault in struck)
        if struck:
            if method == "xSync":
                self.happened(Event("failed sync", file))
            raise apsw.exception_for(struck[0].code)


class FaultyVFS(apsw.VFS):
    """What SQLite calls to open, find and delete files."""

    def __init__(self, disk: FaultyDisk) -> None:
        self.disk = disk
        super().__init__(disk.name, "")

    def excepthook(self, kind: Any, error: Any, trace: Any) -> bool:
        """Leave out what apsw would print: the errors are ours."""
        return True

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        """Open a file; one without a name is SQLite's scratch and stays out of the game."""
        if name is None:
            return apsw.VFSFile("", None, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.disk.called("xOpen", path)
        there = Path(path)
        found = there.read_bytes() if there.is_file() else None
        file = FaultyFile(self.disk, path, name, flags)
        if found is None:
            log = flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL)
            self.disk.happened(Event("made", path, int(bool(log))))
        else:
            self.disk.happened(Event("found", path, 0, found))
        return file

    def xDelete(self, name: str, sync_folder: bool) -> None:
        """Delete a file."""
        self.disk.called("xDelete", name)
        super().xDelete(name, sync_folder)
        self.disk.happened(Event("delete", name, int(sync_folder)))

    def xAccess(self, name: str, flags: int) -> bool:
        """Say whether a file is there."""
        self.disk.called("xAccess", name)
        return super().xAccess(name, flags)


class FaultyFile(apsw.VFSFile):
    """An open file; every call is counted, may fail, and is told to the platter when it has succeeded."""

    def __init__(self, disk: FaultyDisk, path: str, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.disk = disk
        self.path = path
        self.warned = False
        disk.opened(self)

    def excepthook(self, kind: Any, error: Any, trace: Any) -> bool:
        """Leave out what apsw would print: the errors are ours."""
        return True

    def xRead(self, amount: int, offset: int) -> bytes:
        """Read."""
        self.disk.called("xRead", self.path)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        """Write; certain only after a sync."""
        self.disk.called("xWrite", self.path)
        super().xWrite(data, offset)
        self.disk.happened(Event("write", self.path, offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        """Cut the file; certain only after a sync."""
        self.disk.called("xTruncate", self.path)
        super().xTruncate(size)
        self.disk.happened(Event("truncate", self.path, size))

    def xSync(self, flags: int) -> None:
        """Make what was written certain. The real file is not synced: the platter is this disk's truth."""
        try:
            self.disk.called("xSync", self.path)
        except apsw.Error:
            self.disk.warn(self)
            raise
        self.disk.happened(Event("sync", self.path))
        if self.warned:
            self.warned = False
            raise apsw.exception_for(apsw.SQLITE_IOERR_FSYNC)

    def xClose(self) -> None:
        """Close."""
        self.disk.closed(self)
        super().xClose()

    def xFileSize(self) -> int:
        """Return the size in bytes."""
        self.disk.called("xFileSize", self.path)
        return super().xFileSize()

    def xLock(self, level: int) -> None:
        """Lock."""
        self.disk.called("xLock", self.path)
        super().xLock(level)

    def xUnlock(self, level: int) -> None:
        """Unlock; a failure is told after it was done, or the file would stay locked for ever."""
        super().xUnlock(level)
        self.disk.called("xUnlock", self.path)

    def xCheckReservedLock(self) -> bool:
        """Say whether somebody is about to write."""
        self.disk.called("xCheckReservedLock", self.path)
        return super().xCheckReservedLock()


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Give an empty folder in memory, in the usual place where this machine has none; remove it at the end."""
    shared = Path("/dev/shm")  # noqa: S108 - a fresh folder of our own in it
    name = f"whisper-fast-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=name, dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)
