"""The OpenAI protocol's shapes: a request becomes a Message, a Reply becomes a completion or its chunks.

The last user message of a request is the message. System and developer parts, wherever they stand, are for this turn
only. Of the others, those before the message are the recent conversation (when there are none, the stored one is
used), those after it (tool calls and their results) continue the turn and reach the model after the message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..message import Message
from .refusal import Refusal

if TYPE_CHECKING:
    from ..message import ChatMessage, Delta, Recalled, Reply, Usage

__all__ = ["MODEL", "ChatRequest", "Chunks", "EmbeddingRequest", "completion", "message_of", "model_list", "sse"]

MODEL = "whisper-fast"
"""The model name that always answers here."""

DONE = b"data: [DONE]\n\n"
SYSTEM = ("system", "developer")


class Line(msgspec.Struct):
    """One message of a request, as far as the door must understand it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(msgspec.Struct):
    """What a stream should carry besides the text."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct):
    """The fields of `POST /v1/chat/completions` that the door itself acts on; all others go to the model."""

    messages: Annotated[list[Line], msgspec.Meta(min_length=1)]
    model: str = MODEL
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    store: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class EmbeddingRequest(msgspec.Struct):
    """The fields of `POST /v1/embeddings`."""

    input: str | Annotated[list[str], msgspec.Meta(min_length=1, max_length=2048)]
    model: str = MODEL
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """The input as a list."""
        return [self.input] if isinstance(self.input, str) else self.input


def message_of(request: ChatRequest, fields: dict[str, Any], **named: Any) -> Message:
    """Return the Message that a request asks; `named` are the fields that come from its headers.

    Raises Refusal 400 for `n` other than 1 and for a request without words of a user.
    """
    if request.n not in (None, 1):
        text = f"n is {request.n}; one answer at a time is given, so only 1 is allowed"
        raise Refusal(400, text, code="unsupported_value", param="n")
    lines: list[ChatMessage] = fields["messages"]
    last = max((i for i, line in enumerate(request.messages) if line.role == "user"), default=None)
    if last is None:
        raise Refusal(400, "messages hold none of role user", code="missing_user_message", param="messages")
    text, parts = words(request.messages[last].content, f"messages[{last}].content")
    return Message(
        text=text,
        parts=parts,
        history=talk(lines[:last]) or None,
        continuation=talk(lines[last + 1 :]),
        system=tuple(line for line in lines if line["role"] in SYSTEM),
        parameters={name: value for name, value in fields.items() if name not in ChatRequest.__struct_fields__},
        remember=request.store is not False,
        platform="http",
        **named,
    )


def talk(lines: list[ChatMessage]) -> tuple[ChatMessage, ...]:
    return tuple(line for line in lines if line["role"] not in SYSTEM)


def words(content: str | list[dict[str, Any]] | None, place: str) -> tuple[str, tuple[dict[str, Any], ...]]:
    """Return the text of a user's content, its text parts joined by newlines, and its other parts."""
    if not isinstance(content, list):
        return content or "", ()
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "a part of type text holds no string `text`", code="invalid_type", param=place)
    return "\n".join(map(str, texts)), tuple(part for part in content if part.get("type") != "text")


def recalled(memory: Recalled) -> dict[str, Any]:
    return {"id": memory.id, "text": memory.text, "score": memory.score, "at": memory.at, "scope": memory.scope}


def extra(reply: Reply) -> dict[str, Any]:
    """Return what the OpenAI protocol has no place for: the object `whisper_fast` of every answer."""
    return {
        "user": reply.user,
        "emotion": reply.emotion,
        "memories": [recalled(memory) for memory in reply.memories],
        "partial": reply.partial,
        "timings": reply.timings,
    }


def usage_of(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def completion(reply: Reply, *, model: str, created: int) -> bytes:
    """Return a `chat.completion` as JSON."""
    answer: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.tool_calls:
        answer |= {"content": reply.text or None, "tool_calls": reply.tool_calls}
    choice = {"index": 0, "message": answer, "logprobs": None, "finish_reason": reply.finish_reason}
    return msgspec.json.encode(
        {
            "id": f"chatcmpl-{reply.id}",
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [choice],
            "usage": usage_of(reply.usage),
            "whisper_fast": extra(reply),
        }
    )


def sse(data: bytes) -> bytes:
    """Return one server-sent event."""
    return b"data: %b\n\n" % data


class Chunks:
    """The `chat.completion.chunk` events of one streamed answer.

    `whisper_fast` is on the last chunk before `[DONE]`: the one with `finish_reason`, or, when usage is asked for,
    the usage chunk, whose `choices` are empty as the protocol has it.
    """

    def __init__(self, message: Message, *, model: str, created: int, include_usage: bool) -> None:
        self._shape = {
            "id": f"chatcmpl-{message.id}",
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
        }
        self._usage = {"usage": None} if include_usage else {}
        self._include_usage = include_usage

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sse(msgspec.json.encode({**self._shape, "choices": [choice], **self._usage, **more}))

    def first(self) -> bytes:
        """Return the chunk that opens the answer."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> bytes:
        """Return the chunk of one piece, nothing for a piece without text and tool calls."""
        body: dict[str, Any] = {"content": str(delta)} if delta else {}
        if delta.tool_calls:
            body["tool_calls"] = delta.tool_calls
        return self._chunk(body) if body else b""

    def last(self, reply: Reply) -> bytes:
        """Return the chunks that close a finished answer, with `[DONE]`."""
        whole = {"whisper_fast": extra(reply)}
        if not self._include_usage:
            return self._chunk({}, reply.finish_reason, **whole) + DONE
        usage = {**self._shape, "choices": [], "usage": usage_of(reply.usage), **whole}
        return self._chunk({}, reply.finish_reason) + sse(msgspec.json.encode(usage)) + DONE

    @staticmethod
    def broken(error: bytes) -> bytes:
        """Return the events that close an answer that failed on the way."""
        return sse(error) + DONE


def model_list(names: list[str], created: int) -> list[dict[str, Any]]:
    """Return the entries of `GET /v1/models`."""
    return [{"id": name, "object": "model", "created": created, "owned_by": MODEL} for name in names]
