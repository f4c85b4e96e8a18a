"""What was promised in a day, held against what was seen and what the disk says at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ...store.files import DATABASE, connect
from .plan import DEDUPLICATING, PLATFORMS

if TYPE_CHECKING:
    from pathlib import Path

    import apsw

    from ...message import Message
    from ...outbox import Outgoing

__all__ = ["Verdict"]

ENTRIES = "SELECT message_id, state FROM journal"
DONE, HELD, RELEASED = 2, -1, -3
FINISHED = (DONE, HELD, RELEASED)
FAILED, QUARANTINED = 3, -2
SUSPECT = 3  # deaths after which a message may be set aside


class Verdict:
    """The figures of one day, all of which must be 0 or empty.

    Nothing is promised any more to a message whose user asked to be forgotten after it was sent.
    """

    FIGURES = (
        "lost", "twice", "changed", "inversions", "leaks", "remembered", "stuck", "left", "blamed",
        "resent", "unsent", "misbooked", "problems",
    )  # fmt: skip

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
        self.left: list[str] = []  # not finished or sent after hours in which all was well
        self.blamed: list[str] = []  # told that the model refused it, which it did not
        self.resent: list[str] = []  # shown a second time
        self.unsent: list[str] = []  # never shown to anybody, where it could have been sent again
        self.misbooked: list[str] = []  # known as taken, and listed as if nobody had it
        self.problems: list[str] = []  # what the loop heard of: errors that nobody saw
        self._ever_refused: set[str] = set()  # by the model, for good
        self.messages: dict[str, Message] = {}
        self._accepted: set[str] = set()
        self._open_to_doubt: set[str] = set()
        self._gone: set[str] = set()
        self._deliveries: Counter[str] = Counter()
        self._answers: defaultdict[str, set[str]] = defaultdict(set)
        self._last: dict[str, int] = {}
        self._refused: set[str] = set()  # by the model, for good, and not accepted again since
        self._joined: set[str] = set()  # to an earlier message, whose reply is theirs
        self._shown: dict[str, str] = {}  # by a platform: the nonce of each message
        self._known: set[str] = set()  # to the engine, as taken
        self._learnt: set[str] = set()  # the same, in this life

    def born(self) -> None:
        """Note that a process begins: the order of answers is promised within its life."""
        self._last.clear()
        self._learnt.clear()

    def died(self) -> None:
        """Note that a process dies: what it had learnt last may not be on the disk."""
        self.deaths += 1
        self._known -= self._learnt

    def asked(self, words: str) -> None:
        """Note that the model is asked, perhaps for several messages at once."""
        self._joined |= ids(words) - ids(words.split("\n")[0])

    def refused(self, words: str) -> None:
        """Note that the model refuses the messages with these words for good."""
        self._refused |= ids(words)
        self._ever_refused |= ids(words)

    def told_refused(self, message: Message) -> None:
        """Note that a client hears of a refusal."""
        if message.id not in self._ever_refused:
            self.blamed.append(message.id)
        self._refused.add(message.id)

    def sending(self, out: Outgoing) -> None:
        """Note that a reply is given to its platform."""
        one = out.message_id
        if one in self._open_to_doubt or one not in self._shown:
            return
        if out.platform not in DEDUPLICATING:
            self.resent.append(f"{one} on {out.platform}, which shows it twice")
        elif out.nonce != self._shown[one]:
            self.resent.append(f"{one} with another nonce")

    def shown(self, out: Outgoing) -> None:
        """Note that a platform shows a reply."""
        for one in ids(out.reply.text):
            self._answers[one].add(out.reply.text)
            self._shown.setdefault(one, out.nonce)

    def known(self, text: str) -> None:
        """Note that the engine was told that a reply is taken."""
        self._known |= ids(text)
        self._learnt |= ids(text)

    def delivered(self, message: Message) -> bool:
        """Note that a message is sent; say whether it is for the first time."""
        fresh = message.id not in self.messages
        self.messages[message.id] = message
        self._deliveries[message.id] += 1
        self._gone.discard(message.id)
        return fresh

    def accepted(self, message: Message) -> None:
        """Note a promise; one that was refused before is a promise again."""
        self._accepted.add(message.id)
        if message.platform not in PLATFORMS:  # there nobody waits, and hears that it is refused meanwhile
            self._refused.discard(message.id)

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
        for one in sorted(self._accepted - self._open_to_doubt):
            if states.get(one) == FAILED and one in self._refused:
                continue
            if states.get(one) == QUARANTINED and self.deaths >= SUSPECT:
                continue
            self._audit_sending(one, states.get(one))
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

    def _audit_sending(self, one: str, state: int | None) -> None:
        """Judge what the platform was sent of a message, and what the journal says of it."""
        platform = self.messages[one].platform
        if one in self._known and state != DONE:
            self.misbooked.append(f"{one} on {platform}: state {state}")
        if platform in DEDUPLICATING and state in FINISHED and one not in self._shown:
            self.unsent.append(f"{one} on {platform}: state {state}")
        elif platform in PLATFORMS and state == DONE and one not in self._shown and one not in self._joined:
            self.unsent.append(f"{one} on {platform}, and counts as sent")

    @property
    def broken(self) -> dict[str, Any]:
        """The figures that are not 0; empty when every promise was kept."""
        return {name: getattr(self, name) for name in self.FIGURES if getattr(self, name)}


def ids(words: str) -> set[str]:
    """Return the messages that words hold, or an answer that quotes them: the number ends each line."""
    return {f"m{line.rpartition(' ')[2]}" for line in words.split("\n")}


def lines(connection: apsw.Connection, sql: str) -> Counter[tuple[str, str]]:
    """Count each line of each user: a turn that answers several messages holds a line of each."""
    return Counter((user, line) for user, text in connection.execute(sql) for line in text.split("\n"))
