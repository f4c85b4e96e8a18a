"""A streamed answer: network reads in, pieces out, all pieces of one read at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from whisper_fast.errors import LLMError, LLMProtocolError
from whisper_fast.message import Delta, Usage

from .sse import EventReader
from .wire import NOTHING, STREAMED, failure_of

if TYPE_CHECKING:
    from .wire import Event

__all__ = ["PieceReader"]

DONE = b"[DONE]"
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError)

plain = str.__new__
decode = STREAMED.decode


class PieceReader:
    """The pieces in one stream of bytes.

    `over` says that the answer is complete. What is wrong with the stream is in `failure`, beside the pieces before
    it. `events` counts what the server said so far, with or without text; `size` the bytes of text.
    """

    __slots__ = ("_events", "_finished", "events", "failure", "over", "size", "usage", "where")

    def __init__(self, where: str) -> None:
        self.where = where
        self.over = False
        self.failure: LLMError | None = None
        self.usage: Usage | None = None
        self.size = 0
        self.events = 0
        self._events = EventReader()
        self._finished = False

    def feed(self, data: bytes) -> list[Delta]:
        """Return the pieces that `data` completes; empty bytes are the end of the stream."""
        pieces: list[Delta] = []
        try:
            events = self._events.feed(data) if data else self._events.end()
            self.events += len(events)
            self._read(events, pieces)
            if not data and not self.over:
                self._end()
        except LLMError as error:
            self.failure = error
        return pieces

    def _read(self, events: list[bytes], pieces: list[Delta]) -> None:
        """Append the pieces of `events`; most are plain text, which costs no more than it must."""
        size = 0
        try:
            for data in events:
                if data == DONE:
                    self.over = True
                    return
                if not data:  # some servers keep a connection open with empty events
                    continue
                event = decode(data)
                choices = event.choices
                if choices and len(choices) == 1 and event.usage is None and event.error is None:
                    choice = choices[0]
                    change = choice.delta or NOTHING
                    if choice.finish_reason is None and change.tool_calls is None and choice.index == 0:
                        if text := change.content:
                            size += len(text) if text.isascii() else len(text.encode())
                            pieces.append(plain(Delta, text))
                        continue
                if (piece := self._whole(event, data)) is not None:
                    pieces.append(piece)
        except UNDECODABLE:
            raise LLMProtocolError(f"{self.where}: what it streamed is not a chat completion") from None
        finally:
            self.size += size

    def _whole(self, event: Event, data: bytes) -> Delta | None:
        """Return the piece of an event that may bring anything, None for one that brings nothing."""
        if event.error is not None:
            raise failure_of(event.error, self.where, data)
        text, calls, reason = "", None, None
        for choice in event.choices or ():
            if choice.index == 0:
                change, reason = choice.delta or NOTHING, choice.finish_reason
                text, calls = change.content or "", change.tool_calls
        self._finished = self._finished or reason is not None
        self.size += len(text.encode()) + (len(msgspec.json.encode(calls)) if calls else 0)
        usage = event.usage.usage() if event.usage is not None else None
        self.usage = usage or self.usage
        if not (text or calls or reason or usage):
            return None
        return Delta(text, finish_reason=reason, tool_calls=calls or (), usage=usage)

    def _end(self) -> None:
        self.over = True
        if not self._finished:
            raise LLMProtocolError(f"{self.where}: its stream ended before the answer did")
