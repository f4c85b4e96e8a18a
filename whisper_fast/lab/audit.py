"""What the disk says after a run, held against what was promised: the one audit of demo, load, proofs and tests.

It reads the file alone, beside a running engine or after its death. Simulated users never say the same twice, so an
equal text of one user is a turn that was led through twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from ..journal import REPLIED
from ..message import Reply
from ..store.files import DATABASE, connect

if TYPE_CHECKING:
    from pathlib import Path

    import apsw

__all__ = ["Ledger", "answered", "audit", "digest", "duplicated", "lost", "states"]

COUNTS = {
    "accepted": "1",
    "answered": "state IN (1, 2, -1, -3)",
    "done": "state IN (2, -1, -3)",
    "open": "state IN (0, 1)",
    "failed": "state = 3",
    "held": "state IN (-1, -3)",
    "quarantined": "state = -2",
}
REPLIES = "SELECT message_id, id, reply FROM journal WHERE state IN (1, 2, -1, -3)"
CONVERSED = "SELECT turn FROM conversation"
REMEMBERED = "SELECT substr(source, 6) FROM memory WHERE source LIKE 'turn:%'"
TWICE = tuple(
    f"SELECT count(*) - count(DISTINCT user || char(31) || text) FROM {turns}"  # noqa: S608 - tables of ours
    for turns in ("conversation", "memory WHERE source IS NOT NULL")
)

read = msgspec.json.Decoder(Reply).decode


def opened(data_dir: Path) -> closing[apsw.Connection]:
    return closing(connect(data_dir / DATABASE))


def audit(data_dir: Path) -> dict[str, int]:
    """Count a data folder's journal. Raises StoreError.

    accepted, answered (a reply is recorded), done (remembered), open, failed, held, quarantined, and duplicated.
    """
    columns = ", ".join(f"count(*) FILTER (WHERE {rule})" for rule in COUNTS.values())
    with opened(data_dir) as connection:
        row = connection.execute(f"SELECT {columns} FROM journal").get  # noqa: S608 - rules of ours
    return {**dict(zip(COUNTS, row, strict=True)), "duplicated": duplicated(data_dir)}


def states(data_dir: Path) -> dict[str, int]:
    """Return the journal's state of each message id. Raises StoreError."""
    with opened(data_dir) as connection:
        return dict(connection.execute("SELECT message_id, state FROM journal"))


def answered(found: dict[str, int]) -> set[str]:
    """Return the messages whose reply is recorded."""
    return {message_id for message_id, state in found.items() if state in REPLIED}


def lost(data_dir: Path, promised: Iterable[str]) -> int:
    """Count the promised messages without a recorded reply: not in the journal, or still open. Raises StoreError."""
    return len(set(promised) - answered(states(data_dir)))


def duplicated(data_dir: Path) -> int:
    """Count turns that are stored more than once, in the conversation or among the memories. Raises StoreError."""
    with opened(data_dir) as connection:
        return sum(int(connection.execute(sql).get) for sql in TWICE)


def digest(text: str) -> str:
    """Return what stands for a reply's text."""
    return blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


class Ledger:
    """The promises of one data folder: every id that was accepted, and every answer that was heard."""

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        self.heard: dict[str, set[str]] = {}

    def note(self, line: str) -> None:
        """Take down `accepted <id>` or `answered <id> <digest>`."""
        kind, message_id, *rest = line.split()
        if kind == "accepted":
            self.accepted.add(message_id)
        else:
            self.heard.setdefault(message_id, set()).update(rest)

    @property
    def contradicted(self) -> int:
        """How many messages were heard to have two different answers."""
        return sum(len(answers) > 1 for answers in self.heard.values())

    def lost(self, data_dir: Path) -> int:
        """Count the accepted messages that are not answered, or not in the conversation, or not remembered."""
        with opened(data_dir) as connection:
            entries = {one: entry for one, entry, _ in connection.execute(REPLIES)}
            conversed = {turn for (turn,) in connection.execute(CONVERSED)}
            remembered = {int(turn) for (turn,) in connection.execute(REMEMBERED)}
        kept = {one for one, entry in entries.items() if entry in conversed and entry in remembered}
        return len((self.accepted | self.heard.keys()) - kept)

    def duplicated(self, data_dir: Path) -> int:
        """Count the turns that are stored more than once, and the messages that have two different answers."""
        with opened(data_dir) as connection:
            stored = {one: digest(read(reply).text) for one, _, reply in connection.execute(REPLIES)}
        different = sum(len(heard | {stored.get(one, "")} - {""}) > 1 for one, heard in self.heard.items())
        return duplicated(data_dir) + different
