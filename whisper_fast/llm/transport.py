"""HTTP to one server through aiohttp: bounded, never redirected, with typed errors that repeat no secret."""

from __future__ import annotations

import asyncio
import errno
from contextlib import nullcontext
from typing import TYPE_CHECKING

from whisper_fast.deadline import NEVER
from whisper_fast.errors import (
    Closed,
    LLMError,
    LLMProtocolError,
    LLMTimeout,
    LLMUnavailable,
    WhisperFastError,
)

from .address import ForbiddenAddress, guarded_resolver
from .wire import refusal, retry_after

if TYPE_CHECKING:
    import aiohttp

    from whisper_fast.deadline import Deadline

    from .endpoint import Endpoint

__all__ = ["Transport"]

BODY_BYTES = 16 << 20
REFUSAL_BYTES = 64 << 10
READ_BYTES = 64 << 10  # a reader that stalls holds twice this and one network read, then the server is not read
KEEPALIVE = 30.0  # seconds that an idle connection is kept
LINGER = 0.1  # seconds that the end of a finished stream may take


class Transport:
    """One aiohttp session, opened at the first request inside the running loop.

    `post` is a whole exchange. A stream is `ask`, then `part` until it is empty, then `response.close()`.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.closed = False
        self._session: aiohttp.ClientSession | None = None
        self._broken: tuple[type[Exception], ...] = ()  # what reading from a connection may raise; known once open

    async def post(self, path: str, body: bytes, deadline: Deadline, *, max_bytes: int = BODY_BYTES) -> bytes:
        """Return the body of the 2xx answer to a POST at base_url + `path`; raises LLMError, or Closed.

        A cancelled caller's connection is closed. An answer of more than `max_bytes` is a LLMProtocolError.
        """
        deadline = deadline.sooner(self.endpoint.timeouts.first_token)
        return await self.whole(await self.ask(path, deadline, body), max_bytes)

    async def ask(
        self, path: str, deadline: Deadline, body: bytes | None = None, *, begun_by: Deadline = NEVER
    ) -> aiohttp.ClientResponse:
        """Send a request (POST where there is a body) and return its 2xx answer, which the caller closes.

        The deadline holds until the answer was read, `begun_by` until it begins. Raises LLMError, or Closed.
        """
        import aiohttp

        left = deadline.remaining()
        if left <= 0:
            raise LLMTimeout(f"{self.endpoint.base_url}: no time was left to ask it")
        session = self._session or self._open()
        try:
            async with nullcontext() if begun_by is NEVER else asyncio.timeout(begun_by.remaining()):
                response = await session.request(
                    "GET" if body is None else "POST",
                    self.endpoint.base_url + path,
                    data=body,
                    allow_redirects=False,
                    timeout=self._limits(left),
                    proxy=self.endpoint.proxy,
                )
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            failure = self._typed(error)
        else:
            if 200 <= response.status < 300:
                return response
            failure = await self._refused(response)
        raise failure  # out here, so that aiohttp's error, which holds the headers, is not even its context

    async def whole(self, response: aiohttp.ClientResponse, max_bytes: int = BODY_BYTES) -> bytes:
        """Return the body of an answer, and close it; raises LLMError."""
        try:
            parts, size = [], 0
            while part := await self.part(response):
                parts.append(part)
                size += len(part)
                if size > max_bytes:
                    raise LLMProtocolError(f"{self.endpoint.base_url}: its answer has more than {max_bytes} bytes")
            return b"".join(parts)
        finally:
            response.close()  # a body read to its end has given its connection back before

    async def part(self, response: aiohttp.ClientResponse) -> bytes:
        """Return all bytes that have come, waiting for the first; empty at the end. Raises LLMError."""
        try:
            return await response.content.readany()
        except LLMTimeout:  # a Silence's, which is an OSError too
            raise
        except self._broken as error:
            failure = self._typed(error)
        raise failure

    async def finish(self, response: aiohttp.ClientResponse) -> None:
        """Read what follows the last event, so that the connection can serve the next call."""
        if response.content.at_eof():
            return
        try:
            async with asyncio.timeout(LINGER):
                while await self.part(response):
                    pass
        except (TimeoutError, LLMError):
            return  # then the caller's close ends the connection

    async def close(self) -> None:
        """Close all connections."""
        self.closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp
        from aiohttp.http_exceptions import HttpProcessingError

        if self.closed:
            raise Closed(f"{self.endpoint.base_url}: the provider is closed")
        self._broken = (aiohttp.ClientError, HttpProcessingError, OSError)
        headers = {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": "whisper-fast",
        }
        if self.endpoint.api_key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the pool limits
                keepalive_timeout=KEEPALIVE,
                ssl=self.endpoint.trust() or True,
                resolver=None if self.endpoint.allow_link_local else guarded_resolver(),
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            read_bufsize=READ_BYTES,
            trust_env=False,
        )
        return self._session

    def _limits(self, left: float) -> aiohttp.ClientTimeout:
        import aiohttp

        return aiohttp.ClientTimeout(
            total=None if left == float("inf") else left,
            connect=self.endpoint.timeouts.connect,
            ceil_threshold=float("inf"),
        )

    async def _refused(self, response: aiohttp.ClientResponse) -> LLMError:
        wait = retry_after(response.headers.get("Retry-After"))
        data = b""
        try:
            while len(data) < REFUSAL_BYTES and (part := await self.part(response)):
                data += part
        except LLMError:
            pass  # the status says enough
        finally:
            response.close()
        return refusal(response.status, self.endpoint.base_url, data[:REFUSAL_BYTES], wait)

    def _typed(self, error: Exception) -> WhisperFastError:
        """Return ours for aiohttp's error, whose own text may hold the request's headers."""
        import aiohttp

        where = self.endpoint.base_url
        if self.closed:
            return Closed(f"{where}: the provider was closed during this call")
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return LLMUnavailable(f"{where}: it did not accept a connection in time")
        if isinstance(error, TimeoutError):
            return LLMTimeout(f"{where}: it did not answer in time")
        if isinstance(error, aiohttp.ClientSSLError):
            return LLMUnavailable(f"{where}: no secure connection, its certificate or protocol was not accepted")
        if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ForbiddenAddress):
            return LLMUnavailable(f"{where}: {error.os_error}")
        if isinstance(error, aiohttp.ClientConnectorError):
            return LLMUnavailable(
                f"{where}: nobody answers there ({errno.errorcode.get(error.errno or 0, 'no address')})"
            )
        if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | OSError):
            return LLMUnavailable(f"{where}: the connection broke off")
        return LLMProtocolError(f"{where}: what it answered is not HTTP")
