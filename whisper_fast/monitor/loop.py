"""The watch on the event loop: how late it is, and which line held it when it stood still.

A beat on the loop comes every `BEAT` seconds and measures by how much it is late (uvloop's timers tick in whole
milliseconds: so fine and no finer). A thread wakes when a beat is `LIMIT` late, and only then: while the loop is well
it looks about 11 times a second. It takes the stack of the loop's thread, and the line to blame is the innermost one
that is not the standard library's. So every block of more than BEAT + LIMIT is seen, and none below LIMIT.

Waking a process that sleeps costs more than all that a beat does. After `CALM` beats in which the process did next to
nothing they come every `REST` seconds, until `wake`; what holds it out of such a rest is seen from REST + LIMIT.

A C call that keeps the interpreter to itself keeps it from the thread too; the thread then looks when the call has
just returned, and finds its line unless another thread came first: that block counts as `UNKNOWN`.

asyncio's own debug mode sees none of this on uvloop, and never says where inside a callback the time went.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import sysconfig
import threading
import time
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from .. import clock
from .._metrics import Counter, Counters, Histogram

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["LoopWatch"]

log = logging.getLogger(__name__)

BEAT: Final = 0.04  # seconds
REST: Final = 0.25
CALM: Final = 4  # beats
IDLE: Final = 0.02  # of a processor
LIMIT: Final = 0.05  # seconds that a beat may be late
SPELL: Final = 60.0  # seconds between two log lines about the same line
LINES: Final = 100  # lines that are kept apart
LIBRARY: Final = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib"))
UNKNOWN: Final = "unknown"  # the loop was found at rest again, or in nobody's code
PACKAGES: Final = ("site-packages", "dist-packages")


class LoopWatch:
    """Watches one event loop from `start` to `stop`; at rest it costs less than a thousandth of a processor.

    lag      seconds by which each beat was late
    blocks   how often each line held the loop for more than `LIMIT`; a line is `function (file.py:12)`
    seconds  for how long, in all
    pauses   how often the whole process stood still (suspended, or given no processor): no line is to blame
    """

    def __init__(self) -> None:
        self.lag = Histogram()
        self.blocks = Counters(most=LINES)
        self.seconds = Counters(most=LINES)
        self.pauses = Counter()
        self._outside: FrameType | None = None  # what runs the loop; set by the first beat
        self._due = 0.0  # when the next beat is due
        self._used = 0.0  # processor seconds of the process at the last beat
        self._pause = BEAT
        self._calm = 0  # beats in a row in which the process was idle
        self._stopping = False
        self._culprit: str | None = None  # the line that holds the loop now
        self._logged: dict[str, float] = {}
        self._handle: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._signal = threading.Lock()  # held; a release lets the thread look at once

    def start(self) -> None:
        """Begin to watch the running loop, from its own thread."""
        if self._thread is not None:
            return
        self._signal = threading.Lock()
        self._signal.acquire()
        self._stopping = False
        loop, watched = asyncio.get_running_loop(), threading.get_ident()
        self._schedule(loop)
        self._thread = threading.Thread(target=self._watch, args=(watched,), name="loop-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and the beat; what was counted stays."""
        if self._thread is None:
            return
        self._stopping = True
        self._ring()
        self._thread.join()
        self._thread = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = self._outside = None

    def wake(self) -> None:
        """Say that there is work again; on the loop. It costs next to nothing while the beats are quick."""
        if self._calm <= CALM or self._handle is None:
            return
        self._calm = 0
        self._handle.cancel()
        self._schedule(asyncio.get_running_loop())
        self._ring()

    def rests(self, frame: FrameType | None) -> bool:
        """Whether a stack of the loop's thread shows nobody's callback; until the first beat it cannot be known."""
        guilty = owner(frame)
        return self._outside is None or guilty is None or guilty is self._outside

    def stats(self) -> dict[str, Any]:
        """Return the lag in seconds, how often the loop stood still, and the lines that held it, the worst first."""
        lines = [(counter.value, self.blocks[line].value, line) for line, counter in self.seconds.items()]
        return {
            "beats": self.lag.count,
            "lag_p50": self.lag.quantile(0.5),
            "lag_p99": self.lag.quantile(0.99),
            "lag_max": self.lag.largest,
            "blocked": int(sum(counter.value for _, counter in self.blocks.items())),
            "pauses": int(self.pauses.value),
            "lines": [{"line": line, "blocks": int(n), "seconds": s} for s, n, line in sorted(lines, reverse=True)],
        }

    def _ring(self) -> None:
        """Let the thread look now; only the loop's thread releases the lock."""
        if self._signal.locked():
            self._signal.release()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        used = time.process_time()
        self._calm = self._calm + 1 if used - self._used < IDLE * self._pause else 0
        self._used = used
        self._pause = pause = BEAT if self._calm <= CALM else REST
        self._due = clock.monotonic() + pause
        self._handle = loop.call_later(pause, self._beat, loop)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        late = max(0.0, clock.monotonic() - self._due)
        if self._outside is None:
            self._outside = owner(sys._getframe(1))
        culprit, self._culprit = self._culprit, None
        if culprit is not None:
            self.seconds.inc(culprit, late)
        if culprit is None and late > 2 * LIMIT and self._stood_still(late):
            self.pauses.inc()
        else:
            self.lag.observe(late)
        self._schedule(loop)

    def _stood_still(self, late: float) -> bool:
        """Whether the process got next to no processor since the last beat."""
        return time.process_time() - self._used < late / 10

    def _watch(self, watched: int) -> None:
        """Look whenever a beat would be too late, until `stop`: the thread's whole life."""
        pause = BEAT + LIMIT
        target = clock.monotonic() + pause
        while True:
            self._signal.acquire(timeout=pause)
            if self._stopping:
                return
            due, now = self._due, clock.monotonic()
            late, overslept = now - due, now - target
            if late >= LIMIT and self._culprit is None and not (overslept > LIMIT and self._stood_still(late)):
                self._blame(watched, due)
            pause = max(0.001, LIMIT - late) if late < LIMIT else LIMIT
            target = now + pause

    def _blame(self, watched: int, due: float) -> None:
        frame = sys._current_frames().get(watched)
        if frame is None or self._due != due:  # it has just gone on
            return
        guilty = owner(frame)
        line = UNKNOWN if guilty is None or guilty is self._outside else name_of(guilty)
        self._culprit = line
        self.blocks.inc(line)
        if line != UNKNOWN:
            self._tell(line)

    def _tell(self, line: str) -> None:
        now = clock.monotonic()
        if now - self._logged.get(line, -SPELL) < SPELL:
            return
        if len(self._logged) >= LINES:
            self._logged.clear()
        self._logged[line] = now
        log.warning("the event loop was held for over %d ms by %s; every user waits meanwhile", LIMIT * 1000, line)


def owner(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame of a stack that is not the standard library's, None where all are."""
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def name_of(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({PurePath(code.co_filename).name}:{frame.f_lineno})"


def is_library(file: str) -> bool:
    if file.startswith("<frozen"):
        return True
    return file.startswith(LIBRARY) and not any(part in file for part in PACKAGES)
