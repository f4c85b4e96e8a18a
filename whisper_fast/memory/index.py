"""The approximate index of one user with very many memories: hnswlib, guarded, and only ever given verified bytes.

Hierarchical navigable small worlds (Malkov and Yashunin 2016, arXiv:1603.09320) over the int8 vectors that the store
holds, labelled by memory id. hnswlib ends the process when it reads a damaged file or when a writer meets a reader;
here a file is compared with its checksum before hnswlib sees it, and no search runs while something is changed.

A file holds the graph as hnswlib writes it, then a JSON footer (`Stamp`), the footer's length in 4 bytes, and
"WFINDEX1". The stamp says what was indexed; a file of anything else is not used.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import StoreCorrupt
from ..store.atomic import write_atomically
from ..store.files import private_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["Content", "Index", "Stamp", "available"]

MAGIC: Final = b"WFINDEX1"
LENGTH: Final = struct.Struct("<I")
LINKS: Final = 16  # a node, hnswlib's M
BUILD_BREADTH: Final = 200
BREADTH: Final = 400  # of a search: finds 0.98 of the ten nearest, see benches/bench_index.py
TOMBSTONES: Final = 0.2  # deleted share from which the index is built anew: it finds less and takes longer
SLICE: Final = 64  # memories added at a time: searches that come meanwhile are exact
GRAPH_BYTES: Final = 9 * LINKS + 24  # about, of a node beside its vector

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Stamp(msgspec.Struct, frozen=True):
    """What an index was made of: whose vectors, how many, up to which id, their digest, and the file's own."""

    embedder: str
    dimension: int
    count: int
    generation: int
    content: str
    payload: str = ""


class Content:
    """The vectors of one user as they are stored: `ids` rising, `packed` int8 [n, dimension], `scale` float32 [n]."""

    __slots__ = ("embedder", "ids", "packed", "scale")

    def __init__(self, embedder: str, ids: Ids, packed: NDArray[np.int8], scale: Floats) -> None:
        self.embedder = embedder
        self.ids = ids
        self.packed = packed
        self.scale = scale

    @property
    def generation(self) -> int:
        """The highest id: it grows with each memory."""
        return int(self.ids[-1]) if len(self.ids) else 0

    def vectors(self, rows: Any = slice(None)) -> Floats:
        """Return rows as float32, all or those that a slice or an array names."""
        vectors: Floats = self.packed[rows] * self.scale[rows, None]
        return vectors

    def stamp(self) -> Stamp:
        """Return what an index of this must carry."""
        digest = hashlib.blake2b(digest_size=16)
        for column in (self.ids, self.packed, self.scale):
            digest.update(column.tobytes())
        return Stamp(self.embedder, self.packed.shape[1], len(self.ids), self.generation, digest.hexdigest())


def available() -> bool:
    """Say whether hnswlib is installed."""
    from importlib.util import find_spec

    return find_spec("hnswlib") is not None


class Guard:
    """Many readers or one writer; a reader never waits, it is told to search elsewhere."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writing = False

    @contextmanager
    def reading(self) -> Iterator[bool]:
        """Give True if nobody writes, and keep writers out until the end."""
        with self._condition:
            free = not self._writing
            self._readers += free
        try:
            yield free
        finally:
            if free:
                with self._condition:
                    self._readers -= 1
                    self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until the readers have gone, and keep others out until the end."""
        with self._condition:
            self._condition.wait_for(lambda: not self._writing)
            self._writing = True  # from here no reader comes in
            self._condition.wait_for(lambda: not self._readers)
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()


class Index:
    """An hnswlib index of unit vectors by memory id. Calls may come from several threads, never from the loop."""

    def __init__(self, graph: Any, ids: Ids) -> None:
        self._graph = graph
        self._guard = Guard()
        self._present = set(ids.tolist())
        self._deleted = 0
        self.highest = int(ids[-1]) if len(ids) else 0
        graph.set_ef(BREADTH)
        graph.set_num_threads(1)

    def __len__(self) -> int:
        return len(self._present)

    @property
    def nbytes(self) -> int:
        """Bytes held, about."""
        return int(self._graph.max_elements) * (4 * int(self._graph.dim) + GRAPH_BYTES) + 60 * len(self._present)

    @property
    def worn(self) -> bool:
        """Whether so much was deleted that it must be built anew."""
        return self._deleted > TOMBSTONES * (len(self._present) + self._deleted)

    @classmethod
    def built(cls, content: Content) -> Index:
        """Return a new index of `content`."""
        graph = empty(content.packed.shape[1], max(1024, len(content.ids) * 5 // 4))
        for first in range(0, len(content.ids), SLICE):
            last = first + SLICE
            graph.add_items(content.vectors(slice(first, last)), content.ids[first:last], num_threads=1)
        return cls(graph, content.ids)

    @classmethod
    def loaded(cls, path: Path, content: Content) -> Index:
        """Return the index that `save` wrote of the same content. Raises StoreCorrupt for any other file."""
        payload = verified(path, content.stamp())
        graph = empty(content.packed.shape[1], None)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".verified-") as copy:
            copy.write(payload)
            copy.flush()
            try:
                graph.load_index(copy.name, max_elements=max(1024, len(content.ids) * 5 // 4))
            except RuntimeError as error:
                raise StoreCorrupt(f"{path}: hnswlib refuses it: {error}") from None
        return cls(graph, content.ids)

    def save(self, path: Path, stamp: Stamp) -> None:
        """Write the index to `path`, whole or not at all. Raises StoreFull, StoreReadOnly."""
        private_folder(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
            draft = os.path.join(folder, "graph")
            with self._guard.reading() as free:
                if not free:
                    return
                self._graph.save_index(draft)
            with open(draft, "rb") as file:
                payload = file.read()
        footer = msgspec.json.encode(msgspec.structs.replace(stamp, payload=digest(payload)))
        write_atomically(path, (payload, footer, LENGTH.pack(len(footer)), MAGIC))

    def add(self, ids: Sequence[int], vectors: Floats) -> None:
        """Add memories; one that is there already, or was deleted, changes nothing."""
        new = [i for i, number in enumerate(ids) if number > self.highest]
        for start in range(0, len(new), SLICE):
            part = new[start : start + SLICE]
            with self._guard.writing():
                needed = int(self._graph.element_count) + len(part)
                if needed > self._graph.max_elements:
                    self._graph.resize_index(needed * 5 // 4)
                self._graph.add_items(vectors[part], np.array([ids[i] for i in part]), num_threads=1)
                self._present.update(ids[i] for i in part)
                self.highest = max(self.highest, *(ids[i] for i in part))

    def remove(self, number: int) -> None:
        """Hide a memory for ever."""
        if number in self._present:
            with self._guard.writing():
                self._graph.mark_deleted(number)
                self._present.discard(number)
                self._deleted += 1

    def holds(self, content: Content) -> bool:
        """Say whether the index is of exactly these memories."""
        return self._present == set(content.ids.tolist())

    def search(self, vector: Floats, k: int) -> tuple[Ids, Floats] | None:
        """Return the ids nearest to `vector` with their cosines, best first; None while somebody writes."""
        k = min(k, len(self._present))
        if k == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        with self._guard.reading() as free:
            if not free:
                return None
            try:
                labels, distances = self._graph.knn_query(vector[None], k=k, num_threads=1)
            except RuntimeError:  # it found fewer than k: too much is deleted around here
                return None
        return labels[0].astype(np.int64), np.float32(1) - distances[0]


def empty(dimension: int, capacity: int | None) -> Any:
    import hnswlib

    graph = hnswlib.Index(space="ip", dim=dimension)
    if capacity is not None:
        graph.init_index(max_elements=capacity, M=LINKS, ef_construction=BUILD_BREADTH, random_seed=100)
    return graph


def verified(path: Path, expected: Stamp) -> memoryview:
    """Return the graph's bytes in the file `path`. Raises StoreCorrupt for a damaged file or one of other content."""
    raw = path.read_bytes()
    end = len(raw) - len(MAGIC) - LENGTH.size
    if end < 0 or raw[-len(MAGIC) :] != MAGIC:
        raise StoreCorrupt(f"{path} is no whole index")
    start = end - LENGTH.unpack_from(raw, end)[0]
    try:
        stamp = msgspec.json.decode(raw[max(start, 0) : end], type=Stamp)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StoreCorrupt(f"{path}: its footer is damaged") from None
    payload = memoryview(raw)[: max(start, 0)]
    if digest(payload) != stamp.payload:
        raise StoreCorrupt(f"{path} is damaged: its checksum is another")
    if msgspec.structs.replace(stamp, payload="") != expected:
        raise StoreCorrupt(f"{path} is of other memories than the store holds")
    return payload


def digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
