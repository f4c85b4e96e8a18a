"""The operations page and what it shows: one snapshot as JSON, or every second as server-sent events.

Whoever may speak for other users may look: a trusted key, or anybody at this machine where there are no keys. All who
look share one snapshot, so that many pages cost no more than one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from .. import clock
from ..monitor import Snapshots
from .answers import Answers, EventStream
from .openai import sse
from .refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from ..engine import Engine
    from .auth import Keys

__all__ = ["Operations"]

PERIOD: Final = 1.0  # seconds between two events
FRESH: Final = 0.9  # seconds for which a snapshot serves everybody who looks
VIEWERS: Final = 100


class Operations:
    """The routes under `/ops`; `viewers` are the streams under way, to be ended when the server stops."""

    def __init__(self, engine: Engine, keys: Keys) -> None:
        self.viewers = Answers()
        self._engine = engine
        self._keys = keys
        self._snapshots = Snapshots(engine.stats, engine.record, engine.flags, engine.ready)
        self._latest = b""
        self._until = 0.0

    def routes(self) -> list[Route]:
        """Return the routes of the data; the page itself is a file."""
        return [
            Route("/ops/snapshot", self.snapshot),
            Route("/ops/events", self.events),
            Route("/ops/turn", self.turn),
        ]

    async def snapshot(self, request: Request) -> Response:
        """Give everything as it is now."""
        self._check(request)
        return answer(self._look())

    async def events(self, request: Request) -> Response:
        """Give everything every second, until the server stops."""
        self._check(request)
        if len(self.viewers) >= VIEWERS:
            raise Refusal(503, f"{VIEWERS} pages look already; close some", code="too_many_viewers")
        return EventStream(self._every_second(), self.viewers)

    async def turn(self, request: Request) -> Response:
        """Give the waterfall of one of the latest messages by its id."""
        self._check(request)
        wanted = request.query_params.get("id", "")
        record = self._engine.record
        found = record.find(wanted) if record is not None else None
        if found is None:
            text = f"no message {wanted!r:.80} is among the latest, or it is not remembered yet"
            raise Refusal(404, text, code="turn_not_found", param="id")
        return answer(msgspec.json.encode(found.as_dict()))

    async def _every_second(self) -> AsyncGenerator[bytes, None]:
        while True:
            yield sse(self._look())
            await asyncio.sleep(PERIOD)

    def _look(self) -> bytes:
        now = clock.monotonic()
        if now >= self._until:
            self._latest = msgspec.json.encode(self._snapshots.take())
            self._until = now + FRESH
        return self._latest

    def _check(self, request: Request) -> None:
        """Raise Refusal 401 or 403 unless the caller may see what concerns all users."""
        if not self._keys.caller(request.headers.get("authorization")).names_users:
            text = "this API key is one user's; operations need a key of WHISPER_FAST_TRUSTED_API_KEYS"
            raise Refusal(403, text, code="operations_not_allowed")


def answer(body: bytes) -> Response:
    return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")
