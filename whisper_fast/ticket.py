"""A ticket: what whoever sent a message holds until the reply is there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .errors import WhisperFastError
from .message import Delta

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from types import TracebackType

    from .message import Reply

__all__ = ["ReplyStream", "Ticket"]


class Ticket:
    """The promise of one reply. Many may wait for it; whoever stops waiting stops only for itself.

    The pieces of the answer are kept until its end, so that each stream sees all of them, at its own pace. `taken`
    says whether anybody has the reply; `on_taken` is called when the first one takes it after nobody had waited.
    """

    __slots__ = ("_done", "_news", "_pieces", "_waiting", "message_id", "on_taken", "taken")

    def __init__(self, message_id: str) -> None:
        self.message_id = message_id
        self.taken = False
        self.on_taken: Callable[[], object] | None = None
        self._waiting = 0
        self._done: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(seen)
        self._pieces: list[Delta] = []
        self._news: asyncio.Event | None = None

    @classmethod
    def answered(cls, reply: Reply, on_taken: Callable[[], object] | None = None) -> Ticket:
        """Return the ticket of a message that was answered before."""
        ticket = cls(reply.id)
        ticket.on_taken = on_taken
        ticket.deliver(reply)
        return ticket

    async def reply(self) -> Reply:
        """Wait for the reply. Raises the error that the message ended in, each waiter its own copy."""
        self._waiting += 1
        try:
            reply = await asyncio.shield(self._done)
        except WhisperFastError as error:
            raise error.copy() from None
        finally:
            self._waiting -= 1
        self._take()
        return reply

    async def pieces(self) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece, from its beginning; the whole text at once if it was not streamed."""
        if self._news is None:
            self._news = asyncio.Event()
        sent = 0
        self._waiting += 1
        try:
            while True:
                while sent < len(self._pieces):
                    yield self._pieces[sent]
                    sent += 1
                if self._done.done():
                    break
                self._news.clear()
                await self._news.wait()
        finally:
            self._waiting -= 1
        reply = await self.reply()
        if not sent and (reply.text or reply.tool_calls):
            yield Delta(reply.text, tool_calls=reply.tool_calls, finish_reason=reply.finish_reason, usage=reply.usage)

    @property
    def streamed(self) -> bool:
        """Whether somebody wants the pieces."""
        return self._news is not None

    def stream(self) -> Ticket:
        """Ask for pieces; returns the ticket itself."""
        if self._news is None:
            self._news = asyncio.Event()
        return self

    def push(self, piece: Delta) -> None:
        """Hand on a piece of the answer."""
        self._pieces.append(piece)
        if self._news is not None:
            self._news.set()

    @property
    def begun(self) -> bool:
        """Whether a part of an answer has been handed on."""
        return bool(self._pieces)

    @property
    def done(self) -> bool:
        """Whether the reply or the error is there."""
        return self._done.done()

    def deliver(self, reply: Reply) -> None:
        """Keep the promise."""
        self.taken = self._waiting > 0
        self._done.set_result(reply)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """End the ticket in an error."""
        if not self._done.done():
            self._done.set_exception(error)
            self._wake()

    def _take(self) -> None:
        if not self.taken:
            self.taken = True
            if self.on_taken is not None:
                self.on_taken()

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()


def seen(done: asyncio.Future[Reply]) -> None:
    """Mark the error as seen: a ticket that nobody waits for any more is no mistake."""
    if not done.cancelled():
        done.exception()


class ReplyStream:
    """An answer as it comes: an async iterator of `Delta`; `reply` is the whole `Reply` once it has ended."""

    def __init__(self, opening: Awaitable[Ticket]) -> None:
        self._pieces = self._run(opening)
        self.reply: Reply | None = None

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self._pieces

    async def __anext__(self) -> Delta:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Stop listening; the message itself goes on to its end."""
        await self._pieces.aclose()

    async def __aenter__(self) -> ReplyStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self, opening: Awaitable[Ticket]) -> AsyncGenerator[Delta, None]:
        ticket = await opening
        async for piece in ticket.pieces():
            yield piece
        self.reply = await ticket.reply()
