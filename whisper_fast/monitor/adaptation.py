"""Adaptation: the sizes of the pools and the batcher's linger follow what they bring, each as an experiment shows it.

Every `EVERY` seconds while turns are under way each control (`controls`) looks at its part, and moves one setting if
a paired experiment (`climbing`) says so. What else adapts is in `budget` (caches, shedding) and `limits` (models).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .. import clock
from .controls import LingerControl, PoolControl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..batcher import MicroBatcher
    from ..executor import Executor
    from ..flags import Flags
    from .controls import Control

__all__ = ["Adaptation", "Move", "controls_of"]

log = logging.getLogger(__name__)

EVERY: Final = 0.1  # seconds
REST: Final = 1.0
KEPT: Final = 100  # moves that are kept
LATELY: Final = 30.0  # seconds in which a move is told with the bottleneck that it is for
MOST_THREADS: Final = 8  # times as many as were set
MOST_PROCESSES: Final = 2  # for each processor


class Move(NamedTuple):
    """One change that stays: `at` in epoch seconds, `before` and `after` in threads, processes or seconds."""

    at: float
    what: str
    before: float
    after: float
    reason: str


def controls_of(
    executor: Executor, batchers: Mapping[str, MicroBatcher[Any, Any]], flags: Flags
) -> tuple[Control, ...]:
    """Return the controls of an engine's parts; the flags say which of them may change anything."""
    threads = PoolControl(
        "threads",
        lambda: executor.threads,
        lambda size: executor.resize(threads=size),
        most=MOST_THREADS * executor.threads.size,
        enabled=lambda: flags.adaptive and flags.threads,
    )
    processes = PoolControl(
        "processes",
        lambda: executor.processes,
        lambda size: executor.resize(processes=size),
        most=MOST_PROCESSES * (os.cpu_count() or 1),
        enabled=lambda: flags.adaptive and flags.processes,
        shortest=1.0,
    )
    lingers = [
        LingerControl(name, batcher, enabled=lambda: flags.adaptive and flags.linger)
        for name, batcher in batchers.items()
    ]
    return (threads, processes, *lingers)


class Adaptation:
    """Lets `controls` work while `busy()`; keeps what they have changed.

    One that raises is told to `failed` with its flag.
    """

    def __init__(
        self,
        controls: Iterable[Control],
        *,
        busy: Callable[[], bool],
        failed: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self._controls = tuple(controls)
        self._busy = busy
        self._failed = failed
        self.moves = 0
        self.history: deque[Move] = deque(maxlen=KEPT)

    async def run(self) -> None:
        """Look and act until cancelled."""
        while True:
            self.step()
            await asyncio.sleep(EVERY if self._busy() else REST)

    def step(self) -> None:
        """Let every control look once; one that is switched off sets what was configured."""
        now = clock.monotonic()
        for control in self._controls:
            climber = control.climber
            before = climber.best
            if control.enabled():
                self._look(control, now)
            elif climber.value != climber.start or climber.moves:
                control.reset()
                climber.why = "off"
            if climber.best != before:
                self._note(control.name, before, climber.best, climber.why)

    def _look(self, control: Control, now: float) -> None:
        try:
            control.step(now)
        except Exception as error:
            if self._failed is None:
                raise
            self._failed(control.flag, error)

    def lately(self, resource: str) -> str:
        """Return a sentence about what was done lately about a resource, "" for nothing."""
        names = {control.name for control in self._controls if control.resource == resource}
        for move in reversed(self.history):
            if move.what in names and clock.wall() - move.at < LATELY:
                return (
                    f"Adaptation has set {move.what} from {move.before:g} to {move.after:g} by itself: {move.reason}."
                )
        return ""

    def stats(self) -> dict[str, Any]:
        """Return for each setting its value, the best so far and why, and the latest moves."""
        return {
            **{
                control.name: {
                    "now": control.climber.value,
                    "best": control.climber.best,
                    "why": control.climber.why,
                    "moves": control.climber.moves,
                }
                for control in self._controls
            },
            "moves": self.moves,
            "history": [move._asdict() for move in self.history],
        }

    def _note(self, what: str, before: float, after: float, reason: str) -> None:
        self.moves += 1
        self.history.append(Move(clock.wall(), what, before, after, reason))
        log.info("adaptation: %s from %g to %g: %s", what, before, after, reason)
