"""The web application: routes in the OpenAI protocol, probes, metrics and the chat page, over one engine."""

from __future__ import annotations

from base64 import b64encode
from time import time
from typing import TYPE_CHECKING, Any, cast

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from ..errors import WhisperFastError
from . import metrics, page
from .answers import Answers, EventStream
from .auth import Keys, check_exposure
from .body import decoded, read
from .guard import Guard, is_loopback
from .openai import MODEL, ChatRequest, Chunks, EmbeddingRequest, completion, message_of, model_list
from .ops import Operations
from .refusal import Refusal, on_error, on_refusal, on_unexpected

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from ..engine import Engine
    from ..message import Message, Reply
    from ..settings import Settings

__all__ = ["build"]


def build(engine: Engine, settings: Settings) -> Starlette:
    """Return the application that answers for `engine`.

    `app.state.answers` holds the answers under way, `app.state.viewers` the pages that look at operations.

    Raises SettingsError when it would stand open to other machines without API keys.
    """
    keys, loopback = Keys.of(settings), is_loopback(settings.host)
    check_exposure(settings, keys, loopback)
    door = Door(engine, settings, keys)
    operations = Operations(engine, keys)
    routes = door.routes() + operations.routes() + page.routes()
    paths = frozenset(route.path for route in routes)
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(metrics.Metered, requests=door.requests, paths=paths),
            Middleware(Guard, loopback=loopback),
        ],
        exception_handlers={WhisperFastError: on_error, HTTPException: on_refusal, Exception: on_unexpected},
    )
    app.router.redirect_slashes = False
    app.state.answers = door.answers
    app.state.viewers = operations.viewers
    return app


class Door:
    """What the routes share: the engine, the keys and the counters. Nothing here belongs to one request."""

    def __init__(self, engine: Engine, settings: Settings, keys: Keys) -> None:
        self.engine = engine
        self.settings = settings
        self.keys = keys
        self.answers = Answers()
        self.requests = metrics.Requests()
        self.born = int(time())
        self.registry = metrics.registry(engine.stats, self.requests, engine.record)

    def routes(self) -> list[Route]:
        """Return the routes of the protocol, of the probes and of the metrics."""
        measured = [Route("/metrics", self.measure)] if self.settings.performance_monitoring_enabled else []
        return [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/embeddings", self.embed, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/healthz", self.healthy),
            Route("/readyz", self.ready),
            *measured,
        ]

    async def complete(self, request: Request) -> Response:
        """Answer one message, in one piece or streamed."""
        caller = self.keys.caller(request.headers.get("authorization"))
        asked, fields = decoded(await read(request), ChatRequest)
        check_model(asked.model, self._models())
        message = message_of(
            asked,
            fields,
            user=caller.user(named(request, "x-user-id", asked.user)),
            channel=named(request, "x-channel-id", "default"),
            scope=named(request, "x-scope", "dm"),
            **({"id": key, "strict": True} if (key := named(request, "idempotency-key")) is not None else {}),
        )
        check_size(message, self.settings.max_text_bytes)
        if asked.stream:
            chunks = Chunks(message, model=asked.model, created=int(time()), include_usage=asked.include_usage)
            return EventStream(self._events(message, chunks), self.answers)
        async with self.answers.one():
            reply = await self.engine.respond(message)
        return as_json(completion(reply, model=asked.model, created=int(time())))

    async def _events(self, message: Message, chunks: Chunks) -> AsyncGenerator[bytes, None]:
        stream = self.engine.stream(message)
        opening = chunks.first()
        try:
            async for delta in stream:
                if piece := chunks.piece(delta):
                    yield opening + piece
                    opening = b""
            yield opening + chunks.last(cast("Reply", stream.reply))  # there once the pieces have ended
        finally:
            await stream.aclose()

    async def embed(self, request: Request) -> Response:
        """Embed texts with the model that memories are embedded with."""
        self.keys.caller(request.headers.get("authorization"))
        asked, _ = decoded(await read(request), EmbeddingRequest)
        embedder = self.engine.embedder
        check_model(asked.model, [MODEL, embedder.name])
        check_embedding(asked, embedder.dimension)
        rows = await self.engine.embed(asked.texts)
        as_asked = packed if asked.encoding_format == "base64" else plain
        data = [{"object": "embedding", "index": i, "embedding": as_asked(row)} for i, row in enumerate(rows)]
        used = sum(map(estimated, asked.texts))
        usage = {"prompt_tokens": used, "total_tokens": used}
        return as_json({"object": "list", "data": data, "model": embedder.name, "usage": usage})

    async def models(self, request: Request) -> Response:
        """List the names that a request may ask for."""
        self.keys.caller(request.headers.get("authorization"))
        names = [*self._models(), self.engine.embedder.name]
        return as_json({"object": "list", "data": model_list(names, self.born)})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        self.keys.caller(request.headers.get("authorization"))
        name = request.path_params["name"]
        check_model(name, [*self._models(), self.engine.embedder.name])
        return as_json(model_list([name], self.born)[0])

    async def healthy(self, _: Request) -> Response:
        """Say that the process lives."""
        return as_json({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Say whether messages are taken, 503 and the reasons if not."""
        state = {**self.engine.ready()}
        if not self.keys:  # who may ask without a key sits at this machine
            state["llm"] = self.engine.llm_description
        else:  # anybody may ask, and the sentences name the data folder
            state = {
                key: told if told in (True, False, "ok") else "see the server's log" for key, told in state.items()
            }
        if self.answers.ended:
            state |= {"ready": False, "stopping": True}
        return as_json(state, 200 if state["ready"] else 503)

    async def measure(self, request: Request) -> Response:
        """Give all counters; with keys configured it needs one, as a scraper's bearer token."""
        self.keys.caller(request.headers.get("authorization"))
        text, content_type = metrics.exposition(self.registry, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    def _models(self) -> list[str]:
        return [MODEL, *(name for name in self.engine.llm.models if name != MODEL)]


def check_model(name: str, known: list[str]) -> None:
    if name not in known:
        there = ", ".join(known)
        message = f"the model {name!r:.200} does not exist here; there are {there}"
        raise Refusal(404, message, code="model_not_found", param="model")


def check_size(message: Message, limit: int) -> None:
    size = len(message.text.encode(errors="replace"))
    if size > limit:
        text = f"the message has {size} bytes of text; at most {limit} are allowed"
        raise Refusal(413, text, code="message_too_large", param="messages")


def check_embedding(asked: EmbeddingRequest, dimension: int) -> None:
    if asked.dimensions not in (None, dimension):
        text = f"dimensions is {asked.dimensions}; this model has {dimension}"
        raise Refusal(400, text, code="unsupported_value", param="dimensions")
    if not all(asked.texts):
        raise Refusal(400, "input holds an empty string", code="invalid_value", param="input")


def estimated(text: str) -> int:
    """Return a text's tokens, at 4 bytes each, as the prompt counts them too."""
    return -(-len(text.encode(errors="replace")) // 4)


def named(request: Request, header: str, default: Any = None) -> Any:
    """Return a header that names something, in UTF-8, else `default`; raises Refusal 400 for other bytes."""
    value = request.headers.get(header)
    if value is None:
        return default
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"the header {header} is not UTF-8", code="invalid_header", param=header) from None


def plain(row: Any) -> list[float]:
    return [float(x) for x in row]


def packed(row: Any) -> str:
    return b64encode(row.astype("<f4").tobytes()).decode("ascii")


def as_json(body: Any, status: int = 200) -> Response:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return Response(content, status, {"cache-control": "no-store"}, media_type="application/json")
