"""Commands that talk: `serve` for programs and browsers, `chat` for a person at a terminal."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..message import Message
from .terminal import DataDir, Json, configure_logging, console, emit, load_settings, run

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine import Engine
    from ..message import Reply
    from ..settings import Settings

__all__ = ["chat", "serve"]


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (default: WHISPER_FAST_HOST or 127.0.0.1).")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port, 0 for a free one (default: WHISPER_FAST_PORT or 8765).")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Serve the OpenAI protocol and a chat page until SIGTERM or Ctrl-C.

    Example: whisper-fast serve --port 9000

    With --json the object (url, pid, data_dir) is printed once requests are answered.
    """
    from ..door.server import serve as serve_door

    configure_logging(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # it announces itself beside our own line
    settings = load_settings(host=host, port=port, data_dir=data_dir)

    def ready(url: str) -> None:
        if as_json:
            emit({"url": url, "pid": os.getpid(), "data_dir": str(settings.data_dir)})
        else:
            console().print(f"Chat page: [bold]{url}/[/]   for OpenAI clients: {url}/v1", soft_wrap=True)

    run(serve_door(settings, ready=ready))


def chat(
    text: Annotated[str | None, typer.Argument(help="Say this one thing and end.")] = None,
    user: Annotated[str, typer.Option(help="Who is talking: each user has a memory of their own.")] = "me",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Talk in the terminal; an empty line or Ctrl-D ends it.

    Example: whisper-fast chat "What did I tell you about my cat?"

    With --json TEXT (or else all of stdin) is one message, and its reply is printed as an object.
    """
    configure_logging()
    settings = load_settings(data_dir=data_dir)
    if as_json and text is None:
        text = sys.stdin.read()
    run(talk(settings, user, text, as_json))


async def talk(settings: Settings, user: str, text: str | None, as_json: bool) -> None:
    from ..engine import Engine

    async with Engine.open(settings) as engine:
        if as_json:
            emit(plain(await engine.respond(message(user, text or ""))))
        elif text is not None:
            await say(engine, message(user, text), console())
        else:
            await converse(engine, user, console())


def message(user: str, text: str) -> Message:
    return Message(user=user, text=text, channel="terminal", platform="cli")


async def converse(engine: Engine, user: str, screen: Console) -> None:
    import asyncio

    screen.print(f"[dim]{engine.llm_description} An empty line ends the conversation.[/]")
    while True:
        try:
            text = await asyncio.to_thread(screen.input, "[bold cyan]you[/] ")
        except EOFError:
            return
        if not text.strip():
            return
        await say(engine, message(user, text), screen)


async def say(engine: Engine, spoken: Message, screen: Console) -> None:
    """Print the answer as it comes, then what was recalled and how long it took."""
    screen.print("[bold green]bot[/] ", end="")
    stream = engine.stream(spoken)
    try:
        async for delta in stream:
            screen.print(delta, end="", markup=False, soft_wrap=True)
    finally:
        await stream.aclose()
    screen.print()
    if stream.reply is not None:
        screen.print(footnote(stream.reply), style="dim", markup=False)


def footnote(reply: Reply) -> str:
    parts = [f"{len(reply.memories)} memories"]
    if reply.emotion:
        parts.append("valence {:+.2f}".format(reply.emotion.get("valence", 0.0)))
    if reply.partial:
        parts.append("missing: " + ", ".join(reply.partial))
    if "llm" in reply.timings:
        parts.append(f"model {reply.timings['llm'] * 1000:.0f} ms")
    return " · ".join(parts)


def plain(reply: Reply) -> dict[str, Any]:
    import msgspec

    return msgspec.to_builtins(reply)  # type: ignore[no-any-return]
