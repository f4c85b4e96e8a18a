"""The answers under way: each can be ended early, when the client is gone or when the server stops."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from starlette.responses import Response

from ..errors import Closed, WhisperFastError
from .openai import Chunks
from .refusal import error_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.types import Receive, Scope, Send

__all__ = ["Answers", "EventStream"]

HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class Answers:
    """All answers that are being given; `end` ends them, each with a proper last word."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self.ended = False

    def __len__(self) -> int:
        return len(self._limits)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[asyncio.Timeout]:
        """Hold one answer; the body raises Closed when `end` is called, or when it is cut with `cut`."""
        try:
            async with asyncio.timeout(0 if self.ended else None) as limit:
                self._limits.add(limit)
                try:
                    yield limit
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            if not limit.expired():  # an error of the model, which is a TimeoutError too
                raise
            raise Closed(
                "the server stops; the message is kept: ask again with the same Idempotency-Key", retry_after=1
            ) from None

    def end(self) -> None:
        """End every answer now, and every later one at once."""
        self.ended = True
        for limit in tuple(self._limits):
            cut(limit)


def cut(limit: asyncio.Timeout) -> None:
    if not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())


class EventStream(Response):
    """Server-sent events. What goes wrong before the first event is an ordinary answer, later it is an event.

    When the client goes away the events are closed at once.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], answers: Answers) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; `receive` tells when the client has gone."""
        started = False
        try:
            async with self._answers.one() as limit, listening(receive, limit), aclosing(self._events) as events:
                async for event in events:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except WhisperFastError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": Chunks.broken(error_body(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def listening(receive: Receive, limit: asyncio.Timeout) -> AsyncIterator[None]:
    """Cut `limit` when the client goes away."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cut(limit)

    listener = asyncio.create_task(listen(), name="door-disconnect")
    try:
        yield
    finally:
        listener.cancel()
        await asyncio.wait([listener])
