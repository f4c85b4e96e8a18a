"""What the disk says after a run: which messages were promised, answered, finished, and what is there twice."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from ..journal import REPLIED
from ..store.files import DATABASE, connect

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["answered", "duplicated", "lost", "states"]

TWICE = (
    "SELECT count(*) - count(DISTINCT user || char(31) || text) FROM conversation",
    "SELECT count(*) - count(DISTINCT user || char(31) || text) FROM memory WHERE source IS NOT NULL",
)


def states(data_dir: Path) -> dict[str, int]:
    """Return the journal's state of each message id. Raises StoreError."""
    with closing(connect(data_dir / DATABASE)) as connection:
        return dict(connection.execute("SELECT message_id, state FROM journal"))


def answered(found: dict[str, int]) -> int:
    """Count the messages whose reply is recorded."""
    return sum(state in REPLIED for state in found.values())


def lost(data_dir: Path, promised: Iterable[str]) -> int:
    """Count the promised messages without a recorded reply: not in the journal, or still open. Raises StoreError."""
    found = states(data_dir)
    return sum(found.get(message_id) not in REPLIED for message_id in promised)


def duplicated(data_dir: Path) -> int:
    """Count turns that are stored more than once, in the conversation or among the memories. Raises StoreError.

    Simulated users never say the same twice, so an equal text is a turn that was led through twice.
    """
    with closing(connect(data_dir / DATABASE)) as connection:
        return sum(int(connection.execute(sql).get) for sql in TWICE)
