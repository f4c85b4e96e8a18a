"""What a faulty language model does on the wire instead of answering: real bytes, real silence, real resets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from whisper_fast.llm import ChatProvider, Completion
    from whisper_fast.message import Usage

__all__ = [
    "BEFORE",
    "FAULTS",
    "MALFORMED",
    "STATUS",
    "TWELVE",
    "answered",
    "asked",
    "half",
    "huge",
    "pieces",
    "refusal",
]

FAULTS: Final = {
    "refuse": "takes no connection; drops the ones that it has",
    "hang": "takes the request and never answers",
    "cut": "drops the connection in the middle of the answer",
    "drip": "sends one byte a second",
    "rate_limited": "answers 429, with Retry-After where `retry_after` is set",
    "error": "answers 500",
    "bad_sse": "sends an event that is not of the protocol; a plain answer is of the wrong shape",
    "bad_json": "sends half a JSON document",
    "bad_utf8": "sends bytes that are not UTF-8",
    "huge": "sends a body of 100 MB, as one endless stream of pieces where a stream was asked for",
    "redirect": "answers 307 with the address of /elsewhere",
    "certificate": "shows a certificate for another name (with `secure`); drops a connection that stands already",
    "reset": "drops the connection before it answers",
    "end": "ends a stream in order, but before the answer is complete",
    "rejected": "answers 401 and repeats the key and the prompt",
    "invalid": "answers 400 to every request",
    "no_options": "answers 400 to a request with stream_options, as servers do that do not know them",
}
"""What a fault may be, and what the server then does with a chat request."""

TWELVE: Final = tuple(FAULTS)[:12]
"""The faults that every caller must stand, in the order of the list above."""

STATUS: Final = {"rate_limited": 429, "error": 500, "rejected": 401, "invalid": 400, "no_options": 400}
HUGE: Final = 100_000_000
MIB: Final = bytes(b"x" * (1 << 20))
MALFORMED: Final = {
    "bad_sse": b'{"choices": 7}',
    "bad_json": b'{"choices": [{"message": {"content": "ha',
    "bad_utf8": b'{"choices": [{"message": {"content": "\xff\xfe"}, "delta": {"content": "\xff\xfe"}}]}',
}


def asked(body: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the provider's call for a request's body."""
    return {name: value for name, value in body.items() if name not in ("model", "stream", "stream_options")}


def answered(answer: Completion) -> bytes:
    """Return the plain answer of the protocol."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.tool_calls:
        message["tool_calls"] = list(answer.tool_calls)
    return msgspec.json.encode(
        {
            "id": "chatcmpl-faulty",
            "object": "chat.completion",
            "model": answer.model,
            "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
            "usage": counted(answer.usage),
        }
    )


def counted(usage: Usage) -> dict[str, int]:
    """Return the protocol's form of a usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


async def events(llm: ChatProvider, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yield the answer as server-sent events, to [DONE]; with the usage where the request asks for it."""
    head = {"id": "chatcmpl-faulty", "object": "chat.completion.chunk", "model": llm.name}
    usage, role = None, {"role": "assistant"}
    async for piece in llm.stream(**asked(body)):
        delta = role | ({"content": str(piece)} if piece else {})
        role = {}
        yield event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": piece.finish_reason}]})
        usage = piece.usage or usage
    if usage is not None and (body.get("stream_options") or {}).get("include_usage"):
        yield event(head | {"choices": [], "usage": counted(usage)})
    yield b"data: [DONE]\n\n"


def event(chunk: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def refusal(request: web.Request, body: dict[str, Any], status: int, retry_after: str | None) -> web.Response:
    """Answer with an error that repeats the key and the prompt, as some servers do."""
    headers = {"Retry-After": retry_after} if retry_after else {}
    text = f"wrong: {request.headers.get('Authorization')} {body['messages']}"
    return web.json_response({"error": {"message": text, "code": text}}, status=status, headers=headers)


async def pieces(
    request: web.Request, llm: ChatProvider, body: dict[str, Any], fault: str | None
) -> web.StreamResponse:
    """Stream the answer of `llm`; a fault strikes at its third event."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    number = 0
    async for data in events(llm, body):
        if not number:
            await response.prepare(request)
        if number == 2 and fault == "end":
            return response
        if number == 2 and fault == "cut":
            return dropped(request, response)
        if number == 2 and fault in MALFORMED:
            data = b"data: " + MALFORMED[fault] + b"\n\n"
        await (drip if fault == "drip" else sent)(response, data)
        number += 1
        if number == 3 and fault == "huge":
            await flood(response, data * (len(MIB) // len(data)))
    return response


async def flood(response: web.StreamResponse, data: bytes) -> None:
    """Send `data` again and again, 100 MB in all."""
    for _ in range(HUGE // len(data)):
        await response.write(data)
        await asyncio.sleep(0)  # a write to a client that has gone may return at once: let its leaving be seen


async def sent(response: web.StreamResponse, data: bytes) -> None:
    """Send an event at once."""
    await response.write(data)


async def drip(response: web.StreamResponse, data: bytes) -> None:
    """Send data one byte a second."""
    for byte in data:
        await response.write(bytes((byte,)))
        await asyncio.sleep(1.0)


def dropped(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Drop the connection under an answer."""
    if request.transport is not None:
        request.transport.abort()
    return response


async def half(request: web.Request, body: bytes, *, dripping: bool) -> web.StreamResponse:
    """Send half of a plain answer and drop the connection, or send all of it one byte a second."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
    await response.prepare(request)
    if dripping:
        await drip(response, body)
        return response
    await response.write(body[: len(body) // 2])
    return dropped(request, response)


async def reset(request: web.Request) -> web.StreamResponse:
    """Drop the connection before any answer."""
    return dropped(request, web.Response())


async def hang(request: web.Request) -> web.StreamResponse:
    """Never answer; ends when the client leaves."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody completes this future")


async def redirect(request: web.Request) -> web.StreamResponse:
    """Point to /elsewhere, which would answer."""
    return web.Response(status=307, headers={"Location": "/elsewhere"})


async def huge(request: web.Request) -> web.StreamResponse:
    """Send 100 MB that no JSON needs."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    await flood(response, MIB)
    return response


BEFORE: Final[dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = {
    "refuse": reset,
    "certificate": reset,
    "reset": reset,
    "hang": hang,
    "redirect": redirect,
}
"""The faults that strike before the model is asked, streamed or not; those of a connection end it."""
