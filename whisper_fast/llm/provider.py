"""An OpenAI-compatible server as a source of completions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from whisper_fast.deadline import NEVER, Deadline
from whisper_fast.errors import Closed, LLMProtocolError, LLMRejected, LLMTimeout, WhisperFastError

from .sse import EventReader
from .transport import Transport
from .wire import completion, delta, encoded, first_model, request

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    import aiohttp

    from whisper_fast.message import ChatMessage, Delta

    from .completion import Completion
    from .endpoint import Endpoint

__all__ = ["OpenAIProvider"]

CHAT = "/chat/completions"
DONE = b"[DONE]"


class OpenAIProvider:
    """Chat completions of the server at `endpoint`; `timeout` in seconds spans a whole call, None is no limit.

    Redirects are never followed and an answer over 16 MiB is a LLMProtocolError. No error, log line or repr
    repeats the key, the prompt or what the server wrote. Cancelling a call, or closing a stream before its
    end, closes its connection. Errors: LLMUnavailable, LLMRateLimited, LLMRejected, LLMTimeout,
    LLMProtocolError, InvalidMessage for a request that cannot be written as JSON, Closed after `close`.
    """

    def __init__(self, endpoint: Endpoint, *, timeout: float | None = 90.0) -> None:
        self.endpoint = endpoint
        self.name = endpoint.base_url
        self._timeout = timeout
        self._transport = Transport(endpoint)
        self._counts: bool | None = None  # whether the server takes stream_options; None until one was seen
        self.model = endpoint.model  # None until the server was asked
        self._asking: asyncio.Task[str | WhisperFastError] | None = None
        self._askers = 0

    def __repr__(self) -> str:
        return f"OpenAIProvider({self.endpoint!r})"

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer `messages`; `params` goes to the server as it is."""
        deadline = Deadline.after(self._timeout)
        body = request(params.get("model") or await self._known_model(deadline), messages, params)
        response = await self._transport.ask(CHAT, deadline, encoded(body))
        return completion(await self._transport.whole(response), self.name)

    async def stream(self, messages: Sequence[ChatMessage], **params: Any) -> AsyncGenerator[Delta, None]:
        """Answer `messages` piece by piece; the server's count of tokens comes with the last piece.

        The time that the reader takes between two pieces counts towards the timeout.
        """
        deadline = Deadline.after(self._timeout)
        body = request(params.get("model") or await self._known_model(deadline), messages, params)
        response = await self._begin(deadline, {**body, "stream": True}, params.get("stream_options") or {})
        events, finished, data = EventReader(), False, b"-"
        try:
            while data:
                data = await self._transport.part(response)
                for event in events.feed(data) if data else events.end():
                    if event == DONE:
                        await self._transport.finish(response)
                        return
                    if (piece := delta(event, self.name)) is not None:
                        finished = finished or piece.finish_reason is not None
                        yield piece
        finally:
            response.close()
        if not finished:
            raise LLMProtocolError(f"{self.name}: its stream ended before the answer did")

    async def ask_model(self) -> str:
        """Return the endpoint's model, or else the server's first; it is asked once, however many wait for it."""
        return await self._known_model(Deadline.after(self._timeout))

    async def close(self) -> None:
        """Close all connections; calls under way end with an error. May be called twice."""
        await self._transport.close()
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _begin(
        self, deadline: Deadline, body: dict[str, Any], options: dict[str, Any]
    ) -> aiohttp.ClientResponse:
        """Send a streaming request that asks for the count of tokens, or one that does not where that is refused."""
        if self._counts is not False:
            try:
                counting = {**body, "stream_options": {"include_usage": True, **options}}
                response = await self._transport.ask(CHAT, deadline, encoded(counting))
            except LLMRejected as error:
                if self._counts or error.status not in (400, 422):
                    raise
            else:
                self._counts = True
                return response
        response = await self._transport.ask(CHAT, deadline, encoded(body))
        self._counts = False  # the same request was taken without the option
        return response

    async def _known_model(self, deadline: Deadline) -> str:
        """Return the model; all who ask at once share one request, which ends when the last of them leaves."""
        if self.model is not None:
            return self.model
        if self._asking is None or not self._askers:
            self._asking = asyncio.create_task(self._ask_model(deadline), name="llm-model")
        asking = self._asking
        self._askers += 1
        try:
            await asyncio.wait([asking], timeout=None if deadline is NEVER else max(0.0, deadline.remaining()))
        finally:
            self._askers -= 1
            if not self._askers:
                asking.cancel()  # harmless when it has finished
        if not asking.done():
            raise LLMTimeout(f"{self.name}: it did not say in time which models it serves")
        if asking.cancelled():
            raise Closed(f"{self.name}: the provider was closed")
        found = asking.result()
        if isinstance(found, WhisperFastError):
            raise found.copy()
        return found

    async def _ask_model(self, deadline: Deadline) -> str | WhisperFastError:
        """Return the server's first model, or the error for each asker to raise a copy of."""
        try:
            response = await self._transport.ask("/models", deadline)
            self.model = first_model(await self._transport.whole(response), self.name)
        except WhisperFastError as error:
            return error
        return self.model
