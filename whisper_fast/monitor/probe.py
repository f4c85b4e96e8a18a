"""The probe: a thread that comes by at regular times and sees who has the interpreter, and whether the loop is held.

Arrivals that do not know of each other's business see time averages (PASTA: Wolff, Operations Research 30, 1982),
so the share of visits that had to wait for the interpreter is its utilisation, and the share that found a callback on
the loop's stack is the loop's. A thread that is let in only while nobody else runs sees short callbacks as over;
those are the visits that waited and then found the loop at rest.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from .._interpreter import waited

if TYPE_CHECKING:
    from .loop import LoopWatch

__all__ = ["Probe", "Visits"]

EVERY: Final = 0.02  # seconds
AT_ONCE: Final = 100e-6  # seconds: getting a free interpreter takes a few microseconds, a held one up to 5 ms


class Visits(NamedTuple):
    """Counts since the start: visits, those that had to wait, those that found the loop held, and waited at rest."""

    all: int = 0
    waited: int = 0
    held: int = 0
    unsure: int = 0

    def since(self, earlier: Visits) -> Visits:
        """Return what has come after `earlier`."""
        return Visits(*(now - then for now, then in zip(self, earlier, strict=True)))


class Probe:
    """Visits from `start` to `stop` while it is `awake`; 50 visits a second cost little (bench_monitor)."""

    def __init__(self, watch: LoopWatch) -> None:
        self.visits = Visits()
        self._watch = watch
        self._awake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, asleep; on the loop that is looked at."""
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(threading.get_ident(),), name="interpreter-probe", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what was counted stays."""
        if self._thread is not None:
            self._stopping = True
            self._awake.set()
            self._thread.join()
            self._thread = None

    def wake(self) -> None:
        """Visit from now on."""
        if not self._awake.is_set():
            self._awake.set()

    def sleep(self) -> None:
        """Do nothing until `wake`."""
        if not self._stopping:
            self._awake.clear()

    def _run(self, watched: int) -> None:
        while not self._stopping:
            self._awake.wait()
            self._visit(waited(EVERY) > AT_ONCE, watched)

    def _visit(self, had_to_wait: bool, watched: int) -> None:
        held = not self._watch.rests(sys._current_frames().get(watched))
        seen = self.visits
        self.visits = Visits(
            seen.all + 1, seen.waited + had_to_wait, seen.held + held, seen.unsure + (had_to_wait and not held)
        )
