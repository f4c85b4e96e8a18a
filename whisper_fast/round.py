"""A round: the messages of one user that one turn answers together, mostly a single one.

What a message does while the user's earlier one in the same place (platform, channel, scope) is not answered yet:

    queue      it is answered in a turn of its own, after the earlier one
    merge      it joins the earlier one if that waits for its turn: one turn answers both
    interrupt  the same, and if the earlier one's turn runs already, that turn begins again with the words of both
    drop       it is refused with Busy, and nothing of it is kept

Only the message just before it in the user's lane can be joined, so the order stays. Each message has an entry of its
own in the journal and gets the same reply under its own id. Whoever was reading the interrupted answer as a stream
gets Interrupted; all others get the reply to both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from .errors import Interrupted
from .message import joined
from .ticket import Ticket

if TYPE_CHECKING:
    from .journal import Entry
    from .lanes import Place
    from .message import Delta, Message, Reply, Turn

__all__ = ["Round", "where"]

LONGEST = 16  # messages in one round: whoever keeps on writing is answered all the same


def where(message: Message) -> tuple[str, str, str]:
    """Return the place in which a message is said."""
    return message.platform, message.channel, message.scope


class Round:
    """The entries and tickets of one turn; the first entry is the one whose place it has in the lane.

    `failures` counts how often these messages have failed since the start, `room` is the bytes of text that a turn
    may have, `claims` is what `Claims.take` gave for each entry. `interrupted` is set from the moment in which a
    message interrupts the turn until the turn begins again.
    """

    __slots__ = (
        "claims", "entries", "failures", "interrupted", "open", "place", "room", "running", "tickets", "turn",
    )  # fmt: skip

    def __init__(
        self, turn: Turn, entry: Entry, ticket: Ticket, place: Place, *, room: int, failures: int = 0
    ) -> None:
        self.turn = turn
        self.room = room
        self.entries = [entry]
        self.tickets = [ticket]
        self.place = place
        self.failures = failures
        self.claims: list[int] = []
        self.running = False
        self.interrupted = False
        self.open = True  # until the answer is there

    @property
    def first(self) -> Entry:
        """The entry whose turn it is."""
        return self.entries[0]

    @property
    def messages(self) -> list[Message]:
        """The messages as they came."""
        return [entry.message for entry in self.entries]

    @property
    def streamed(self) -> bool:
        """Whether somebody wants the pieces."""
        return any(ticket.streamed for ticket in self.tickets)

    @property
    def taken(self) -> bool:
        """Whether somebody has the reply."""
        return any(ticket.taken for ticket in self.tickets)

    def admits(self, message: Message, policy: str) -> bool:
        """Say whether `message` may join under its `policy`."""
        mine = self.turn.message
        return (
            self.open
            and (policy == "interrupt" or (policy == "merge" and not self.running))
            and len(self.entries) < LONGEST
            and where(mine) == where(message)
            and not (mine.continuation or message.continuation)
            and len(mine.text.encode()) + len(message.text.encode()) < self.room
        )

    def join(self, entry: Entry, ticket: Ticket) -> None:
        """Answer one more message in this turn; a turn that runs begins again."""
        self.turn.message = joined(self.turn.message, entry.message)
        self.entries.append(entry)
        self.tickets.append(ticket)
        if self.running and self.place.task is not None:
            self._replace_begun()
            if not self.interrupted:  # one that is being cancelled will see this message too
                self.interrupted = True
                self.place.task.cancel()

    def push(self, piece: Delta) -> None:
        """Hand on a piece of the answer."""
        for ticket in self.tickets:
            ticket.push(piece)

    def deliver(self, reply: Reply) -> None:
        """Give each message the reply, under its own id."""
        self.tickets[0].deliver(reply)
        for ticket in self.tickets[1:]:
            ticket.deliver(msgspec.structs.replace(reply, id=ticket.message_id))

    def fail(self, error: BaseException) -> None:
        """End every ticket in an error."""
        for ticket in self.tickets:
            ticket.fail(error)

    def _replace_begun(self) -> None:
        """End the streams that have pieces of an answer that will not go on; their messages get fresh tickets."""
        for at, ticket in enumerate(self.tickets):
            if ticket.begun:
                ticket.fail(Interrupted("the next message ended this answer; both are answered together"))
                self.tickets[at] = Ticket(ticket.message_id)
