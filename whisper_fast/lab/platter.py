"""What a disk holds for good, and what a power cut may make of the rest.

The model is that of SQLite's "powersafe overwrite", the least that SQLite can live with: bytes outside a write never
change; inside it every sector of 512 bytes is old or new on its own, in whatever order the disk chose; only a sync
makes it certain. Names made and deleted are certain once the folder was synced, which SQLite does with the first sync
of a new log or journal. A sync that fails tells nothing of the writes before it and, as the page cache of Linux does,
never tries them again; as Linux does since 4.13, it is told once to everybody who has the file open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

__all__ = ["SECTOR", "Event", "Platter"]

SECTOR: Final = 512  # bytes


class Event(NamedTuple):
    """One thing that was done to a file.

    kind    `found` (it was there: data is what it held), `made`, `write`, `truncate`, `sync`, `failed sync`,
            `delete`, or `note`, which says what else happened at that moment
    offset  bytes: where a write begins, or the new size of a truncated file; 1 for a deletion that is certain, and
            for a file made whose first sync also syncs the folder
    """

    kind: str
    file: str
    offset: int = 0
    data: bytes = b""


@dataclass(slots=True, eq=False)
class Inode:
    """One file: its certain content, and the writes and truncations (data None) since its last sync."""

    certain: bytearray = field(default_factory=bytearray)
    syncs_folder: bool = False
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, data in self.pending:
            put(self.certain, offset, data)
        self.pending.clear()

    def survive(self, random: Random) -> bytearray:
        """Return what may be read after a power cut: of the pending writes any sectors, in their order."""
        content = bytearray(self.certain)
        chance = random.choice(CHANCES)
        for offset, data in self.pending:
            for start, piece in sectors(offset, data):
                if random.random() < chance:
                    put(content, start, piece)
        return content

    def lose(self, random: Random) -> None:
        """Forget the pending writes, as a failed sync does; some may have reached the disk before."""
        self.certain = self.survive(random)
        self.pending.clear()


class Platter:
    """The files of one folder, told of every `Event`; `survivors` is what a power cut at this moment may leave."""

    def __init__(self) -> None:
        # What each name stood for since it was last certain, None for nothing: creations and deletions in order.
        self._names: dict[str, list[Inode | None]] = {}

    @property
    def names(self) -> list[str]:
        """Every name that was ever told of."""
        return list(self._names)

    def apply(self, event: Event, random: Random) -> None:
        """Follow one event; `random` decides what a failed sync loses."""
        kind, file, offset, data = event
        if kind == "note":
            return
        history = self._names.setdefault(file, [None])
        if kind in OPENING:
            if history[-1] is None:
                history.append(Inode(bytearray(data), kind == "made" and bool(offset)))
                if kind == "found":
                    del history[:-1]
        elif kind == "delete":
            history.append(None)
            if offset:
                del history[:-1]
        elif (inode := history[-1]) is not None:
            self._change(inode, event, random)

    def _change(self, inode: Inode, event: Event, random: Random) -> None:
        if event.kind == "write":
            inode.pending.append((event.offset, event.data))
        elif event.kind == "truncate":
            inode.pending.append((event.offset, None))
        elif event.kind == "failed sync":
            inode.lose(random)
        else:
            inode.sync()
            if inode.syncs_folder:
                inode.syncs_folder = False
                for history in self._names.values():
                    del history[:-1]

    def survivors(self, random: Random) -> dict[str, bytes]:
        """Return the content of each file that is there after a power cut."""
        left = {file: random.choice(history) for file, history in self._names.items()}
        return {file: bytes(inode.survive(random)) for file, inode in left.items() if inode is not None}


OPENING: Final = frozenset({"found", "made"})
CHANCES: Final = (0.0, 0.1, 0.5, 0.9, 1.0)


def put(content: bytearray, offset: int, data: bytes | None) -> None:
    """Write into a file, or cut or stretch it to `offset` bytes where there is no data."""
    if data is None:
        del content[offset:]
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    if data is not None:
        content[offset : offset + len(data)] = data


def sectors(offset: int, data: bytes | None) -> Iterator[tuple[int, bytes | None]]:
    """Yield the pieces of a write that reach the disk as a whole or not at all; a truncation is one."""
    if data is None:
        yield offset, None
        return
    end = offset + len(data)
    for start in range(offset - offset % SECTOR, end, SECTOR):
        first, last = max(start, offset), min(start + SECTOR, end)
        yield first, data[first - offset : last - offset]
