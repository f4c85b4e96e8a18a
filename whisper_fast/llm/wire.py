"""The OpenAI chat protocol as it is on the wire: decoded and validated in one pass, or a typed error."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any

import msgspec

from whisper_fast.errors import (
    InvalidMessage,
    LLMError,
    LLMProtocolError,
    LLMRateLimited,
    LLMRejected,
    LLMTimeout,
    LLMUnavailable,
)
from whisper_fast.message import ChatMessage, Delta, Usage

from .completion import Completion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["completion", "delta", "encoded", "first_model", "refusal", "request", "retry_after"]

# The only words of a server that our errors repeat: anything else might echo a prompt or a key.
CODES = frozenset(
    {
        "billing_hard_limit_reached",
        "content_policy_violation",
        "context_length_exceeded",
        "insufficient_quota",
        "invalid_api_key",
        "invalid_request_error",
        "model_not_found",
        "rate_limit_exceeded",
        "server_error",
        "unsupported_parameter",
        "unsupported_value",
    }
)


class Failure(msgspec.Struct):
    code: Any = None
    type: Any = None


class Piece(msgspec.Struct):
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(msgspec.Struct):
    message: Piece | None = None
    delta: Piece | None = None
    finish_reason: str | None = None
    index: int = 0


class Counted(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def usage(self) -> Usage:
        return Usage(self.prompt_tokens or 0, self.completion_tokens or 0)


class Answer(msgspec.Struct):
    choices: list[Choice] = []
    usage: Counted | None = None
    model: str | None = None
    error: Failure | str | None = None


class Model(msgspec.Struct):
    id: str


class Models(msgspec.Struct):
    data: list[Model]


ANSWER = msgspec.json.Decoder(Answer)
MODELS = msgspec.json.Decoder(Models)


def encoded(body: Mapping[str, Any]) -> bytes:
    """Return the request's JSON; raises InvalidMessage, which repeats nothing of it."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        raise InvalidMessage("the request holds a lone surrogate; it cannot be written as UTF-8") from None
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise InvalidMessage("the request holds something that cannot be written as JSON") from None


def answer(data: bytes, where: str) -> Answer:
    """Decode a whole answer or one event; raises what the server's error object says, or LLMProtocolError."""
    try:
        decoded = ANSWER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise LLMProtocolError(f"{where}: what it answered is not a chat completion") from None
    if decoded.error is not None:
        code = decoded.error.code if isinstance(decoded.error, Failure) else None
        raise refusal(code if isinstance(code, int) and 400 <= code < 600 else 500, where, data)
    return decoded


def completion(data: bytes, where: str) -> Completion:
    """Return the completion that the body `data` holds; raises LLMError."""
    found = answer(data, where)
    first = next((choice for choice in found.choices if choice.index == 0), None)
    if first is None or first.message is None:
        raise LLMProtocolError(f"{where}: its answer holds no message")
    return Completion(
        text=first.message.content or "",
        finish_reason=first.finish_reason or "stop",
        tool_calls=tuple(first.message.tool_calls or ()),
        usage=found.usage.usage() if found.usage else Usage(),
        model=found.model or "",
    )


def delta(data: bytes, where: str) -> Delta | None:
    """Return the piece that the event `data` holds, None for one that brings nothing; raises LLMError."""
    found = answer(data, where)
    text, tool_calls, reason = "", None, None
    for choice in found.choices:
        if choice.index == 0:
            reason = choice.finish_reason
            if choice.delta is not None:
                text, tool_calls = choice.delta.content or "", choice.delta.tool_calls
    if not (text or tool_calls or reason or found.usage):
        return None
    usage = found.usage.usage() if found.usage else None
    return Delta(text, finish_reason=reason, tool_calls=tool_calls or (), usage=usage)


def first_model(data: bytes, where: str) -> str:
    """Return the first model of a `/v1/models` answer, embedding models left out; raises LLMError."""
    try:
        names = [model.id for model in MODELS.decode(data).data]
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise LLMProtocolError(f"{where}: what it answered is not a list of models") from None
    for name in names:
        if name and "embed" not in name.lower():
            return name
    raise LLMRejected(f"{where}: it serves no chat model; load one there")


def refusal(status: int, where: str, data: bytes, wait: float | None = None) -> LLMError:
    """Return the error for an answer with that status (not 2xx); `data` is the beginning of its body."""
    text = f"{where}: it answered {status}{reason(data)}"
    if status == 429:
        return LLMRateLimited(text, status=status, retry_after=wait)
    if status == 408:
        return LLMTimeout(text, status=status)
    if status >= 500:
        return LLMUnavailable(text, status=status, retry_after=wait)
    if status in (401, 403):
        return LLMRejected(f"{text}; is the API key right?", status=status)
    if status == 404:
        return LLMRejected(f"{text}; are the address and the model right?", status=status)
    if status >= 400:
        return LLMRejected(text, status=status)
    return LLMProtocolError(f"{text}, which is never followed; give the final address", status=status)


def reason(data: bytes) -> str:
    """Return the server's own code in brackets, if it is one that we know."""
    try:
        failure = ANSWER.decode(data).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    if not isinstance(failure, Failure):
        return ""
    return next(
        (f" ({word})" for word in (failure.code, failure.type) if isinstance(word, str) and word in CODES), ""
    )


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which gives them or an HTTP date; None for anything else.

    >>> retry_after("2")
    2.0
    """
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, OverflowError):
        return None


def request(model: str, messages: Sequence[ChatMessage], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a plain request."""
    body = {"messages": messages, **params, "model": model}
    body.pop("stream", None)
    body.pop("stream_options", None)
    return body
