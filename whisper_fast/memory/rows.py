"""The SQL of memories: every statement names its user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from ..store.schema import next_memory_id
from .item import Item

if TYPE_CHECKING:
    from collections.abc import Iterable

    import apsw

    from ..models.embedder import Embedder

__all__ = ["Stored", "Vector", "delete", "delete_user", "embedder_id", "insert", "page", "replace_vectors", "select"]

COLUMNS: Final = "id, scope, text, at, speaker, session, metadata, source"


class Vector(NamedTuple):
    """A packed row, see `_vector.Rows.packed`."""

    packed: bytes
    scale: float


class Stored(NamedTuple):
    """A memory of one user with its id; `vector` is None where another embedder made it."""

    id: int
    item: Item
    vector: Vector | None


def embedder_id(connection: apsw.Connection, embedder: Embedder) -> int:
    """Return the number under which the vectors of `embedder` are stored; call it inside a write job."""
    found = connection.execute("SELECT id FROM embedder WHERE name = ?", (embedder.name,)).get
    if found is None:
        sql = "INSERT INTO embedder (name, dimension) VALUES (?, ?) RETURNING id"
        found = connection.execute(sql, (embedder.name, embedder.dimension)).get
    return int(found)


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


def select(connection: apsw.Connection, user: str, embedder: Embedder) -> list[Stored]:
    """Return all memories of `user` in the order in which they were stored."""
    sql = f"""SELECT memory.vector, scale, name = ? AND length(memory.vector) = ?, {prefixed()}
              FROM memory JOIN embedder ON embedder.id = memory.embedder WHERE user = ? ORDER BY memory.id"""  # noqa: S608
    found = connection.execute(sql, (embedder.name, embedder.dimension, user))
    return [
        Stored(columns[0], item_of(columns[1:]), Vector(packed, scale) if current else None)
        for packed, scale, current, *columns in found
    ]


def page(connection: apsw.Connection, user: str, after: int, size: int) -> list[tuple[int, Item]]:
    """Return at most `size` memories of `user` with ids over `after`, in the order in which they were stored."""
    sql = f"SELECT {COLUMNS} FROM memory WHERE user = ? AND id > ? ORDER BY id LIMIT ?"  # noqa: S608
    return [(columns[0], item_of(columns[1:])) for columns in connection.execute(sql, (user, after, size))]


def replace_vectors(
    connection: apsw.Connection, user: str, embedder: int, vectors: Iterable[tuple[int, Vector]]
) -> None:
    """Store vectors that a new embedder made of old memories."""
    sql = "UPDATE memory SET embedder = ?, vector = ?, scale = ? WHERE user = ? AND id = ?"
    connection.executemany(sql, ((embedder, *vector, user, number) for number, vector in vectors))


def delete(connection: apsw.Connection, user: str, number: int) -> bool:
    """Delete one memory; return whether it was there."""
    return (
        connection.execute("DELETE FROM memory WHERE user = ? AND id = ? RETURNING id", (user, number)).get
        is not None
    )


def delete_user(connection: apsw.Connection, user: str) -> None:
    """Delete all memories of `user`, and that there were any."""
    connection.execute("DELETE FROM memory WHERE user = ?", (user,))
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
