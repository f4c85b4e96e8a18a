"""Which turns run at this moment, in a file that the system keeps when the process dies.

A message that kills the process must leave a trace, and the trace must cost nothing. It need not outlive a power cut,
which is no message's doing; so it is a store into memory that a file is mapped to, not a write that waits for a disk.
"""

from __future__ import annotations

import logging
import mmap
import os
from typing import TYPE_CHECKING

from ..errors import StoreError
from .files import private_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Claims"]

log = logging.getLogger(__name__)

SLOTS = 32_768
WIDTH = 8  # bytes: one id


class Claims:
    """The ids of the turns that run; `left` are those that ran when the process before this one died.

    Only the holder of the data folder's lock may open it. Where the file cannot be written nothing is kept, and the
    log says so: that is no reason not to start.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._map = mapped(path)
        except (OSError, StoreError) as error:
            log.warning("a message that kills the process will not be recognised: %s", error)
            self._map = mmap.mmap(-1, SLOTS * WIDTH)
        self._ids = memoryview(self._map).cast("q")
        self.left = tuple(sorted({one for one in self._ids if one}))
        self._free = list(range(SLOTS))

    def clear(self) -> None:
        """Forget what the process before left, once it is counted."""
        self._ids[:] = memoryview(bytes(SLOTS * WIDTH)).cast("q")
        self.left = ()

    def take(self, one: int) -> int:
        """Say that the turn of entry `one` runs; returns what `give_back` wants. Beyond 32,768 nothing is noted."""
        if not self._free:
            return -1
        slot = self._free.pop()
        self._ids[slot] = one
        return slot

    def give_back(self, slot: int) -> None:
        """Say that the turn has ended."""
        if slot >= 0:
            self._ids[slot] = 0
            self._free.append(slot)

    def close(self) -> None:
        """Let go of the file."""
        self._ids.release()
        self._map.close()


def mapped(path: Path) -> mmap.mmap:
    private_file(path)
    with open(path, "r+b") as file:
        if os.fstat(file.fileno()).st_size != SLOTS * WIDTH:
            file.truncate(0)
            file.write(bytes(SLOTS * WIDTH))  # real blocks: a store into a hole fails where the disk is full
            file.flush()
        return mmap.mmap(file.fileno(), SLOTS * WIDTH)
