"""Replies that go out by a platform's own way, a chat network's bot say: sent once, and again after a crash if safe.

A reply is recorded before it is sent, so after a crash it may or may not have reached its channel. A platform that
drops a second message with the same nonce (Discord's `nonce` with `enforce_nonce`) may be sent it again; for any
other the reply is held and listed, and a person decides.
"""

from __future__ import annotations

import asyncio
import logging
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from .errors import StoreError, described
from .retries import Retries

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .journal import Entry, Journal
    from .message import Reply

__all__ = ["Outbox", "Outgoing", "nonce"]

log = logging.getLogger(__name__)

SEND_SECONDS = 30.0


class Outgoing(NamedTuple):
    """A reply on its way: where to, what, and the `nonce` that is the same each time this one is sent.

    `again` is True where it may have been sent before.
    """

    platform: str
    channel: str
    user: str
    message_id: str
    reply: Reply
    nonce: str
    again: bool


class Sender(NamedTuple):
    send: Callable[[Outgoing], Awaitable[object]]
    deduplicates: bool


class Outbox:
    """The senders by platform.

    A send that fails or takes over 30 s leaves its reply held; where the platform deduplicates, it is tried again.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._senders: dict[str, Sender] = {}
        self._names: list[str] = []
        self._flushing: list[asyncio.Lock] = []  # by the place of a name; two at a time would send what is held twice
        self._again = Retries(self._flush)
        self.sent = 0
        self.sending = 0  # replies that a sender has now

    def __contains__(self, platform: str) -> bool:
        return platform in self._senders

    def register(self, platform: str, send: Callable[[Outgoing], Awaitable[object]], *, deduplicates: bool) -> None:
        """Let `await send(outgoing)` send the replies of `platform`; what is held of it is sent soon after."""
        self._senders[platform] = Sender(send, deduplicates)
        if platform not in self._names:
            self._names.append(platform)
            self._flushing.append(asyncio.Lock())
        self._again.soon(self._names.index(platform))

    def held(self, platform: str) -> None:
        """Say that a reply is held; where the platform deduplicates, it is sent again in a moment."""
        if platform in self._senders and self._senders[platform].deduplicates:
            self._again.later(self._names.index(platform), failures=1)

    def look(self) -> None:
        """Look for replies that somebody else has released."""
        for number in range(len(self._names)):
            self._again.soon(number)

    async def send(self, entry: Entry, reply: Reply, *, again: bool = False) -> bool:
        """Send a reply by its platform's sender; say whether it is known as sent."""
        message = entry.message
        sender = self._senders[message.platform]
        number = nonce(message.platform, message.channel, message.user, message.id)
        out = Outgoing(message.platform, message.channel, message.user, message.id, reply, number, again)
        self.sending += 1
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await sender.send(out)
        except Exception as error:  # noqa: BLE001 - a bot's own code: whatever it raises, the reply is kept
            log.warning("the reply to %s was not sent: %s", message.id, described(error))
            return False
        finally:
            self.sending -= 1
        self.sent += 1
        return True

    async def close(self) -> None:
        """Send nothing any more."""
        await self._again.close()

    async def _flush(self, number: int, failures: int) -> None:
        """Send what is held of a platform, and come back later for what could not be sent."""
        platform = self._names[number]
        try:
            async with self._flushing[number]:
                whole = await self._send_held(platform)
        except StoreError as error:
            log.warning("held replies of %s are not sent yet: %s", platform, error)
            whole = False
        if not whole:
            self._again.later(number, failures=failures + 1)

    async def _send_held(self, platform: str) -> bool:
        """Send what is held of a platform, each user's in its order; say whether all was. Raises StoreError.

        Behind one that failed its user's others in the channel wait. Where the platform does not deduplicate, one
        that failed may have arrived: it is held again, for a person to decide.
        """
        safe, blocked = self._senders[platform].deduplicates, set()
        for entry in await self._journal.held(platform, released=not safe):
            to = entry.message.channel, entry.message.user
            if to in blocked:
                continue
            if entry.reply is None or await self.send(entry, entry.reply, again=True):
                await self._journal.sent(entry)
            elif safe:
                blocked.add(to)
            else:
                await self._journal.hold(entry)
        return not blocked


def nonce(platform: str, channel: str, user: str, message_id: str) -> str:
    """Return 24 characters that name a message's reply for ever: BLAKE2b of its key, as Discord allows 25."""
    names = "\x1f".join((platform, channel, user, message_id))
    return blake2b(names.encode(), digest_size=12).hexdigest()
