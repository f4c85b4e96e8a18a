"""Everything that is stored about one person, as plain records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import apsw

__all__ = ["export_user"]

MEMORIES = "SELECT id, text, scope, at, speaker, session, metadata, source FROM memory WHERE user = ? ORDER BY id"
CONVERSATION = "SELECT platform, channel, scope, at, text, reply FROM conversation WHERE user = ? ORDER BY turn"
JOURNAL = "SELECT platform, channel, message_id, accepted_at, message, reply FROM journal WHERE user = ? ORDER BY id"


def export_user(connection: apsw.Connection, user: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `user` as dicts: first `kind` (memory, conversation or journal) and `user`, then the columns.

    The memories are what `whisper-fast import` takes in again, with new ids.
    """
    for kind, sql in (("memory", MEMORIES), ("conversation", CONVERSATION), ("journal", JOURNAL)):
        cursor = connection.execute(sql, (user,))
        for row in cursor:
            names = (column[0] for column in cursor.get_description())
            yield {
                "kind": kind,
                "user": user,
                **{name: readable(value) for name, value in zip(names, row, strict=True)},
            }


def readable(value: Any) -> Any:
    """Return a column's value; a BLOB of ours is JSON and is returned decoded."""
    return msgspec.json.decode(value) if isinstance(value, bytes) else value
