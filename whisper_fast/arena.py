"""Memory that two processes share in one direction: one writes arrays into it, the other looks at them in place.

It has no name in any file system, so nothing has to be unlinked and nothing is left whoever dies: its pages go with
the last process that has it open. An array costs one copy. Its place is written again only when the reader has let go
of every view, however long it keeps them.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import tempfile
from bisect import insort
from typing import TYPE_CHECKING, Any

from ._span import Span, copy_into

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Inbox", "Outbox", "Piece", "shared_file"]

ALIGNMENT = 64  # bytes: a cache line, and what vector instructions like best
PAGE = mmap.PAGESIZE
MOST = 4 << 30  # bytes in one arena: what is more would be a mistake, and the system kills for it
KEPT = 64 << 20  # bytes that an arena without anything in it keeps for the next time


Piece = tuple[int, int]
"""Where something lies in an arena: offset and size in bytes."""


def shared_file() -> int:
    """Return the descriptor of a new nameless file of one page in memory."""
    if sys.platform == "linux":
        file = os.memfd_create("whisper-fast", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as made:
            file = os.dup(made.fileno())
    os.ftruncate(file, PAGE)
    return file


class Outbox:
    """The writer's end. `header` bytes at the beginning are never given to anything."""

    def __init__(self, file: int, header: int = 0) -> None:
        self._file = file
        self._mapping = mmap.mmap(file, PAGE)
        self._header = header
        self._taken: list[Piece] = []

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, used or not."""
        return len(self._mapping)

    @property
    def mapping(self) -> mmap.mmap:
        """The memory itself."""
        return self._mapping

    def put(self, buffers: Sequence[memoryview]) -> list[Piece]:
        """Copy contiguous buffers into the arena; it grows where no gap is large enough.

        Raises OSError when that would take more than `MOST` bytes; then nothing was taken.
        """
        pieces: list[Piece] = []
        try:
            for buffer in buffers:
                pieces.append(self._take(buffer.nbytes))
                copy_into(self._mapping, pieces[-1][0], buffer)
        except BaseException:
            self.free([offset for offset, _ in pieces])
            raise
        return pieces

    def free(self, offsets: Sequence[int]) -> None:
        """Take back the pieces at `offsets`."""
        if not offsets:
            return
        gone = set(offsets)
        self._taken = [piece for piece in self._taken if piece[0] not in gone]
        if not self._taken and len(self._mapping) > KEPT:
            os.ftruncate(self._file, PAGE)
            self._mapping = mmap.mmap(self._file, PAGE)

    def close(self) -> None:
        """Give up this end; what the reader looks at stays."""
        self._mapping.close()
        os.close(self._file)

    def _take(self, size: int) -> Piece:
        """Return the first gap of `size` bytes."""
        size = max(size, 1)  # an offset names one piece
        begin = aligned(self._header)
        for offset, length in self._taken:
            if offset - begin >= size:
                break
            begin = aligned(offset + length)
        if begin + size > len(self._mapping):
            self._grow(begin + size)
        found = begin, size
        insort(self._taken, found)
        return found

    def _grow(self, size: int) -> None:
        old = len(self._mapping)
        new = max(-(-size // PAGE) * PAGE, min(2 * old, old + KEPT))
        if new > MOST:
            raise OSError(errno.ENOMEM, f"{new} bytes are wanted in one arena; {MOST} are allowed")
        os.ftruncate(self._file, new)
        self._mapping = mmap.mmap(self._file, new)


class Inbox:
    """The reader's end; `returned` gathers the offsets of what is no longer looked at, for the writer."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._mapping = mmap.mmap(file, PAGE)
        self.returned: list[int] = []

    @property
    def mapping(self) -> mmap.mmap:
        """The memory itself, as far as it has been looked at."""
        return self._mapping

    def look(self, pieces: Sequence[Piece]) -> list[Any]:
        """Return a buffer (`Span`) over each of `pieces`, in place."""
        end = max((offset + size for offset, size in pieces), default=0)
        if end > len(self._mapping):
            self._mapping = mmap.mmap(self._file, os.fstat(self._file).st_size)
        return [Span(self._mapping, offset, size, self.returned) for offset, size in pieces]

    def take_returned(self) -> list[int]:
        """Return the offsets gathered so far and begin anew."""
        offsets = self.returned[:]
        del self.returned[: len(offsets)]  # in two steps: another thread may let go of an array in between
        return offsets

    def close(self) -> None:
        """Give up this end; arrays that are still looked at stay."""
        os.close(self._file)


def aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
