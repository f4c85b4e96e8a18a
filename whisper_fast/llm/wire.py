"""The OpenAI chat protocol as it is on the wire: decoded and validated in one pass, or a typed error."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import msgspec

from whisper_fast import clock
from whisper_fast.errors import (
    InvalidMessage,
    LLMError,
    LLMMisconfigured,
    LLMProtocolError,
    LLMRateLimited,
    LLMRejected,
    LLMTimeout,
    LLMUnavailable,
)
from whisper_fast.message import ChatMessage, Usage

from .completion import Completion

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "NOTHING",
    "STREAMED",
    "Event",
    "believable",
    "completion",
    "encoded",
    "failure_of",
    "first_model",
    "refusal",
    "request",
    "retry_after",
]

# The only words of a server that our errors repeat: anything else might echo a prompt or a key.
CODES = frozenset(
    {
        "billing_hard_limit_reached",
        "content_filter",
        "content_policy_violation",
        "context_length_exceeded",
        "insufficient_quota",
        "invalid_api_key",
        "invalid_request_error",
        "model_not_found",
        "moderation_blocked",
        "rate_limit_exceeded",
        "server_error",
        "unsupported_parameter",
        "unsupported_value",
    }
)


MODERATED = frozenset({"content_filter", "content_policy_violation", "moderation_blocked"})
LONGEST_WAIT = 86400.0  # seconds that a Retry-After may ask for
MOST_COUNTED = 100_000_000  # tokens that one call can have
LIMITS = ("max_tokens", "max_completion_tokens")
MOST_TOKENS = (1 << 31) - 1  # servers count in 32 bits


class Failure(msgspec.Struct, gc=False):
    """What a server says went wrong; `metadata` of a moderated prompt names `reasons` (OpenRouter's form)."""

    code: Any = None
    type: Any = None
    metadata: Any = None

    @property
    def word(self) -> str | None:
        """The server's own code, if it is one that we know."""
        return next((w for w in (self.code, self.type) if isinstance(w, str) and w in CODES), None)

    @property
    def moderated(self) -> bool:
        """Whether it was the prompt's content that was refused, not the key."""
        named = isinstance(self.metadata, dict) and bool(self.metadata.get("reasons"))
        return named or self.word in MODERATED


class Piece(msgspec.Struct, frozen=True, gc=False):
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


NOTHING = Piece()


class Choice(msgspec.Struct, gc=False):
    message: Piece | None = None
    finish_reason: str | None = None
    index: int = 0


def believable(sent: int, received: int) -> bool:
    """Say whether a call can have had so many tokens: a server's other counts are its mistake."""
    return 0 <= sent <= MOST_COUNTED and 0 <= received <= MOST_COUNTED


class Counted(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def usage(self) -> Usage:
        """Return the counts, or none at all where they cannot be true: then they are estimated."""
        sent, received = self.prompt_tokens or 0, self.completion_tokens or 0
        return Usage(sent, received) if believable(sent, received) else Usage()


class Answer(msgspec.Struct, gc=False):
    choices: list[Choice] = []
    usage: Counted | None = None
    model: str | None = None
    error: Failure | str | None = None


class Change(msgspec.Struct, gc=False):
    delta: Piece | None = NOTHING
    finish_reason: str | None = None
    index: int = 0


class Event(msgspec.Struct, gc=False):
    """One event of a stream."""

    choices: tuple[Change, ...] | None = ()
    usage: Counted | None = None
    error: Failure | str | None = None


class Model(msgspec.Struct):
    id: str


class Models(msgspec.Struct):
    data: list[Model]


ANSWER = msgspec.json.Decoder(Answer)
STREAMED = msgspec.json.Decoder(Event)
MODELS = msgspec.json.Decoder(Models)


def encoded(body: Mapping[str, Any]) -> bytes:
    """Return the request's JSON; raises InvalidMessage, which repeats nothing of it."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        problem = "a lone surrogate; it cannot be written as UTF-8"
    except (TypeError, ValueError, OverflowError, RecursionError):
        problem = "something that cannot be written as JSON"
    raise InvalidMessage(f"the request holds {problem}")  # out here: the context of an error would hold the text


def failure_of(error: Failure | str, where: str, data: bytes) -> LLMError:
    """Return the error for an answer `data` that holds the error object `error` in spite of its status 200."""
    code = error.code if isinstance(error, Failure) else None
    return refusal(code if isinstance(code, int) and 400 <= code < 600 else 500, where, data)


def completion(data: bytes, where: str) -> Completion:
    """Return the completion that the body `data` holds; raises LLMError."""
    try:
        found = ANSWER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise LLMProtocolError(f"{where}: what it answered is not a chat completion") from None
    if found.error is not None:
        raise failure_of(found.error, where, data)
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


def first_model(data: bytes, where: str) -> str:
    """Return the first model of a `/v1/models` answer, embedding models left out; raises LLMError."""
    try:
        names = [model.id for model in MODELS.decode(data).data]
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise LLMProtocolError(f"{where}: what it answered is not a list of models") from None
    for name in names:
        if name and "embed" not in name.lower():
            return name
    raise LLMMisconfigured(f"{where}: it serves no chat model; load one there")


def refusal(status: int, where: str, data: bytes, wait: float | None = None) -> LLMError:
    """Return the error for an answer with that status (not 2xx); `data` is the beginning of its body."""
    failure = failure_in(data)
    text = f"{where}: it answered {status}" + (f" ({failure.word})" if failure.word else "")
    if status == 429:
        return LLMRateLimited(text, status=status, retry_after=wait)
    if status == 408:
        return LLMTimeout(text, status=status)
    if status >= 500:
        return LLMUnavailable(text, status=status, retry_after=wait)
    if status == 403 and failure.moderated:
        return LLMRejected(f"{text}: its moderation refused what was said", status=status)
    if status in (401, 403):
        return LLMMisconfigured(f"{text}; is the API key right?", status=status)
    if status == 402:
        return LLMMisconfigured(f"{text}; is the account in credit?", status=status)
    if status == 404:
        return LLMMisconfigured(f"{text}; are the address and the model right?", status=status)
    if status >= 400:
        return LLMRejected(text, status=status)
    return LLMProtocolError(f"{text}, which is never followed; give the final address", status=status)


def failure_in(data: bytes) -> Failure:
    """Return the error object of an answer, an empty one where there is none that we understand."""
    try:
        failure = ANSWER.decode(data).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Failure()
    return failure if isinstance(failure, Failure) else Failure()


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which gives them or an HTTP date; None for anything else.

    More than a day is taken for a day, so that no message waits for ever for a server's mistake.

    >>> retry_after("2")
    2.0
    """
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return min(float(value), LONGEST_WAIT)
    try:
        return min(max(0.0, parsedate_to_datetime(value).timestamp() - clock.wall()), LONGEST_WAIT)
    except (ValueError, OverflowError):
        return None


def request(model: str, messages: Sequence[ChatMessage], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a plain request; raises InvalidMessage for what no server can take."""
    check_messages(messages)
    for name in LIMITS:
        if name in params:
            check_limit(name, params[name])
    body = {"messages": messages, **params, "model": model}
    body.pop("stream", None)
    body.pop("stream_options", None)
    return body


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise InvalidMessage unless `messages` is a list of objects that each name a role; it repeats no text."""
    if not isinstance(messages, list | tuple):
        raise InvalidMessage(f"messages is {type(messages).__name__}; it must be a list of messages")
    if not messages:
        raise InvalidMessage("messages is empty; there is nothing to answer")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            found = "has no role" if isinstance(message, dict) else f"is {type(message).__name__}"
            raise InvalidMessage(f'messages[{number}] {found}; it looks like {{"role": "user", "content": "hi"}}')


def check_limit(name: str, value: Any) -> None:
    """Raise InvalidMessage unless `value`, the answer's limit in tokens, is None or a count that a server takes."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS):
        return
    raise InvalidMessage(f"{name} is {value!r:.40}; it must be a whole number from 1 to {MOST_TOKENS}")
