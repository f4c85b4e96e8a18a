"""An OpenAI-compatible server as a source of completions."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from whisper_fast.deadline import NEVER, Deadline
from whisper_fast.errors import Closed, LLMRejected, LLMTimeout, WhisperFastError
from whisper_fast.message import Delta

from .pieces import PieceReader
from .silence import Silence
from .tokens import Tokens
from .transport import Transport
from .wire import completion, encoded, first_model, request

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    import aiohttp

    from whisper_fast.message import ChatMessage, Usage

    from .completion import Completion
    from .endpoint import Endpoint

__all__ = ["OpenAIProvider"]

CHAT = "/chat/completions"


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
        self.tokens = Tokens()
        self._counts: bool | None = None  # whether the server takes stream_options; None until one was seen
        self.model = endpoint.model  # None until the server was asked
        self._asking: asyncio.Task[str | WhisperFastError] | None = None
        self._askers = 0

    def __repr__(self) -> str:
        return f"OpenAIProvider({self.endpoint!r})"

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer `messages`; `params` goes to the server as it is."""
        deadline = Deadline.after(self._timeout)
        body = encoded(request(params.get("model") or await self._known_model(deadline), messages, params))
        try:
            answer = completion(await self._transport.post(CHAT, body, deadline), self.name)
        except (asyncio.CancelledError, LLMTimeout):
            self.tokens.settle(len(body), 0, None)  # what the server had done by then nobody will say
            raise
        usage = self.tokens.settle(len(body), size(answer), answer.usage)
        return answer if usage is answer.usage else msgspec.structs.replace(answer, usage=usage)

    async def stream(self, messages: Sequence[ChatMessage], **params: Any) -> AsyncGenerator[Delta, None]:
        """Answer `messages` piece by piece; the count of tokens comes with the last piece.

        The time that the reader takes between two pieces counts towards the timeout.
        """
        async with aclosing(self.batches(messages, **params)) as batches:
            async for pieces in batches:
                for piece in pieces:
                    yield piece

    async def batches(
        self, messages: Sequence[ChatMessage], spent: Callable[[Usage], object] | None = None, /, **params: Any
    ) -> AsyncGenerator[list[Delta], None]:
        """Answer `messages` as `stream` does, all pieces that came in one network read at once, at least one.

        Until the reader takes the next ones the server is held back: at most two read buffers of bytes wait here.
        `spent` is told the usage of a stream that did not come to its end.
        """
        deadline, limits = Deadline.after(self._timeout), self.endpoint.timeouts
        body = request(params.get("model") or await self._known_model(deadline), messages, params)
        first = Deadline.after(limits.first_token)
        sent, response = await self._begin(deadline, first, {**body, "stream": True}, params.get("stream_options"))
        reader, silence, counted = PieceReader(self.name), Silence(response, self.name), False
        try:
            silence.expect("the first token", None if first is NEVER else first.remaining())
            while not reader.over and reader.failure is None:
                events = reader.events
                pieces = reader.feed(await self._transport.part(response))
                if reader.over and reader.failure is None:
                    counted = True
                    self._count(sent, reader, pieces)
                if pieces:
                    silence.rest()
                    yield pieces
                if reader.events != events:
                    silence.expect("the next token", limits.between_tokens)
            if reader.failure is not None:
                raise reader.failure
            await self._transport.finish(response)
        finally:
            silence.end()
            response.close()
            if not counted:
                usage = self.tokens.settle(sent, reader.size, reader.usage)
                if spent is not None:
                    spent(usage)

    def _count(self, sent: int, reader: PieceReader, pieces: list[Delta]) -> None:
        """Book a stream's tokens; an estimate becomes the last of `pieces`."""
        usage = self.tokens.settle(sent, reader.size, reader.usage)
        if usage is not reader.usage:
            pieces.append(Delta(usage=usage))

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
        self, deadline: Deadline, first: Deadline, body: dict[str, Any], options: dict[str, Any] | None
    ) -> tuple[int, aiohttp.ClientResponse]:
        """Send a streaming request that asks for the count of tokens, or one that does not where that is refused.

        Returns the bytes that were sent, and the answer.
        """
        if self._counts is not False:
            try:
                counting = encoded({**body, "stream_options": {"include_usage": True, **(options or {})}})
                response = await self._opened(counting, deadline, first)
            except LLMRejected as error:
                if self._counts or error.status not in (400, 422):
                    raise
            else:
                self._counts = True
                return len(counting), response
        plain = encoded(body)
        response = await self._opened(plain, deadline, first)
        self._counts = False  # the same request was taken without the option
        return len(plain), response

    async def _opened(self, body: bytes, deadline: Deadline, first: Deadline) -> aiohttp.ClientResponse:
        """Send a streaming request and return its answer; a prompt that was left unanswered counts."""
        try:
            return await self._transport.ask(CHAT, deadline, body, begun_by=first)
        except (asyncio.CancelledError, LLMTimeout):
            self.tokens.settle(len(body), 0, None)
            raise

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


def size(answer: Completion) -> int:
    """Return the bytes of an answer's text and tool calls."""
    return len(answer.text.encode()) + (len(msgspec.json.encode(answer.tool_calls)) if answer.tool_calls else 0)
