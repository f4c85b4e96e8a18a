"""An OpenAI-compatible server on loopback whose model is simulated, and whose faults are real.

`python -m whisper_fast.lab.stub --port 8000` starts one. In a test:

    async with Stub(SimulatedLLM(0.05)) as stub, LLMPool([Endpoint(stub.url)]) as pool:
        stub.fault = "cut"
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from whisper_fast.errors import LLMError
from whisper_fast.llm import Completion, SimulatedLLM

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType
    from typing import Self

    from whisper_fast.llm import ChatProvider
    from whisper_fast.message import Usage

__all__ = ["FAULTS", "Stub"]

FAULTS: Final = {
    "reset": "drops the connection before it answers",
    "hang": "takes the request and never answers",
    "cut": "drops the connection in the middle of the answer",
    "end": "ends a stream in order, but before the answer is complete",
    "drip": "sends a stream one byte a second",
    "rate_limited": "answers 429, with Retry-After where `retry_after` is set",
    "error": "answers 500",
    "rejected": "answers 401 and repeats the key and the prompt",
    "invalid": "answers 400 to every request",
    "no_options": "answers 400 to a request with stream_options, as servers do that do not know them",
    "bad_sse": "sends an event that is not JSON; a plain answer is of the wrong shape",
    "bad_json": "sends half a JSON document",
    "bad_utf8": "sends bytes that are not UTF-8",
    "huge": "sends a body of 100 MB",
    "redirect": "answers 307 with the address of /elsewhere",
}
"""What `Stub.fault` may be, and what the server then does with a chat request."""

STATUS = {"rate_limited": 429, "error": 500, "rejected": 401, "invalid": 400, "no_options": 400}
HUGE = 100_000_000
MIB = bytes(b"x" * (1 << 20))
MALFORMED = {
    "bad_sse": b'{"choices": 7}',
    "bad_json": b'{"choices": [{"message": {"content": "ha',
    "bad_utf8": b'{"choices": [{"message": {"content": "\xff\xfe"}, "delta": {"content": "\xff\xfe"}}]}',
}


class Stub:
    """A server that answers with `llm`; `fault` (a key of FAULTS, or None) holds for all chat requests.

    `faults` is taken first, one per request. `retry_after` is the header's text. It counts `requests` by path, the
    ones now `open`, and those `aborted` by the client; `seen` holds the latest bodies. Port 0 takes a free one.
    """

    def __init__(
        self,
        llm: ChatProvider | None = None,
        *,
        models: Sequence[str] = ("stub-model",),
        host: str = "127.0.0.1",
        port: int = 0,
        fault: str | None = None,
    ) -> None:
        self.llm = llm or SimulatedLLM()
        self.models = list(models)
        self.host = host
        self.port = port
        self.fault = fault
        self.faults: deque[str | None] = deque()
        self.retry_after: str | None = None
        self.requests: Counter[str] = Counter()
        self.open = 0
        self.aborted = 0
        self.seen: deque[dict[str, Any]] = deque(maxlen=256)
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None

    @property
    def url(self) -> str:
        """The address to give an Endpoint."""
        return f"http://{self.host}:{self.port}/v1"

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._count], client_max_size=256 << 20)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_route("*", "/elsewhere", self._elsewhere)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def listen(self) -> None:
        """Take connections, on the same port as before."""
        assert self._runner is not None, "the stub was not entered"  # noqa: S101 - a test's own mistake
        self._site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True)
        await self._site.start()
        self.port = self._runner.addresses[0][1]

    async def refuse(self) -> None:
        """Take no more connections, so that new ones are refused; `listen` ends it."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    @web.middleware
    async def _count(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests[request.path] += 1
        self.open += 1
        try:
            answer: web.StreamResponse = await handler(request)
        except LLMError as error:
            return web.json_response({"error": {"message": str(error)}}, status=error.status or 502)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.open -= 1
        return answer

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _elsewhere(self, request: web.Request) -> web.Response:
        return answered(Completion(text="from elsewhere"))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        self.seen.append(body)
        fault = self.faults.popleft() if self.faults else self.fault
        if fault == "no_options":
            fault = fault if "stream_options" in body else None
        if fault in STATUS:
            return self._refusal(request, body, STATUS[fault])
        if fault in BEFORE:
            return await BEFORE[fault](request)
        if body.get("stream"):
            return await self._pieces(request, body, fault)
        if fault in MALFORMED:
            return web.Response(body=MALFORMED[fault], content_type="application/json")
        answer = await self.llm.chat(**asked(body))
        if fault == "cut":
            return await half(request, answer)
        return answered(answer)

    def _refusal(self, request: web.Request, body: dict[str, Any], status: int) -> web.Response:
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        text = f"wrong: {request.headers.get('Authorization')} {body['messages']}"
        return web.json_response({"error": {"message": text, "code": text}}, status=status, headers=headers)

    async def _pieces(self, request: web.Request, body: dict[str, Any], fault: str | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        number = 0
        async for event in events(self.llm, body):
            if not number:
                await response.prepare(request)
            if number == 2 and fault == "end":
                return response
            if number == 2 and fault == "cut":
                return dropped(request, response)
            if number == 2 and fault in MALFORMED:
                event = b"data: " + MALFORMED[fault] + b"\n\n"
            await (drip if fault == "drip" else sent)(response, event)
            number += 1
        return response


def asked(body: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the provider's call for a request's body."""
    return {name: value for name, value in body.items() if name not in ("model", "stream", "stream_options")}


def answered(answer: Completion) -> web.Response:
    """Return the plain answer of the protocol."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.tool_calls:
        message["tool_calls"] = list(answer.tool_calls)
    body = {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "model": answer.model,
        "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
        "usage": counted(answer.usage),
    }
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def counted(usage: Usage) -> dict[str, int]:
    """Return the protocol's form of a usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


async def events(llm: ChatProvider, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yield the answer as server-sent events, to [DONE]; with the usage where the request asks for it."""
    head = {"id": "chatcmpl-stub", "object": "chat.completion.chunk", "model": llm.name}
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


async def sent(response: web.StreamResponse, data: bytes) -> None:
    """Send an event at once."""
    await response.write(data)


async def drip(response: web.StreamResponse, data: bytes) -> None:
    """Send an event one byte a second."""
    for byte in data:
        await response.write(bytes((byte,)))
        await asyncio.sleep(1.0)


def dropped(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Drop the connection under an answer."""
    if request.transport is not None:
        request.transport.abort()
    return response


async def reset(request: web.Request) -> web.StreamResponse:
    """Drop the connection before any answer."""
    return dropped(request, web.Response())


async def hang(request: web.Request) -> web.StreamResponse:
    """Never answer; ends when the client leaves."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody completes this future")


async def half(request: web.Request, answer: Completion) -> web.StreamResponse:
    """Send half of a plain answer, then drop the connection."""
    body = answered(answer).body
    assert isinstance(body, bytes)  # noqa: S101 - made so a few lines above
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    return dropped(request, response)


async def redirect(request: web.Request) -> web.StreamResponse:
    """Point to /elsewhere, which would answer."""
    return web.Response(status=307, headers={"Location": "/elsewhere"})


async def huge(request: web.Request) -> web.StreamResponse:
    """Send 100 MB that no JSON needs."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for _ in range(HUGE // len(MIB)):
        await response.write(MIB)
    return response


BEFORE: Final = {"reset": reset, "hang": hang, "redirect": redirect, "huge": huge}


async def serve(stub: Stub) -> None:
    """Serve until SIGINT or SIGTERM."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with stub:
        sys.stderr.write(f"a simulated model ({stub.llm!r}) answers at {stub.url}\n")
        await stopped.wait()


def main() -> None:
    """Start a server from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m whisper_fast.lab.stub", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--latency", type=float, default=0.3, help="seconds (default 0.3)")
    parser.add_argument("--tokens", type=int, default=None, help="length of an answer (default: what it quotes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=sorted(FAULTS), default=None)
    options = parser.parse_args()
    llm = SimulatedLLM(options.latency, options.tokens, options.seed)
    asyncio.run(serve(Stub(llm, host=options.host, port=options.port, fault=options.fault)))


if __name__ == "__main__":
    main()
