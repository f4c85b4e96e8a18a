"""What was left undone goes on: after a crash from the last durable step, after a failure when its pause is over.

A message that failed keeps its place in its user's lane through the first two pauses, each of at most 8 s, and those
behind it wait: the user is answered in order. One that needs longer gives its place up; a user who can be answered is
not kept silent by a message that perhaps never can be.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

from .errors import Closed, StoreError, WhisperFastError, described
from .retries import Retries

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .journal import Entry, Journal
    from .lanes import Lanes, Place
    from .message import Message
    from .round import Round
    from .store.claims import Claims

__all__ = ["Recovery"]

log = logging.getLogger(__name__)

LOOK = 0  # the number of no entry: look for all of them
FOREIGN_FAILURES = 8  # of a message in code that is not ours: about four minutes
PATIENT_FAILURES = 2  # of a message, while the user's later ones wait for it
PATIENT_SECONDS = 8.0  # the longest pause for which they do


class Recovery:
    """Leads unfinished entries back into their lanes.

    `answer(entry, place, failures)` starts the turn of one without a reply, `await remember(entry)` finishes one
    that has its reply, `runs(message)` says whether somebody is at it already. A message in whose turn the process
    died `attempts` times is not tried any more, until somebody releases it. `probation` lets one suspect run at a
    time, so that none is struck for another's deed.
    """

    def __init__(
        self,
        journal: Journal,
        lanes: Lanes,
        claims: Claims,
        *,
        attempts: int,
        answer: Callable[[Entry, Place, int], object],
        remember: Callable[[Entry], Awaitable[object]],
        runs: Callable[[Message], bool],
    ) -> None:
        self._journal = journal
        self._lanes = lanes
        self._claims = claims
        self._attempts = attempts
        self._answer = answer
        self._remember = remember
        self._runs = runs
        self._retries = Retries(self._again)
        self._kept: dict[int, Place] = {}  # by entry
        self._finishing: set[int] = set()
        self._looking = asyncio.Lock()
        self._look_again = False
        self.probation = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._retries)

    async def start(self) -> None:
        """Count the deaths that the claims tell of, then go on with every unfinished message. Raises StoreError."""
        await self._journal.strike(self._claims.left, self._attempts)
        self._claims.clear()  # at once: a death from now on is not theirs
        entries = await self._journal.resume()
        for entry in entries:
            self._go_on(entry, 0)
        if entries:
            log.warning("%d messages were accepted and not finished; they go on now", len(entries))

    def look(self) -> None:
        """Look for messages that somebody else has released."""
        self._retries.soon(LOOK)

    def hopeless(self, around: Round, error: Exception) -> bool:
        """Say whether a round has failed so often in somebody else's code that it is not tried again by itself."""
        return not isinstance(error, WhisperFastError | TimeoutError) and around.failures >= FOREIGN_FAILURES

    def failed(self, around: Round, error: Exception, *, recorded: bool) -> None:
        """Try a round again later, if it may succeed then; otherwise it waits for the next start.

        One whose reply is `recorded` only has to be remembered, and that is tried until it succeeds.
        """
        if recorded or not isinstance(error, WhisperFastError) or error.retriable or error.mendable:
            wanted = getattr(error, "retry_after", None)
            self._later(around.entries, around.place, failures=around.failures + 1, at_least=wanted)

    def asked(self, entry: Entry, place: Place) -> Place:
        """Do not try an entry again by itself: somebody asks for it, in `place` or in the one that it has kept."""
        self._retries.forget(entry.id)
        kept = self._kept.pop(entry.id, None)
        if kept is None:
            return place
        place.leave()
        return kept

    def suspect(self, entry: Entry) -> bool:
        """Say whether one more death in this entry's turn would quarantine it."""
        return 0 < self._attempts <= entry.attempts + 1 and entry.attempts > 0

    async def close(self) -> None:
        """Try nothing again any more; what waits for one that failed is left to the next start, in its order."""
        await self._retries.close()
        for place in tuple(self._kept.values()):
            self._lanes.give_up(place.user)
        self._kept.clear()

    def _later(self, entries: list[Entry], place: Place, *, failures: int, at_least: float | None = None) -> None:
        """Try entries again after a pause; while that is short, they keep the place of the first one."""
        delay = self._retries.later(*(entry.id for entry in entries), failures=failures, at_least=at_least)
        if failures > PATIENT_FAILURES or delay > PATIENT_SECONDS or self._retries.closed or self._lanes.closed:
            return
        place.keep()
        self._kept[entries[0].id] = place
        for entry in entries[1:]:
            self._kept[entry.id] = place = self._enter(entry, behind=place)

    def _enter(self, entry: Entry, behind: Place | None = None) -> Place:
        message = entry.message
        size, rank = len(message.text), message.priority
        return self._lanes.enter(
            message.user, size, priority=rank, weight=message.weight, admitted=True, behind=behind
        )

    def _go_on(self, entry: Entry, failures: int) -> None:
        place = self._kept.pop(entry.id, None) or self._enter(entry)
        if entry.reply is None:
            self._answer(entry, place, failures)
        else:
            self._finishing.add(entry.id)
            place.start(lambda: self._finish(entry, place, failures), f"finish:{entry.message.id}", slot=False)

    async def _finish(self, entry: Entry, place: Place, failures: int) -> None:
        async with self.probation if self.suspect(entry) else nullcontext():
            claim = self._claims.take(entry.id)
            try:
                await self._remember(entry)
            except Exception as error:  # noqa: BLE001 - an embedder's own too: what was answered is remembered some day
                log.error("message %s is answered and not yet remembered: %s", entry.message.id, described(error))
                self._later([entry], place, failures=failures + 1)
            finally:
                self._finishing.discard(entry.id)
                self._claims.give_back(claim)

    async def _again(self, entry_id: int, failures: int) -> None:
        try:
            if entry_id == LOOK:
                await self._look()
            elif (entry := await self._journal.load(entry_id)) is not None and not self._runs(entry.message):
                self._go_on(entry, failures)
        except Closed:
            pass  # the next start goes on
        except StoreError as error:
            self._retries.later(entry_id, failures=failures + 1, at_least=error.retry_after)
        finally:
            if place := self._kept.pop(entry_id, None):
                place.leave()

    async def _look(self) -> None:
        """Go on with what nobody is at; one look at a time, and one more for all who asked meanwhile."""
        if self._looking.locked():
            self._look_again = True
            return
        async with self._looking:
            self._look_again = True
            while self._look_again:
                self._look_again = False
                for entry in await self._journal.unfinished():
                    if not (self._runs(entry.message) or entry.id in self._retries or entry.id in self._finishing):
                        self._go_on(entry, 0)
