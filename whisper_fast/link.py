"""The parent's end of one worker process: what it is at, its two arenas, and the frames between."""

from __future__ import annotations

import asyncio
import marshal
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .worker import LENGTH, RUNNING, framed, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable

    from .arena import Inbox, Outbox, Piece

__all__ = ["Link"]


class Link(asyncio.Protocol):
    """One worker. `answered(link, good, outcome, peak, wall)` is called for each answer, `lost(link)` at its end."""

    def __init__(
        self,
        pid: int,
        outbox: Outbox,
        inbox: Inbox,
        answered: Callable[[Link, bool, Any, int, float], None],
        lost: Callable[[Link], None],
    ) -> None:
        self.pid = pid
        self.outbox = outbox
        self.call: Any = None  # what it is at
        self.closing = False
        self.killed = False
        self._inbox = inbox
        self._answered = answered
        self._lost = lost
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()

    def send(
        self, number: int, data: bytes | None, pieces: list[Piece], *, main: dict[str, str] | None = None
    ) -> None:
        """Hand a call to the worker; `main` is where the program's main module is, if the call needs it."""
        assert self._transport is not None  # noqa: S101 - a link that has no transport yet is given no call
        self._transport.write(framed(number, data, pieces, self._inbox.take_returned(), main))

    def began(self, number: int) -> bool:
        """Whether the worker has begun the call `number`."""
        return bool(RUNNING.unpack_from(self._inbox.mapping)[0] == number)

    def kill(self) -> None:
        """End the worker at once."""
        if not self.killed:
            self.killed = True
            with suppress(ProcessLookupError):  # it was faster; the connection says so in a moment
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let an idle worker end."""
        self.closing = True
        if self._transport is not None:
            self._transport.close()

    # ---- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._received += data
        while len(self._received) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            frame = bytes(self._received[LENGTH.size : end])
            del self._received[:end]
            self._take(frame)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._lost(self)
        self.outbox.close()
        self._inbox.close()

    def _take(self, frame: bytes) -> None:
        _, data, pieces, taken_back, peak, wall = marshal.loads(frame)  # noqa: S302 - our own worker wrote it
        self.outbox.free(taken_back)
        try:
            good, outcome = unpacked(data, pieces, self._inbox)
        except Exception as error:  # noqa: BLE001 - the constructor of a user's class may refuse what it was given
            good, outcome = False, error
        self._answered(self, good, outcome, peak, wall)
