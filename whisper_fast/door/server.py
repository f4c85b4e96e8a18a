"""The server: opens the engine, listens, and stops in order."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from ..deadline import NEVER, Deadline
from ..engine import Engine
from ..errors import SettingsError
from .app import build
from .auth import Keys, check_exposure
from .guard import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.applications import Starlette

    from ..settings import Settings

__all__ = ["serve"]

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TICK = 0.1  # seconds; uvicorn counts on ten a second
ANSWERS_SHARE = 5 / 6  # of the time to stop; the rest is for closing the engine


async def serve(
    settings: Settings,
    *,
    llm: Any = None,
    ready: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or `stop`; `ready` is called with the address once requests are answered.

    Stopping takes at most `settings.drain_seconds` in all. No new connection is taken meanwhile; an answer that is
    not finished after five sixths of it ends with an error event, and its message is left to the next start. A
    second signal leaves everything unfinished to the next start at once; a third one ends the process. Raises
    SettingsError when the address cannot be used, or would stand open without API keys.
    """
    check_exposure(settings, Keys.of(settings), is_loopback(settings.host))
    stop = stop or asyncio.Event()
    hurry = asyncio.Event()
    with closing(listener(settings.host, settings.port)) as sock, stopped_by_signals(stop, hurry):
        async with Engine.open(settings, llm=llm) as engine:
            server = Server(build(engine, settings), stop, settings.drain_seconds * ANSWERS_SHARE)
            hastened = asyncio.create_task(hasten(hurry, engine, server), name="door-hurry")
            if ready is not None:
                server.announce = lambda: ready(address_of(sock))
            try:
                await server.serve(sockets=[sock])
                await engine.drain(max(0.0, server.remaining()))
            except asyncio.CancelledError:
                server.drain_seconds = 0
                await server.shutdown([sock])
                raise
            finally:
                hastened.cancel()


async def hasten(hurry: asyncio.Event, engine: Engine, server: Server) -> None:
    """End every answer and every turn when `hurry` is set; their messages stay in the journal."""
    await hurry.wait()
    server.end_answers()
    engine.hurry()


class Server(uvicorn.Server):
    """A uvicorn server that stops when an event is set and gives the answers under way a last word."""

    def __init__(self, app: Starlette, stop: asyncio.Event, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self.announce: Callable[[], None] = lambda: None
        self.drain_seconds = drain_seconds
        self._end = NEVER
        self._answers = app.state.answers
        self._viewers = app.state.viewers
        self._stop = stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, then announce it."""
        await super().startup(sockets)
        self.announce()

    async def main_loop(self) -> None:
        """Tick as uvicorn does (for its Date header) until it is time to stop, which is noticed at once."""
        counter = 0
        while not self._stop.is_set() and not await self.on_tick(counter):
            counter += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await self._stop.wait()

    def remaining(self) -> float:
        """Return the seconds that are left for answers and turns; endless before the end has begun."""
        return self._end.remaining()

    def end_answers(self) -> None:
        """End the answers under way now, each with a proper last word."""
        self._answers.end()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listener, let nobody look any more, wait for the answers, end those that take too long."""
        self._viewers.end()
        self._end = Deadline.after(self.drain_seconds)
        last = asyncio.get_running_loop().call_later(self.drain_seconds, self._answers.end)
        try:
            await super().shutdown(sockets)
        finally:
            last.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `serve`, which holds them while the engine opens and drains as well."""
        yield


def listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address; raises SettingsError that names the setting at fault."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"WHISPER_FAST_PORT is {port}: another program listens there; stop it or choose another port"
        elif error.errno == errno.EACCES:
            what = f"WHISPER_FAST_PORT is {port}: this user may not listen there; choose one above 1023"
        else:
            what = f"WHISPER_FAST_HOST is {host!r}: this machine cannot listen there ({error})"
        raise SettingsError(what) from None


def address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def stopped_by_signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """Set `stop` at the first SIGTERM or SIGINT, `hurry` at the second; the third ends the process.

    A process that was told to stop and has done so ends with 0: a SIGTERM that comes while it leaves is ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    told = False

    def signalled() -> None:
        nonlocal told
        told = True
        if not stop.is_set():
            log.info("stopping; answers under way are finished first")
            stop.set()
            return
        log.info("stopping at once; what is not finished is left to the next start")
        hurry.set()
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, signalled)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN if told and number == signal.SIGTERM else handler)
