"""How much memory this process may use, and how near it is: control groups (v2, v1, nested), PSI, and its own size.

The machine's memory is never asked for: inside a container it says nothing. What cannot be read, or is not what it
should be, is None, "unknown". Sources: the kernel's `admin-guide/cgroup-v2.rst`, `cgroup-v1/memory.rst`,
`accounting/psi.rst`, and proc(5).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import psutil

__all__ = ["Gauge", "Pressure", "trim"]

UNLIMITED: Final = 1 << 60  # v1 writes "no limit" as the largest number of pages
MOST: Final = 1 << 16  # bytes of a file that are read


class Pressure(NamedTuple):
    """One reading, in bytes; None is unknown.

    rss     what this process holds in RAM
    group   what its control group is charged with beyond file pages that can be dropped, where there is a limit
    limit   the smallest limit on the way from its group up, None for no limit
    stalled percent of the last 10 s in which some task of the group waited for memory (PSI some avg10)
    """

    rss: int | None = None
    group: int | None = None
    limit: int | None = None
    stalled: float | None = None

    @property
    def used(self) -> int | None:
        """What counts against the budget: the group's other processes, such as our own workers, included."""
        known = [size for size in (self.rss, self.group) if size is not None]
        return max(known) if known else None


class Gauge:
    """Reads a process's `Pressure`; below `root` lie `proc` and whatever the mounts say. No method raises OSError.

    A reading opens up to a dozen files, in about 0.1 ms: call it in a thread.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._own_process = psutil.Process() if root == Path("/") else None
        self._version, self._folders = self._find()

    @property
    def kind(self) -> str:
        """`v2`, `v1`, or `none` where no group accounts for memory."""
        return self._version

    def read(self) -> Pressure:
        """Return what is so now."""
        rss = self._rss()
        limits = [(size, folder) for folder in self._folders if (size := self._limit(folder)) is not None]
        stalled = self._stalled()
        if not limits:
            return Pressure(rss, None, None, stalled)
        limit, folder = min(limits, key=lambda one: one[0])
        return Pressure(rss, self._charged(folder), limit, stalled)

    def _rss(self) -> int | None:
        fields = text(self._root / "proc/self/statm").split()
        if len(fields) > 1 and (pages := number(fields[1])) is not None:
            return pages * os.sysconf("SC_PAGE_SIZE")
        if self._own_process is None:
            return None
        try:  # no /proc: another system than Linux
            return int(self._own_process.memory_info().rss)
        except (psutil.Error, OSError):
            return None

    def _limit(self, folder: Path) -> int | None:
        names = ("memory.max", "memory.high") if self._version == "v2" else ("memory.limit_in_bytes",)
        found = [size for name in names if (size := number(text(folder / name))) is not None]
        return min((size for size in found if 0 < size < UNLIMITED), default=None)

    def _charged(self, folder: Path) -> int | None:
        name = "memory.current" if self._version == "v2" else "memory.usage_in_bytes"
        charged = number(text(folder / name))
        if charged is None:
            return None
        wanted = "inactive_file" if self._version == "v2" else "total_inactive_file"
        lines = (line.split() for line in text(folder / "memory.stat").splitlines())
        droppable = next((number(words[1]) for words in lines if len(words) == 2 and words[0] == wanted), None)
        return max(0, charged - (droppable or 0))

    def _stalled(self) -> float | None:
        if self._version == "v1" or (self._version == "v2" and not self._folders):
            return None
        file = self._folders[0] / "memory.pressure" if self._folders else self._root / "proc/pressure/memory"
        for line in text(file).splitlines():
            if line.startswith("some "):
                return percent(line)
        return None

    def _find(self) -> tuple[str, tuple[Path, ...]]:
        """Return the version and the folders of our group and those above it, as far as they can be seen."""
        groups = dict(self._groups())
        mounts = self._mounts()
        for version in ("v1", "v2"):  # where both are mounted, memory belongs to v1 if that has it
            if version in groups and version in mounts:
                return version, self._way_up(PurePosixPath(groups[version]), *mounts[version])
        return "none", ()

    def _groups(self) -> list[tuple[str, str]]:
        found = []
        for line in text(self._root / "proc/self/cgroup").splitlines():
            parts = line.split(":", 2)
            if len(parts) == 3 and parts[2].startswith("/"):
                if parts[0] == "0" and not parts[1]:
                    found.append(("v2", parts[2]))
                elif "memory" in parts[1].split(","):
                    found.append(("v1", parts[2]))
        return found

    def _mounts(self) -> dict[str, tuple[PurePosixPath, Path]]:
        """Return for each version which group is mounted and where."""
        found: dict[str, tuple[PurePosixPath, Path]] = {}
        for line in text(self._root / "proc/self/mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            place, kind = before.split(), after.split()
            if len(place) < 5 or len(kind) < 3:
                continue
            if kind[0] == "cgroup2":
                version = "v2"
            elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
                version = "v1"
            else:
                continue
            found.setdefault(version, (PurePosixPath(place[3]), self._root / place[4].lstrip("/")))
        return found

    def _way_up(self, group: PurePosixPath, mounted: PurePosixPath, at: Path) -> tuple[Path, ...]:
        """Return our group's folders; one that is not below what is mounted is another namespace's: then `at`."""
        if ".." in group.parts or not group.is_relative_to(mounted):
            return (at,)
        below = group.relative_to(mounted)
        return tuple(at / step for step in (below, *below.parents))


def text(file: Path) -> str:
    """Return what a file holds, "" for one that cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(MOST).decode(errors="replace")
    except (OSError, ValueError):
        return ""


def number(word: str) -> int | None:
    word = word.strip()
    return int(word) if word.isascii() and word.isdigit() and len(word) < 20 else None


def percent(line: str) -> float | None:
    for word in line.split():
        name, _, value = word.partition("=")
        if name == "avg10":
            try:
                share = float(value)
            except ValueError:
                return None
            return share if 0.0 <= share <= 100.0 else None
    return None


def trim() -> bool:
    """Give what was freed back to the system, where the C library can (glibc's malloc_trim); call it in a thread."""
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError, TypeError):
        return False
