"""Keeps strange web pages out: the Host header (DNS rebinding) and the Origin header of every request."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders

from .refusal import Refusal, on_refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "is_loopback"]

READING = frozenset({"GET", "HEAD", "OPTIONS"})


def is_loopback(host: str) -> bool:
    """Return whether `host` names this machine only: `localhost` or a loopback address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split(url: str) -> SplitResult:
    """Return the parts of `url`, all of them empty where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


class Guard:
    """ASGI middleware that refuses what only a web page of somebody else would send.

    A page can make its own name resolve to 127.0.0.1 and then talk to a server there as if it were its own; the Host
    header still carries the page's name. So with `loopback` only names of this machine are answered. A request that
    changes something and carries an `Origin` must come from our own page. No CORS header is ever sent.
    """

    def __init__(self, app: ASGIApp, loopback: bool) -> None:
        self._app = app
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            self._check(scope["method"], Headers(scope=scope))
        except Refusal as refusal:
            answer = await on_refusal(None, refusal)
            return await answer(scope, receive, sealed)
        return await self._app(scope, receive, sealed)

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        if self._loopback and not is_loopback(split(f"//{host}").hostname or ""):
            raise Refusal(
                403,
                "this server only answers to localhost, 127.0.0.1 and [::1]; the Host header names something else",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if method not in READING and origin is not None and split(origin.lower()).netloc != host:
            raise Refusal(403, "requests from web pages of other origins are refused", code="origin_not_allowed")
