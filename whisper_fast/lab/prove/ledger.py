"""What the victims said, held against what the disk says: the audit from outside."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import msgspec

from ...message import Reply
from ...store.files import DATABASE, connect
from .victim import digest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Ledger"]

MESSAGES = "SELECT message_id, id, reply FROM journal WHERE state IN (1, 2, -1, -3)"
CONVERSED = "SELECT turn, count(*) FROM conversation GROUP BY turn"
REMEMBERED = "SELECT substr(source, 6), count(*) FROM memory WHERE source LIKE 'turn:%' GROUP BY source"
SAID_TWICE = "SELECT count(*) - count(DISTINCT user || char(31) || text) FROM "
TURNS = ("conversation", "memory WHERE source IS NOT NULL")

read = msgspec.json.Decoder(Reply).decode


class Ledger:
    """The promises of one data folder: every id that was accepted, and every answer that was heard."""

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        self.heard: dict[str, set[str]] = {}

    def note(self, line: str) -> None:
        """Take down a line of a victim."""
        kind, message_id, *rest = line.split()
        if kind == "accepted":
            self.accepted.add(message_id)
        else:
            self.heard.setdefault(message_id, set()).update(rest)

    def lost(self, folder: Path) -> int:
        """Count the accepted messages that are not answered, or not in the conversation, or not remembered."""
        with closing(connect(folder / DATABASE, readonly=True)) as connection:
            entries = {one: entry for one, entry, _ in connection.execute(MESSAGES)}
            conversed = dict(connection.execute(CONVERSED))
            remembered = {int(turn) for turn, _ in connection.execute(REMEMBERED)}
        kept = {one for one, entry in entries.items() if entry in conversed and entry in remembered}
        return len((self.accepted | self.heard.keys()) - kept)

    def duplicated(self, folder: Path) -> int:
        """Count the turns that are stored more than once, and the messages that have two different answers."""
        with closing(connect(folder / DATABASE, readonly=True)) as connection:
            stored = {one: digest(read(reply).text) for one, _, reply in connection.execute(MESSAGES)}
        different = sum(len(heard | {stored.get(one, "")} - {""}) > 1 for one, heard in self.heard.items())
        return self.stored_twice(folder) + different

    def stored_twice(self, folder: Path) -> int:
        """Count the turns that are in the conversation, or among the memories, more than once."""
        with closing(connect(folder / DATABASE, readonly=True)) as connection:
            return sum(int(connection.execute(SAID_TWICE + table).get) for table in TURNS)
