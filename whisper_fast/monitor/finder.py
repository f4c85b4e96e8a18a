"""The finder: looks at the resources while turns are under way, and keeps what it found of the bottleneck."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .. import clock
from .advice import advice
from .bottleneck import Blame, Held, blamed, confidence
from .resources import Resources, Station

if TYPE_CHECKING:
    from collections.abc import Callable

    from .resources import Parts, Reading

__all__ = ["Finder", "Finding"]

EVERY: Final = 0.05  # seconds between two looks
SECONDS: Final = 1.0  # of a reading; more where the loop is held for longer
REST: Final = 0.5  # seconds between two looks at an engine that has nothing to do
KEPT: Final = 0.5  # what a reading leaves of those before
RANKS: Final = 5


class Finding(msgspec.Struct, frozen=True):
    """What limits now: `resource` is "" while nothing is under way. `at` is in epoch seconds."""

    at: float = 0.0
    resource: str = ""
    share: float = 0.0
    confidence: float = 0.0
    advice: str = ""
    turns: float = 0.0
    ranking: tuple[Blame, ...] = ()


class Finder:
    """Finds the bottleneck; `done` returns what adaptation has done about a resource lately, "" for nothing."""

    def __init__(self, parts: Parts, done: Callable[[str], str] = lambda _: "") -> None:
        self._parts = parts
        self._resources = Resources(parts)
        self._done = done
        self._held, self._turns = Held(), 0.0
        self.finding = Finding()

    async def run(self) -> None:
        """Look and find, until cancelled."""
        probe = self._parts.probe
        probe.start()
        try:
            while True:
                if self._idle():
                    self._rest()
                    await asyncio.sleep(REST)
                    continue
                probe.wake()
                await asyncio.sleep(EVERY)
                self._resources.look()
                if self._resources.seconds >= SECONDS:
                    self.follow(self._resources.read())
        finally:
            probe.stop()

    def follow(self, reading: Reading) -> None:
        """Find what limits in a reading; what was held before counts half as much as what is now."""
        held = blamed(reading)
        turns = max(reading.stations["turns"].busy, held.total)
        self._turns = KEPT * self._turns + turns
        self._held = self._held.faded(KEPT)
        self._held.share_out(held.total, held)
        self.finding = self._found(reading)

    def stats(self) -> dict[str, Any]:
        """Return the finding."""
        found: dict[str, Any] = msgspec.to_builtins(self.finding)
        return found

    def _found(self, reading: Reading) -> Finding:
        ranks = self._held.ranks[:RANKS]
        if not ranks or self._turns <= 0:
            return Finding(clock.wall())
        (first, most), second = ranks[0], ranks[1][1] if len(ranks) > 1 else 0.0
        share = most / self._turns
        sentence = " ".join(filter(None, (advice(first, share, reading), self._done(first))))
        return Finding(
            clock.wall(),
            first,
            share,
            confidence(most, second, self._turns * reading.looks),
            sentence,
            self._turns * (1 - KEPT),
            tuple(self._rank(name, number, reading) for name, number in ranks),
        )

    def _rank(self, name: str, number: float, reading: Reading) -> Blame:
        station = reading.stations.get(name.replace("llm limit ", "llm "), Station(0.0))
        return Blame(name, number / self._turns, station.utilisation, station.waiting)

    def _idle(self) -> bool:
        return not self._parts.lanes.places and not self._parts.budget.shedding

    def _rest(self) -> None:
        """Forget what was before: it is over."""
        self._parts.probe.sleep()
        self._resources.begin()
        self._held, self._turns, self.finding = Held(), 0.0, Finding()
