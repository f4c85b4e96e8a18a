"""What is deleted leaves traces that no query finds: bytes between the cells of a page. They are overwritten here.

SQLite's `secure_delete` zeroes a cell that is deleted and a page that is freed, not the old copies of cells that a
page keeps when it is balanced with its neighbours. Nothing ever reads those bytes, so that zeroes in their place, in
whatever order they reach the disk, change nothing: see "B-tree Pages" in SQLite's file format.
"""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    import apsw

__all__ = ["MOST_PAGES", "scrub"]

MOST_PAGES: Final = (2 << 24) - 1  # from here on an overflow page may begin with a byte that marks a b-tree page
HEADER: Final = {2: 12, 5: 12, 10: 8, 13: 8}  # bytes, by the kind of page: interior and leaf, index and table
FILE_HEADER: Final = 100  # bytes before the first page's own header


def scrub(file: apsw.VFSFile, pages: range, size: int) -> int:
    """Zero what is left over in `pages` (from 1) of `size` bytes each; return how many pages had something.

    Nobody may write the file meanwhile, and whoever has pages of it in memory must drop them. Raises apsw.Error.
    """
    found = 0
    for number in pages:
        start = (number - 1) * size
        page = file.xRead(size, start)
        traces = [(first, last) for first, last in unused(page, FILE_HEADER * (number == 1)) if any(page[first:last])]
        for first, last in traces:
            file.xWrite(bytes(last - first), start + first)
        found += bool(traces)
    return found


def unused(page: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a b-tree page, whose header is `at` this byte, that belong to no cell; none for others."""
    header = HEADER.get(page[at])
    if header is None:
        return
    block, cells, content = unpack_from(">HHH", page, at + 1)
    gap = at + header + 2 * cells
    content = content or 65536
    if not gap <= content <= len(page):  # damaged: not ours to touch
        return
    yield gap, content
    while content <= block <= len(page) - 4:
        following, length = unpack_from(">HH", page, block)
        if block + length > len(page):
            return
        yield block + 4, block + length
        if following <= block:
            return
        block = following
