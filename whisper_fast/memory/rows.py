"""The SQL of memories: every statement names its user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ..store.schema import next_memory_id, want_compaction
from .index import Content
from .item import Item

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import apsw

    from ..models.embedder import Embedder

__all__ = [
    "NO_EMBEDDER",
    "NO_VECTOR",
    "Outdated",
    "Stored",
    "Vector",
    "content",
    "count_outdated",
    "delete",
    "delete_user",
    "embedder_id",
    "insert",
    "outdated",
    "page",
    "replace_vectors",
    "select",
    "settle_embedder",
]

CURRENT: Final = "embedder.name = ? AND length(memory.vector) = ?"  # made by this embedder, in its dimension
COLUMNS: Final = "id, scope, text, at, speaker, session, metadata, source"


class Vector(NamedTuple):
    """A packed row, see `_vector.Rows.packed`."""

    packed: bytes
    scale: float


NO_EMBEDDER: Final = ""
NO_VECTOR: Final = Vector(b"", 0.0)
"""Of a memory that was stored while its embedder did not answer; kept under the embedder "", to be embedded later."""


class Outdated(NamedTuple):
    """A memory whose vector is another embedder's, or missing."""

    user: str
    id: int
    text: str


class Stored(NamedTuple):
    """A memory of one user with its id; `vector` is None where another embedder made it."""

    id: int
    item: Item
    vector: Vector | None


def embedder_id(connection: apsw.Connection, name: str, dimension: int) -> int:
    """Return the number under which an embedder's vectors are stored; call it inside a write job."""
    sql = """INSERT INTO embedder (name, dimension) VALUES (?, ?)
             ON CONFLICT (name) DO UPDATE SET name = name RETURNING id"""
    return int(connection.execute(sql, (name, dimension)).get)


def content(connection: apsw.Connection, user: str, embedder: Embedder, after: int = 0) -> Content:
    """Return the vectors of `user` that `embedder` made, of ids over `after`, as columns."""
    sql = f"""SELECT memory.id, memory.vector, scale FROM memory JOIN embedder ON embedder.id = memory.embedder
              WHERE user = ? AND memory.id > ? AND {CURRENT} ORDER BY memory.id"""  # noqa: S608
    found = connection.execute(sql, (user, after, embedder.name, embedder.dimension)).fetchall()
    ids, packed, scale = zip(*found, strict=True) if found else ((), (), ())
    values = np.frombuffer(b"".join(packed), np.int8).reshape(len(ids), embedder.dimension)
    return Content(embedder.name, np.array(ids, np.int64), values, np.array(scale, np.float32))


def count_outdated(connection: apsw.Connection, embedder: Embedder) -> int:
    """Return how many memories of all users have no vector of `embedder`; 0 at once where it is the only one."""
    others = "SELECT count(*) FROM embedder WHERE (name, dimension) != (?, ?)"
    if not connection.execute(others, (embedder.name, embedder.dimension)).get:
        return 0
    sql = f"""SELECT count(*) FROM memory JOIN embedder ON embedder.id = memory.embedder
              WHERE NOT ({CURRENT})"""  # noqa: S608
    return int(connection.execute(sql, (embedder.name, embedder.dimension)).get)


def settle_embedder(connection: apsw.Connection, embedder: Embedder) -> None:
    """Say that what has no vector of `embedder` now was refused by it, or comes later; call it inside a write job."""
    connection.execute("UPDATE embedder SET dimension = ? WHERE name = ?", (embedder.dimension, embedder.name))
    unused = "NOT EXISTS (SELECT 1 FROM memory WHERE memory.embedder = embedder.id)"
    connection.execute(f"DELETE FROM embedder WHERE name != ? AND {unused}", (embedder.name,))  # noqa: S608


def outdated(connection: apsw.Connection, embedder: Embedder, after: tuple[str, int], size: int) -> list[Outdated]:
    """Return at most `size` memories without a vector of `embedder`, by user and id, from behind `after` on."""
    sql = f"""SELECT memory.user, memory.id, memory.text FROM memory JOIN embedder ON embedder.id = memory.embedder
              WHERE (memory.user, memory.id) > (?, ?) AND NOT ({CURRENT})
              ORDER BY memory.user, memory.id LIMIT ?"""  # noqa: S608
    return [Outdated(*row) for row in connection.execute(sql, (*after, embedder.name, embedder.dimension, size))]


def insert(connection: apsw.Connection, user: str, embedder: int, item: Item, vector: Vector) -> tuple[int, bool]:
    """Store a memory; return its id and whether it is new: the same source is stored once per user."""
    if item.source is not None:
        sql = "SELECT id FROM memory WHERE user = ? AND source = ?"
        known = connection.execute(sql, (user, item.source)).get
        if known is not None:
            return int(known), False
    number = next_memory_id(connection, user)
    sql = f"INSERT INTO memory (user, embedder, vector, scale, {COLUMNS}) VALUES (?,?,?,?, ?,?,?,?,?,?,?,?)"  # noqa: S608
    fields = (item.scope, item.text, item.at, item.speaker, item.session, item.metadata, item.source)
    connection.execute(sql, (user, embedder, *vector, number, *fields))
    return number, True


def select(connection: apsw.Connection, user: str, embedder: Embedder) -> Iterator[Stored]:
    """Yield all memories of `user` in the order in which they were stored."""
    sql = f"""SELECT memory.vector, scale, name = ? AND length(memory.vector) = ?, {prefixed()}
              FROM memory JOIN embedder ON embedder.id = memory.embedder WHERE user = ? ORDER BY memory.id"""  # noqa: S608
    found = connection.execute(sql, (embedder.name, embedder.dimension, user))
    for packed, scale, current, number, *columns in found:
        yield Stored(number, item_of(columns), Vector(packed, scale) if current else None)


def page(connection: apsw.Connection, user: str, after: int, size: int) -> list[tuple[int, Item]]:
    """Return at most `size` memories of `user` with ids over `after`, in the order in which they were stored."""
    sql = f"SELECT {COLUMNS} FROM memory WHERE user = ? AND id > ? ORDER BY id LIMIT ?"  # noqa: S608
    return [(columns[0], item_of(columns[1:])) for columns in connection.execute(sql, (user, after, size))]


def replace_vectors(
    connection: apsw.Connection, embedder: Embedder, vectors: Iterable[tuple[Outdated, Vector]]
) -> None:
    """Store vectors that a new embedder made of old memories; what was deleted meanwhile stays deleted."""
    number = embedder_id(connection, embedder.name, embedder.dimension)
    sql = "UPDATE memory SET embedder = ?, vector = ?, scale = ? WHERE user = ? AND id = ? AND text = ?"
    connection.executemany(sql, ((number, *vector, old.user, old.id, old.text) for old, vector in vectors))


def delete(connection: apsw.Connection, user: str, number: int) -> bool:
    """Delete one memory; return whether it was there."""
    connection.execute("DELETE FROM memory WHERE user = ? AND id = ?", (user, number))
    if not connection.changes():
        return False
    want_compaction(connection)
    return True


def delete_user(connection: apsw.Connection, user: str) -> None:
    """Delete all memories of `user`, and that there were any."""
    connection.execute("DELETE FROM memory WHERE user = ?", (user,))
    if connection.changes():
        want_compaction(connection)
    connection.execute("DELETE FROM memory_counter WHERE user = ?", (user,))


def item_of(columns: Iterable[object]) -> Item:
    scope, text, at, speaker, session, metadata, source = columns
    return Item(  # the types are those that the table declares and `insert` wrote
        text=text,  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        at=at,  # type: ignore[arg-type]
        speaker=speaker,  # type: ignore[arg-type]
        session=session,  # type: ignore[arg-type]
        metadata=metadata,  # type: ignore[arg-type]
        source=source,  # type: ignore[arg-type]
    )


def prefixed() -> str:
    return ", ".join(f"memory.{name}" for name in COLUMNS.split(", "))
