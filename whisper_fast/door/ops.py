"""The operations page: one snapshot as JSON, or every second as server-sent events, and the flags to switch.

Whoever may speak for other users may look and switch: a trusted key, or anybody at this machine where there are no
keys. All who look share one snapshot, so that many pages cost no more than one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from .. import clock
from ..flags import DOES
from ..monitor import Snapshots
from .answers import Answers, EventStream
from .body import decoded, read
from .openai import sse
from .refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from ..engine import Engine
    from .auth import Caller, Keys

__all__ = ["Operations"]

PERIOD: Final = 1.0  # seconds between two events
FRESH: Final = 0.9  # seconds for which a snapshot serves everybody who looks
VIEWERS: Final = 100
SWITCH_BYTES: Final = 16 << 10
REASON: Final = 200  # characters


class Switch(msgspec.Struct):
    """What is asked of `POST /ops/flags`."""

    flags: dict[str, bool]
    reason: str


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
            Route("/ops/flags", self.flags, methods=["GET"]),
            Route("/ops/flags", self.switch, methods=["POST"]),
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

    async def flags(self, request: Request) -> Response:
        """List the flags and their latest changes."""
        self._check(request)
        return self._listed()

    async def switch(self, request: Request) -> Response:
        """Switch flags, all or none of them, for a reason that is kept with the change."""
        caller = self._check(request)
        asked, _ = decoded(await read(request, SWITCH_BYTES), Switch)
        reason = " ".join(asked.reason.split())[:REASON]
        if not reason:
            raise Refusal(
                400, "reason is empty; say why, it is kept with the change", code="invalid_value", param="reason"
            )
        for name in asked.flags:
            if name not in DOES:
                text = f"there is no flag {name!r:.80}; there are {', '.join(DOES)}"
                raise Refusal(404, text, code="flag_not_found", param="flags")
        for name, on in asked.flags.items():
            self._engine.flags.switch(name, on, f"{caller.identity}: {reason}")
        self._until = 0.0  # the next look shows it
        return self._listed()

    def _listed(self) -> Response:
        return answer(msgspec.json.encode(self._engine.flags.described()))

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

    def _check(self, request: Request) -> Caller:
        """Return who asks. Raises Refusal 401 or 403 unless it may see and change what concerns all users."""
        caller = self._keys.caller(request.headers.get("authorization"))
        if not caller.names_users:
            text = "this API key is one user's; operations need a key of WHISPER_FAST_TRUSTED_API_KEYS"
            raise Refusal(403, text, code="operations_not_allowed")
        return caller


def answer(body: bytes) -> Response:
    return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")
