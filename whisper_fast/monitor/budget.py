"""The memory budget: caches give way before it is reached, and new messages are refused if that is not enough.

Every `PERIOD` seconds, of the memory used (see `Pressure`) and the bytes that the caches hold:

    over    used - HIGH * budget, if above 0 at least STEP of all configured bounds, so that moves are few; at
            least held * SQUEEZE while tasks stall for memory (PSI >= STALLED percent)
    shrink  if over > 0, every cache's bound becomes  floor + (held - floor) * (1 - over / sum of (held - floor)),
            at least its floor, at most the bound it has; floor is its configured bound * FLOOR
    grow    if used < LOW * budget, every bound rises by its configured one * STEP, up to that, all together by at
            most half of what is free below LOW
    shed    from SHED * budget on if no cache has anything left to give, and at the budget in any case, until used
            is below HIGH * budget again

Between LOW and HIGH nothing moves, nor while nothing is known, so that noise moves nothing. It shrinks in one step
and grows in 1 / STEP at the least: what is short must be given at once, what is free need not be taken at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .. import clock
from ..flags import logged
from .pressure import trim

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..cache import Cache, Resizing
    from .pressure import Gauge, Pressure

__all__ = ["Budget", "Change"]

log = logging.getLogger(__name__)

DEFAULT: Final = 2 << 30  # bytes, where no control group sets a limit
SHARE: Final = 0.75  # of the control group's limit
LOW, HIGH, SHED = 0.8, 0.9, 0.95
FLOOR: Final = 1 / 16
STEP: Final = 0.05
SQUEEZE: Final = 1 / 32
STALLED: Final = 10.0  # percent
PERIOD: Final = 0.5  # seconds
KEPT: Final = 100  # changes that are kept
RESTING: Final = "off"


class Change(NamedTuple):
    """One move of the controller: `at` in epoch seconds, `before` and `after` in bytes (0 and 1 for shedding)."""

    at: float
    what: str
    before: int
    after: int
    reason: str


class Budget:
    """Holds this process within `size` bytes by the bounds of `caches` and, where that is not enough, by `shed`.

    shed     called with a sentence while no new message is to be taken, with "" when they are again
    enabled  asked each time; while it says no, every bound is the configured one and nothing is shed
    """

    def __init__(
        self,
        gauge: Gauge,
        caches: Mapping[str, Cache[Any, Any]],
        *,
        size: int | None = None,
        shed: Callable[[str], None] = lambda _: None,
        enabled: Callable[[], bool] = lambda: True,
        failed: Callable[[str, Exception], None] = logged,
    ) -> None:
        self._gauge = gauge
        self._caches = dict(caches)
        self._most = {name: int(cache.max_weight) for name, cache in self._caches.items()}
        self._bounds = dict(self._most)
        self._wanted = size
        self._shed = shed
        self._enabled = enabled
        self._failed = failed
        self._at_start: int | None = None
        self.size = size or DEFAULT
        self.shedding = False
        self.changes = 0
        self.history: deque[Change] = deque(maxlen=KEPT)
        self.pressure: Pressure | None = None

    async def run(self) -> None:
        """Look and act every `PERIOD` seconds, until cancelled."""
        while True:
            try:
                await self.step()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next look comes
                self._failed("budget", error)
            await asyncio.sleep(PERIOD)

    async def step(self) -> None:
        """Look once, and do what the rule says."""
        if not self._enabled():
            self._let_go()
            return
        reading = await asyncio.to_thread(self._gauge.read)
        if await self.follow(reading) or self.shedding:  # what others have freed stays in the C library's heap else
            await asyncio.to_thread(trim)

    async def follow(self, reading: Pressure) -> bool:
        """Do what the rule says about a reading; return whether caches were shrunk."""
        self.pressure = reading
        self.size = self._size(reading)
        used = reading.used
        if used is None:
            return False
        held = {name: int(cache.weight) for name, cache in self._caches.items()}
        over = self._over(used, sum(held.values()), reading.stalled)
        shrunk = over > 0 and await self._shrink(held, over, used, reading.stalled)
        if over <= 0 and used < LOW * self.size:
            self._grow(used)
        self._judge(used, held)
        return shrunk

    @property
    def used(self) -> int:
        """Bytes that count against the budget; 0 while nothing is known."""
        return (self.pressure.used or 0) if self.pressure is not None else 0

    @property
    def tightness(self) -> float:
        """The share of time, 0 to 1, that want of memory costs: 1 while it sheds, else what tasks stall for it."""
        stalled = self.pressure.stalled if self.pressure is not None else None
        return 1.0 if self.shedding else (stalled or 0.0) / 100

    def squeezes(self, cache: Cache[Any, Any]) -> bool:
        """Whether a cache has a smaller bound than it was set."""
        return any(cache is one and self._bounds[name] < self._most[name] for name, one in self._caches.items())

    def stats(self) -> dict[str, Any]:
        """Return the budget and what is known of memory in bytes, the caches' bounds and load, the latest changes."""
        known = self.pressure._asdict() if self.pressure is not None else {}
        return {
            "bytes": self.size,
            **{name: value for name, value in known.items() if value is not None},
            "shedding": self.shedding,
            "changes": self.changes,
            "bounds": dict(self._bounds),
            "caches": {name: cache.held() for name, cache in self._caches.items()},
            "history": [change._asdict() for change in self.history],
        }

    def _size(self, reading: Pressure) -> int:
        """Return the budget: what was set, else a share of the group's limit, else the default.

        A process that was large before the engine came gets as much again, else it could never answer anybody.
        """
        if self._wanted is not None:
            return self._wanted if reading.limit is None else min(self._wanted, reading.limit)
        if reading.limit is not None:
            return int(SHARE * reading.limit)
        if self._at_start is None and reading.rss is not None:
            self._at_start = reading.rss
        return max(DEFAULT, 2 * (self._at_start or 0))

    def _over(self, used: int, held: int, stalled: float | None) -> float:
        over = used - HIGH * self.size
        if over > 0:
            over = max(over, STEP * sum(self._most.values()))
        return max(over, held * SQUEEZE) if stalled is not None and stalled >= STALLED else over

    def _floor(self, name: str) -> int:
        return int(self._most[name] * FLOOR)

    def _spare(self, held: Mapping[str, int]) -> int:
        return sum(max(0, size - self._floor(name)) for name, size in held.items())

    async def _shrink(self, held: Mapping[str, int], over: float, used: int, stalled: float | None) -> bool:
        spare = self._spare(held)
        if spare <= 0:
            return False
        share = max(0.0, 1 - over / spare)
        reason = f"{used >> 20} MiB of {self.size >> 20} used, {stalled or 0:.0f} % stalled"
        before = dict(self._bounds)
        for name, size in held.items():
            floor = self._floor(name)
            bound = floor + int(max(0, size - floor) * share)
            if bound < before[name]:
                await self._resize(name, bound, reason)
        return self._bounds != before

    def _grow(self, used: int) -> None:
        missing = {name: most - self._bounds[name] for name, most in self._most.items() if most > self._bounds[name]}
        room = (LOW * self.size - used) / 2
        wanted = {name: min(less, max(1, int(self._most[name] * STEP))) for name, less in missing.items()}
        share = min(1.0, room / sum(wanted.values())) if wanted else 0.0
        for name, more in wanted.items():
            if (by := int(more * share)) > 0:
                self._resize(
                    name, self._bounds[name] + by, f"{used >> 20} MiB of {self.size >> 20} used: there is room"
                )

    def _judge(self, used: int, held: Mapping[str, int]) -> None:
        """Begin or end to refuse new messages."""
        exhausted = self._spare(held) <= 0 and used >= SHED * self.size
        if not self.shedding and (exhausted or used >= self.size):
            text = f"memory is short: {used >> 20} MiB of {self.size >> 20} are used (WHISPER_FAST_MEMORY_BUDGET)"
            self._refuse(text)
        elif self.shedding and used < HIGH * self.size:
            self._refuse("")

    def _refuse(self, text: str) -> None:
        self._note("shedding", int(self.shedding), int(bool(text)), text or "there is room again")
        self.shedding = bool(text)
        self._shed(f"{text}; come back later" if text else "")

    def _let_go(self) -> None:
        for name, most in self._most.items():
            if self._bounds[name] != most:
                self._resize(name, most, RESTING)
        if self.shedding:
            self._refuse("")

    def _resize(self, name: str, bound: int, reason: str) -> Resizing:
        self._note(name, self._bounds[name], bound, reason)
        self._bounds[name] = bound
        return self._caches[name].resize(bound)

    def _note(self, what: str, before: int, after: int, reason: str) -> None:
        self.changes += 1
        self.history.append(Change(clock.wall(), what, before, after, reason))
        log.log(logging.WARNING if after < before or what == "shedding" else logging.INFO,
                "memory budget: %s from %d to %d: %s", what, before, after, reason)  # fmt: skip
