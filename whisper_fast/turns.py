"""The way of a message, top to bottom: from its place in a lane to the memory of it.

`submit` takes a place in the user's lane and accepts the message durably; `_turn` gathers what is known, asks the
model, records the reply, hands it out, and remembers. What fails stays in the journal and is `Recovery`'s.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import Busy, Closed, StoreError, described
from .journal import Entry, encoded
from .message import Message, Turn
from .prompt import compose
from .question import ask, reply_of
from .recovery import Recovery
from .round import Round, where
from .ticket import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conversation import Conversations
    from .journal import Journal
    from .lanes import Lanes, Place
    from .llm import LLMPool
    from .llm.completion import Completion
    from .memory import MemoryStore
    from .message import Reply
    from .monitor import Record
    from .outbox import Outbox
    from .pipeline import Pipeline
    from .settings import Settings
    from .store.claims import Claims

__all__ = ["Turns"]

log = logging.getLogger(__name__)

REMEMBER_SECONDS = 10.0

Key = tuple[str, str, str, str]


class Turns:
    """Leads every message through the engine's parts; `counts` are those of `Engine.stats`."""

    def __init__(
        self,
        settings: Settings,
        *,
        lanes: Lanes,
        journal: Journal,
        claims: Claims,
        pipeline: Pipeline,
        llm: LLMPool,
        outbox: Outbox,
        memory: MemoryStore,
        conversations: Conversations,
        record: Record | None,
    ) -> None:
        self._settings = settings
        self._lanes = lanes
        self._journal = journal
        self._claims = claims
        self._pipeline = pipeline
        self._llm = llm
        self._outbox = outbox
        self._memory = memory
        self._conversations = conversations
        self._record = record
        self._in_flight: dict[Key, Ticket] = {}
        self._entered: dict[Key, list[Place]] = {}  # of messages that are being accepted
        self._delivered: dict[
            int, Callable[[], bool]
        ] = {}  # by entry that is not closed: whether somebody has its reply
        self.counts = dict.fromkeys(("accepted", "answered", "failed", "duplicates", "partial"), 0)
        self.recovery = Recovery(
            journal,
            lanes,
            claims,
            attempts=settings.quarantine_after,
            answer=self._answer_again,
            remember=self._remember_again,
            runs=lambda message: key(message) in self._in_flight,
        )

    async def submit(self, message: Message, *, streamed: bool = False) -> Ticket:
        """Accept a message; when this returns it is on the disk and will be answered.

        Raises InvalidMessage (IdReused for a `strict` one), Overloaded (Busy where the channel drops), Quarantined,
        Closed, StoreError; then nothing was accepted.
        """
        message = message.checked(self._settings.max_text_bytes)
        turn = Turn(message)
        if self._policy(message) == "drop":
            await self._refuse_if_busy(message)
        place = self._lanes.enter(message.user, priority=message.priority, weight=message.weight)
        place.about = where(message)
        self._entered.setdefault(key(message), []).append(place)
        try:
            body = encoded(message)
            place.hold(len(body))
            accepting = self._journal.accept(message, body)
            entry = await asyncio.shield(accepting)
        except asyncio.CancelledError:  # the caller is gone, the message is not: it goes its way in its turn
            accepting.add_done_callback(partial(self._claim_alone, turn=turn))
            raise
        except BaseException:
            self._place(message, last=True).leave()
            raise
        turn.lap("journal")
        return self._claim(entry, turn, self._place(message), streamed=streamed)

    def _place(self, message: Message, *, last: bool = False) -> Place:
        """Return the place of the message's first delivery, or of its last, whichever of them is through first."""
        places = self._entered[key(message)]
        place = places.pop(-1 if last else 0)
        if not places:
            del self._entered[key(message)]
        return place

    def _policy(self, message: Message) -> str:
        settings = self._settings
        return message.when_busy or settings.when_busy_by_channel.get(message.channel) or settings.when_busy

    async def _refuse_if_busy(self, message: Message) -> None:
        """Raise Busy if the user's earlier message in this place is not answered yet and this one is not known."""
        earlier = (place for place in self._lanes.of(message.user) if place.about == where(message))
        busy = any(place.turn is None or place.turn.open or place.task is None for place in earlier)
        if busy and key(message) not in self._in_flight and not await self._journal.knows(message):
            text = "the earlier message is not answered yet, and this channel drops what comes meanwhile"
            raise Busy(text, retry_after=self._lanes.patience())

    def _claim(self, entry: Entry, turn: Turn, place: Place, *, streamed: bool = False, failures: int = 0) -> Ticket:
        """Return the ticket of an accepted message, a new one unless the message is known."""
        message = turn.message = entry.message
        known = self._in_flight.get(key(message))
        if entry.reply is not None:
            known = Ticket.answered(entry.reply, partial(self._sent, entry) if entry.unsettled else None)
        if known is not None:
            self.counts["duplicates"] += 1
            place.leave()
            return known
        self.counts["accepted"] += not entry.known
        if place.left:  # the engine has stopped while the message was on its way to the disk
            ticket = Ticket(message.id)
            ticket.fail(stopped())
            return ticket
        place = self.recovery.asked(entry, place)
        ticket = self._in_flight[key(message)] = Ticket(message.id)
        if streamed:
            ticket.stream()
        if not self._joins(entry, ticket, place):
            around = place.turn = Round(
                turn, entry, ticket, place, room=self._settings.max_text_bytes, failures=failures
            )
            suspect = self.recovery.suspect(entry)
            work = partial(self._alone if suspect else self._turn, around)
            place.start(work, f"turn:{message.id}", slot=not suspect)
        return ticket

    def _joins(self, entry: Entry, ticket: Ticket, place: Place) -> bool:
        """Let a message join the one before it, where its channel merges or interrupts; say whether it did."""
        policy = self._policy(entry.message)
        before = place.before() if policy in ("merge", "interrupt") else None
        if before is None or before.turn is None or not before.turn.admits(entry.message, policy):
            return False
        before.turn.join(entry, ticket)
        self._in_flight.update(zip(map(key, before.turn.messages), before.turn.tickets, strict=True))
        place.leave()
        return True

    def _claim_alone(self, accepting: asyncio.Future[Entry], turn: Turn) -> None:
        """Go on with a message whose caller went away while it was being accepted."""
        if accepting.cancelled() or accepting.exception():
            self._place(turn.message, last=True).leave()
        else:
            self._claim(accepting.result(), turn, self._place(turn.message))

    async def _turn(self, around: Round) -> None:
        """Lead one accepted message, and those that joined it, from the lane to the memory."""
        turn, entry = around.turn, around.first
        turn.lap("lane")
        try:
            completion = await self._answer(around)
            around.place.rest()
            reply = reply_of(turn, completion)
            await self._journal.record(entry, reply, around.entries[1:], turn.message)
            turn.lap("record")
            around.deliver(reply)
            self.counts["answered"] += len(around.entries)
            self.counts["partial"] += bool(turn.partial)
            self._delivered[entry.id] = await self._send(around, reply)
            await self._remember(entry, turn.message, turn.get("embedding"), reply)
            turn.lap("remember")
            if self._record is not None:
                self._record.ended(turn)
        except Exception as error:  # noqa: BLE001 - the message stays open in the journal: tried again, it goes on
            await self._failed(around, error)
        except asyncio.CancelledError:
            around.fail(stopped())
            raise
        finally:
            around.open = False
            for slot in around.claims:
                self._claims.give_back(slot)
            self._landed(around)

    def _landed(self, around: Round) -> None:
        """Take a round's messages for no longer in flight; whoever sends one again begins a new turn."""
        for entry, ticket in zip(around.entries, around.tickets, strict=True):
            if self._in_flight.get(key(entry.message)) is ticket:
                del self._in_flight[key(entry.message)]

    async def _answer(self, around: Round) -> Completion:
        """Gather what is known and ask the model; from the beginning again when the user's next message joins."""
        turn = around.turn
        around.running = True
        while True:
            around.claims += [self._claims.take(entry.id) for entry in around.entries[len(around.claims) :]]
            try:
                await self._pipeline.run(turn)
                turn.prompt = compose(turn, self._settings.context_tokens)
                turn.lap("gather")
                completion = await ask(self._llm, around, self._settings.llm_request_timeout)
                turn.lap("llm")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not around.interrupted or task is None or task.uncancel():
                    raise  # the engine stops
                around.interrupted = False
                turn.begin_again(turn.message)
            else:
                around.open = False
                return completion

    async def _alone(self, around: Round) -> None:
        """Lead a message in whose turn the process has died before, and no other of that kind beside it."""
        async with self.recovery.probation:
            await self._turn(around)

    async def _send(self, around: Round, reply: Reply) -> Callable[[], bool]:
        """Send the reply by its platform's sender, if there is one; return what tells whether somebody has it."""
        entry = around.first
        if entry.message.platform in self._outbox:
            sent = await self._outbox.send(entry, reply)
            return lambda: sent
        for ticket in around.tickets:
            ticket.on_taken = partial(self._sent, entry)
        return lambda: around.taken

    def _sent(self, entry: Entry) -> None:
        """Note that somebody has a reply that nobody had waited for."""
        if entry.id in self._delivered:
            self._delivered[entry.id] = lambda: True
        with suppress(Closed):
            self._journal.sent(entry).add_done_callback(noted)

    async def _remember(self, entry: Entry, message: Message, vector: Any, reply: Reply) -> None:
        """Store conversation and memories and close the entry, all or nothing, then show them to the next turn."""
        if not message.remember or reply.finish_reason == "tool_calls":  # the round with the results is remembered
            await self._close(entry)
            return
        memory = {"text": message.text, "scope": message.scope, "at": message.at, "source": f"turn:{entry.id}"}
        if vector is not None:
            pending = await self._memory.prepare(message.user, [memory], vectors=[vector])
        else:
            async with asyncio.timeout(REMEMBER_SECONDS):  # a hanging embedder must not hold the user's lane
                pending = await self._memory.prepare(message.user, [memory])
        said = partial(self._conversations.insert, turn=entry.id, message=message, reply=reply.text)
        if await self._close(entry, said, pending.insert):
            self._memory.publish(pending)
            self._conversations.publish(entry.id, message, reply.text)

    async def _close(self, entry: Entry, *stores: Callable[[Any], Any]) -> bool:
        """Close an entry together with what is stored of it; what nobody is known to have is its sender's again."""
        done = await self._journal.complete(entry, *stores, sent=lambda: self._delivered.get(entry.id, nobody)())
        if not self._delivered.pop(entry.id, nobody)():
            self._outbox.held(entry.message.platform)
        return done

    async def _failed(self, around: Round, error: Exception) -> None:
        """Tell the callers; a final error closes the entries, any other leaves them open."""
        self.counts["failed"] += 1
        if self._record is not None:
            self._record.failed(error)
        log.error("message %s: %s", around.first.message.id, described(error))
        around.fail(error)
        recorded = around.first.id in self._delivered
        if not recorded and (getattr(error, "final", False) or self.recovery.hopeless(around, error)):
            self._landed(around)  # first: whoever sends it again from now on finds it failed, and begins anew
            # What is being accepted again meanwhile will have a turn of its own, which is not to be closed under it.
            alone = [entry for entry in around.entries if key(entry.message) not in self._entered]
            with suppress(StoreError, Closed):  # it is tried again after the next start, and ends as it ended now
                await asyncio.shield(self._journal.fail(alone))
        else:
            self.recovery.failed(around, error, recorded=recorded)

    def _answer_again(self, entry: Entry, place: Place, failures: int) -> None:
        self._claim(entry, Turn(entry.message), place, failures=failures)

    async def _remember_again(self, entry: Entry) -> None:
        """Remember a message whose reply is recorded; whether anybody has it only this process may know."""
        if entry.reply is not None:
            self._delivered.setdefault(entry.id, nobody)
            await self._remember(entry, entry.message, None, entry.reply)

    async def stop(self) -> None:
        """Cancel the turns that still run; their messages stay open in the journal, and who waits is told so."""
        await self._lanes.abort()
        for ticket in self._in_flight.values():
            ticket.fail(stopped())


def key(message: Message) -> Key:
    return message.platform, message.channel, message.user, message.id


def noted(done: asyncio.Future[Any]) -> None:
    """See the error of a note that nobody waits for: without it the reply stays listed as held."""
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("a reply that was taken is still listed as held: %s", error)


def nobody() -> bool:
    return False


def stopped() -> Closed:
    return Closed("the engine stopped first; the message is kept and is answered after the next start")
