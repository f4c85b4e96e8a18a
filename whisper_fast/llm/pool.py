"""Many callers, few slots: the pool admits, times, retries and falls back, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from whisper_fast.errors import Closed, LLMError, Overloaded, SettingsError

from .call import Call
from .endpoint import Endpoint
from .provider import OpenAIProvider
from .route import Route
from .slots import Slots

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence
    from types import TracebackType
    from typing import Self

    from whisper_fast.message import ChatMessage, Delta

    from .completion import ChatProvider, Completion

__all__ = ["LLMPool"]

UNWIND = 5.0  # seconds that interrupted calls have to give back what they hold


class Upstream:
    """One endpoint as the pool sees it: who answers, how many at once, and how it went."""

    __slots__ = ("calls", "errors", "provider", "slots")

    def __init__(self, source: Endpoint | ChatProvider, max_concurrent: int, max_waiting: int) -> None:
        self.calls = 0
        self.errors: Counter[str] = Counter()
        if isinstance(source, Endpoint):
            self.provider: ChatProvider = OpenAIProvider(source, timeout=None)  # the pool's budget is the limit
            max_concurrent = source.max_concurrent or max_concurrent
        else:
            self.provider = source
        self.slots = Slots(max_concurrent, max_waiting)

    def stats(self) -> dict[str, Any]:
        slots = self.slots
        return {
            "name": self.provider.name,
            "in_flight": slots.in_flight,
            "limit": slots.limit,
            "waiting": slots.waiting,
            "calls": self.calls,
            "errors": dict(self.errors),
        }


class LLMPool:
    """Language models in order of preference, each with `max_concurrent` slots.

    A source is an Endpoint or anything that is a ChatProvider; the pool closes them with itself. A call waits
    for its slot at most `queue_timeout` seconds (None: as long as it takes), then has `timeout` seconds for
    everything else: connecting, the first token, the last token, retries. See `Route` for which errors are
    tried again.

        async with LLMPool([Endpoint("http://127.0.0.1:1234"), SimulatedLLM()], max_concurrent=50) as pool:
            completion = await pool.chat([{"role": "user", "content": "hi"}])

    Errors of a call: Overloaded when `max_waiting` calls wait already, DeadlineExceeded when no slot became
    free, LLMTimeout when the time was used up, Closed when the pool was closed, and the other LLMErrors of
    the providers.
    """

    def __init__(
        self,
        sources: Sequence[Endpoint | ChatProvider],
        *,
        max_concurrent: int = 50,
        timeout: float = 90.0,
        queue_timeout: float | None = 90.0,
        max_waiting: int = 100_000,
    ) -> None:
        if not sources:
            raise SettingsError("a pool needs at least one endpoint")
        if max_concurrent < 1:
            raise SettingsError(f"max_concurrent is {max_concurrent}; it must be at least 1")
        self._upstreams = [Upstream(source, max_concurrent, max_waiting) for source in sources]
        self._timeout = timeout
        self._queue_timeout = queue_timeout
        self._calls: set[Call] = set()
        self._closed = False

    @property
    def limit(self) -> int:
        """How many calls may be in flight at once, over all endpoints."""
        return sum(upstream.slots.limit for upstream in self._upstreams)

    @property
    def models(self) -> tuple[str, ...]:
        """The models in order of preference, as far as they are known; a server's own choice is once it was asked."""
        models = (getattr(upstream.provider, "model", upstream.provider.name) for upstream in self._upstreams)
        return tuple(dict.fromkeys(model for model in models if model))

    async def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        user: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **params: Any,
    ) -> Completion:
        """Return the answer to `messages`; smaller `priority` is served first, equal ones in order of arrival.

        `user` says whose call it is; it stays in this process. `params` goes to the model as it is.
        """
        call, route = self._begin(timeout)
        try:
            while True:
                upstream = self._take(route) or await self._admit(call, route, priority)
                call.arm()
                try:
                    with call:
                        return await upstream.provider.chat(messages, **params)
                except LLMError as error:
                    upstream.errors[type(error).__name__] += 1
                    pause = route.failed(error, call.left)
                finally:
                    upstream.slots.release()
                await self._pause(call, pause)
        finally:
            self._end(call)

    async def stream(
        self,
        messages: Sequence[ChatMessage],
        *,
        user: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **params: Any,
    ) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece, as `chat` otherwise; after the first piece nothing is tried again.

        Whoever stops before the end should `aclose()` the iterator: that ends the call upstream and frees its
        slot.
        """
        call, route = self._begin(timeout)
        try:
            while True:
                upstream = self._take(route) or await self._admit(call, route, priority)
                call.arm()
                begun = False
                pieces = upstream.provider.stream(messages, **params)
                try:
                    while True:
                        with call:  # only in here the call may be interrupted
                            piece = await anext(pieces)
                        begun = True
                        yield piece
                except StopAsyncIteration:
                    return
                except LLMError as error:
                    upstream.errors[type(error).__name__] += 1
                    if begun:
                        raise
                    pause = route.failed(error, call.left)
                finally:
                    try:
                        await finish(pieces)
                    finally:
                        upstream.slots.release()
                await self._pause(call, pause)
        finally:
            self._end(call)

    def stats(self) -> dict[str, Any]:
        """Return in_flight, limit, waiting, calls and errors (class name -> count), in all and per endpoint.

        `calls` and `errors` count attempts at an endpoint: a call that was tried again counts twice.
        """
        endpoints = [upstream.stats() for upstream in self._upstreams]
        total: dict[str, Any] = {
            key: sum(endpoint[key] for endpoint in endpoints) for key in ("in_flight", "limit", "waiting", "calls")
        }
        errors = sum((upstream.errors for upstream in self._upstreams), Counter[str]())
        return total | {"errors": dict(errors), "endpoints": endpoints}

    async def close(self) -> None:
        """End every call with Closed, close the providers; returns when nothing is left. May be called twice."""
        self._closed = True
        for upstream in self._upstreams:
            upstream.slots.close()
        for call in self._calls:
            call.strike(Closed("the pool was closed during this call"))
        inside = [left for call in self._calls if (left := call.outside()) is not None]
        if inside:
            await asyncio.wait(inside, timeout=UNWIND)
        for upstream in self._upstreams:
            await upstream.provider.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _begin(self, timeout: float | None) -> tuple[Call, Route]:
        if self._closed:
            raise Closed("the pool is closed")
        call = Call(self._timeout if timeout is None else timeout)
        self._calls.add(call)
        return call, Route(len(self._upstreams))

    def _take(self, route: Route) -> Upstream | None:
        """Take a slot of the route's endpoint if one is free; return the endpoint."""
        upstream = self._upstreams[route.at]
        if not upstream.slots.take():
            return None
        upstream.calls += 1
        return upstream

    async def _admit(self, call: Call, route: Route, priority: int) -> Upstream:
        """Take a slot of the route's endpoint, or of a later one where that is overloaded; return the endpoint."""
        while True:
            upstream = self._upstreams[route.at]
            try:
                await upstream.slots.acquire(priority, self._queue_timeout)
            except Overloaded as error:
                route.failed(error, call.left)
            else:
                upstream.calls += 1
                return upstream

    async def _pause(self, call: Call, seconds: float) -> None:
        """Wait within the call's budget, holding no slot, before it queues again."""
        if seconds:
            with call:
                await asyncio.sleep(seconds)
        call.disarm()

    def _end(self, call: Call) -> None:
        call.end()
        self._calls.discard(call)


async def finish(pieces: AsyncIterator[Delta]) -> None:
    """Close a stream that may not have been read to its end."""
    close = getattr(pieces, "aclose", None)
    if close is not None:
        await close()
