"""An OpenAI-compatible server on loopback whose model is simulated, and whose faults are real.

`python -m whisper_fast.lab.serving --port 8000` starts one in a process of its own. In a test:

    async with FaultyLLM(SimulatedLLM(0.05)) as server, LLMPool([Endpoint(server.url)]) as pool:
        async with server.suffering("cut"):
            ...
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter, deque
from contextlib import asynccontextmanager
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from whisper_fast.errors import LLMError
from whisper_fast.llm import Completion, SimulatedLLM

from .faults import BEFORE, FAULTS, MALFORMED, STATUS, TWELVE, answered, asked, half, huge, pieces, refusal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType
    from typing import Self

    from whisper_fast.llm import ChatProvider

    from .certificates import Certificates

__all__ = ["FAULTS", "TWELVE", "FaultyLLM", "mixture"]

JSON = "application/json"


class FaultyLLM:
    """A server that answers with `llm`; `fault` (a key of FAULTS, or None) holds for all chat requests.

    `faults` is taken first, one per request, then `draw()` where it is set. `retry_after` is the header's text. With
    `secure` it speaks TLS. It counts `requests` by path, `struck` by fault, the requests now `open`, and the times
    `aborted_at` (monotonic clock) at which the client left one; `seen` holds the latest bodies. Port 0 takes a free
    one. GET /faulty gives the counters, POST /faulty {"fault": ..., "mix": ..., "seed": ...} sets what is suffered;
    one that refuses is told the next fault over a connection that stands.
    """

    def __init__(
        self,
        llm: ChatProvider | None = None,
        *,
        models: Sequence[str] = ("faulty-model",),
        host: str = "127.0.0.1",
        port: int = 0,
        fault: str | None = None,
        secure: Certificates | None = None,
    ) -> None:
        self.llm = llm or SimulatedLLM()
        self.models = list(models)
        self.host = host
        self.port = port
        self.fault = fault
        self.faults: deque[str | None] = deque()
        self.draw = nothing
        self.retry_after: str | None = None
        self.requests: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.open = 0
        self.aborted_at: deque[float] = deque(maxlen=1 << 16)
        self.seen: deque[dict[str, Any]] = deque(maxlen=256)
        self.secure = secure
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None

    @property
    def url(self) -> str:
        """The address to give an Endpoint."""
        return f"http{'s' if self.secure else ''}://{self.host}:{self.port}/v1"

    @property
    def aborted(self) -> int:
        """Requests that the client left before they were answered, up to 65,536."""
        return len(self.aborted_at)

    @property
    def connections(self) -> int:
        """Connections that stand now."""
        server = self._runner.server if self._runner is not None else None
        return len(server.connections) if server is not None else 0

    def stats(self) -> dict[str, Any]:
        """Return the counters."""
        return {
            "requests": dict(self.requests),
            "struck": dict(self.struck),
            "open": self.open,
            "connections": self.connections,
            "aborted_at": list(self.aborted_at),
        }

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._count], client_max_size=256 << 20)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_route("*", "/elsewhere", self._elsewhere)
        app.router.add_get("/faulty", self._tell)
        app.router.add_post("/faulty", self._set)
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
        assert self._runner is not None, "the server was not entered"  # noqa: S101 - a test's own mistake
        self._site = web.TCPSite(
            self._runner, self.host, self.port, reuse_address=True, ssl_context=self._context(), backlog=4096
        )
        await self._site.start()
        self.port = self._runner.addresses[0][1]

    async def refuse(self) -> None:
        """Take no more connections, so that new ones are refused; `listen` ends it."""
        if self._site is not None:
            await self._site.stop()
            self._site = None

    @asynccontextmanager
    async def suffering(self, fault: str | None) -> AsyncIterator[None]:
        """Hold `fault` for all chat requests, also one that concerns the connection, until the block ends."""
        await self.suffer(fault)
        try:
            yield
        finally:
            await self.suffer(None)

    async def suffer(self, fault: str | None) -> None:
        """Hold `fault` from now on, None for none."""
        self.fault = fault
        if fault == "refuse":
            await self.refuse()
        elif self._site is None:
            await self.listen()

    def _context(self) -> ssl.SSLContext | None:
        return self.secure.choosing(self._shows_wrong_certificate) if self.secure is not None else None

    def _shows_wrong_certificate(self) -> bool:
        if self.fault != "certificate":
            return False
        self.struck["certificate"] += 1
        return True

    def _next_fault(self) -> str | None:
        fault = self.faults.popleft() if self.faults else (self.fault or self.draw())
        if fault is not None:
            self.struck[fault] += 1
        return fault

    @web.middleware
    async def _count(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests[request.path] += 1
        self.open += 1
        try:
            answer: web.StreamResponse = await handler(request)
        except LLMError as error:
            return web.json_response({"error": {"message": str(error)}}, status=error.status or 502)
        except ConnectionError:  # it had gone before the server was told
            self.aborted_at.append(monotonic())
            return web.Response(status=499)
        except asyncio.CancelledError:
            self.aborted_at.append(monotonic())
            raise
        finally:
            self.open -= 1
        return answer

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _elsewhere(self, request: web.Request) -> web.Response:
        return plain(Completion(text="from elsewhere"))

    async def _tell(self, request: web.Request) -> web.Response:
        return web.json_response(self.stats())

    async def _set(self, request: web.Request) -> web.Response:
        asked = await request.json()
        fault = asked.get("fault")
        if fault is not None and fault not in FAULTS:
            return web.json_response({"error": f"there is no such fault; there are {', '.join(FAULTS)}"}, status=400)
        self.draw = mixture(asked.get("mix", 0), asked.get("seed", 0))
        await self.suffer(fault)
        return web.json_response({"fault": fault})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        self.seen.append(body)
        fault = self._next_fault()
        if fault == "no_options" and "stream_options" not in body:
            fault = None
        if fault in STATUS:
            return refusal(request, body, STATUS[fault], self.retry_after)
        if fault in BEFORE:
            return await BEFORE[fault](request)
        if body.get("stream"):
            return await pieces(request, self.llm, body, fault)
        return await self._whole(request, body, fault)

    async def _whole(self, request: web.Request, body: dict[str, Any], fault: str | None) -> web.StreamResponse:
        if fault == "huge":
            return await huge(request)
        if fault in MALFORMED:
            return web.Response(body=MALFORMED[fault], content_type=JSON)
        answer = await self.llm.chat(**asked(body))
        if fault in ("cut", "drip"):
            return await half(request, answered(answer), dripping=fault == "drip")
        return plain(answer)


def plain(answer: Completion) -> web.Response:
    return web.Response(body=answered(answer), content_type=JSON)


def nothing() -> str | None:
    """Draw no fault."""
    return None


def mixture(share: float, seed: int = 0, faults: Sequence[str] = TWELVE) -> Any:
    """Return a function that draws one of `faults` for that share (0 to 1) of the requests, and None otherwise."""
    rng = Random(seed)

    def draw() -> str | None:
        return rng.choice(faults) if rng.random() < share else None

    return draw
