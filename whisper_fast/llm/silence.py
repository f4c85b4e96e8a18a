"""How long a server may say nothing of use while somebody waits for its next piece."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from whisper_fast import clock
from whisper_fast.errors import LLMTimeout

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Silence"]


class Silence:
    """Ends the wait for a stream's next piece with LLMTimeout once the time given with `expect` is over.

    `expect` only notes a time: one timer serves the whole stream, and when it fires early it is set again, so a
    piece costs one look at the clock. The time that the reader takes between two pieces does not count.
    """

    __slots__ = ("_at", "_due", "_response", "_seconds", "_timer", "_what", "_where")

    def __init__(self, response: aiohttp.ClientResponse, where: str) -> None:
        self._response = response
        self._where = where
        self._at = float("inf")
        self._seconds = 0.0
        self._what = ""
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def expect(self, what: str, seconds: float | None) -> None:
        """Allow `seconds` from now, None for any time; `what` is awaited, for the error."""
        if seconds is None:
            self._at = float("inf")
            return
        self._at, self._seconds, self._what = clock.monotonic() + seconds, seconds, what
        if self._timer is None or self._due > self._at:
            self._set(seconds)

    def rest(self) -> None:
        """Allow any time until the next `expect`: nobody waits for the server."""
        self._at = float("inf")

    def end(self) -> None:
        """Stop for good."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, seconds: float) -> None:
        self.end()
        self._due = clock.monotonic() + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        left = self._at - clock.monotonic()
        if left == float("inf"):
            return
        if left > 0:
            self._set(left)
            return
        text = f"{self._where}: {self._what} did not come within {self._seconds:g} s"
        self._response.content.set_exception(LLMTimeout(text))
        self._response.close()
