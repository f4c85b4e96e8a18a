"""What was promised in a day, held against what was seen and what the disk says at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ...store.files import DATABASE, connect

if TYPE_CHECKING:
    from pathlib import Path

    import apsw

    from ...message import Message

__all__ = ["Verdict"]

ENTRIES = "SELECT message_id, state FROM journal"
FINISHED = (2, -1, -3)  # done, held, released
FAILED, QUARANTINED = 3, -2
SUSPECT = 3  # deaths after which a message may be set aside


class Verdict:
    """The figures of one day, all of which must be 0 or empty.

    Nothing is promised any more to a message whose user asked to be forgotten after it was sent.
    """

    FIGURES = ("lost", "twice", "changed", "inversions", "leaks", "remembered", "stuck", "problems")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.digest = ""
        self.deaths = 0
        self.lost: list[str] = []  # accepted, and not answered, or not remembered
        self.twice: list[str] = []  # stored more than once
        self.changed: list[str] = []  # answered differently at different times
        self.inversions: list[str] = []  # answered after a message of the same user that was sent later
        self.leaks = 0
        self.remembered: list[str] = []  # still there although its user was forgotten
        self.stuck: list[str] = []  # what waits for ever
        self.problems: list[str] = []  # what the loop heard of: errors that nobody saw
        self.failed: set[str] = set()
        self.messages: dict[str, Message] = {}
        self._accepted: set[str] = set()
        self._open_to_doubt: set[str] = set()
        self._gone: set[str] = set()
        self._deliveries: Counter[str] = Counter()
        self._answers: defaultdict[str, set[str]] = defaultdict(set)
        self._last: dict[str, int] = {}

    def born(self) -> None:
        """Note that a process begins: the order of answers is promised within its life."""
        self._last.clear()

    def delivered(self, message: Message) -> bool:
        """Note that a message is sent; say whether it is for the first time."""
        fresh = message.id not in self.messages
        self.messages[message.id] = message
        self._deliveries[message.id] += 1
        self._gone.discard(message.id)
        return fresh

    def accepted(self, message: Message) -> None:
        """Note a promise."""
        self._accepted.add(message.id)

    def answered(self, message: Message, text: str, number: int | None) -> None:
        """Note an answer; `number` is the message's place among those that were sent in this life."""
        self._answers[message.id].add(text)
        if number is not None:
            if number < self._last.get(message.user, -1):
                self.inversions.append(message.id)
            self._last[message.user] = number

    def forgetting(self, user: str) -> dict[str, int]:
        """Note that a user wants to be forgotten; return what is to be gone, and how often each was delivered."""
        about = {one for one, message in self.messages.items() if message.user == user}
        self._open_to_doubt |= about
        return {one: self._deliveries[one] for one in about & self._accepted}

    def forgot(self, about: dict[str, int]) -> None:
        """Note that a user was forgotten; what was delivered again meanwhile may be there or not."""
        self._gone |= {one for one, times in about.items() if self._deliveries[one] == times}

    @property
    def answers(self) -> int:
        """How many messages were answered."""
        return len(self._answers)

    def audit(self, folder: Path) -> None:
        """Read what the disk says."""
        with closing(connect(folder / DATABASE, readonly=True)) as connection:
            states = dict(connection.execute(ENTRIES))
            said = lines(connection, "SELECT user, text FROM conversation")
            known = lines(connection, "SELECT user, text FROM memory")
        allowed = {FAILED, QUARANTINED} if self.deaths >= SUSPECT else {FAILED}
        for one in sorted(self._accepted - self._open_to_doubt):
            if states.get(one) in allowed:
                continue
            where = self.messages[one].user, self.messages[one].text
            if states.get(one) not in FINISHED or not said[where] or not known[where]:
                self.lost.append(f"{one}: state {states.get(one)}, said {said[where]}, remembered {known[where]}")
        for where in said.keys() | known.keys():
            if said[where] > 1 or known[where] > 1:
                self.twice.append(f"{where[1]}: said {said[where]}, remembered {known[where]}")
        for one, answers in self._answers.items():
            if len(answers) > 1 and one not in self._open_to_doubt:
                self.changed.append(f"{one}: {sorted(answers)}")
        for one in self._gone:
            where = self.messages[one].user, self.messages[one].text
            if one in states or said[where] or known[where]:
                self.remembered.append(f"{one}: state {states.get(one)}, {said[where]}, {known[where]}")

    @property
    def broken(self) -> dict[str, Any]:
        """The figures that are not 0; empty when every promise was kept."""
        return {name: getattr(self, name) for name in self.FIGURES if getattr(self, name)}


def lines(connection: apsw.Connection, sql: str) -> Counter[tuple[str, str]]:
    """Count each line of each user: a turn that answers several messages holds a line of each."""
    return Counter((user, line) for user, text in connection.execute(sql) for line in text.split("\n"))
