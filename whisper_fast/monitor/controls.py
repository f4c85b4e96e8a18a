"""The controls: each looks at one part, feeds a climber with the score of each window, and sets what that says.

    threads, processes  calls ended a second, in windows of at least 20 calls and twice the size. Only calls that wait
                        begin an experiment, and no size is tried above the calls that are there (Little's law)
    linger              1 / seconds in the batcher, by Little's law items ended a second / items in it. Only where
                        more wait than are served there is something to gain; a linger of twice what they stay never
                        comes to its end, so it is taken down to that at once

After a change the calls that began before it are not counted. A pool that nobody has waited for in `CALM` seconds is
as it was set again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from .climbing import Climber

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..batcher import MicroBatcher
    from ..executor import Load

__all__ = ["Control", "LingerControl", "PoolControl"]

CALM: Final = 60.0  # seconds
FEWEST: Final = 20  # calls in a window
ITEMS: Final = 100  # items in a window: they come back a batch at a time
SHORTEST, LONGEST = 0.25, 5.0  # seconds of a window
PRICE: Final = 0.05
SHORTEST_LINGER: Final = 0.001  # seconds; timers tick in whole milliseconds


class Control(Protocol):
    """One setting under control: `name`, its `flag`, and `resource` as the bottleneck finder calls it."""

    name: str
    resource: str
    flag: str
    climber: Climber

    def enabled(self) -> bool:
        """Whether it may change anything."""

    def step(self, now: float) -> None:
        """Look once; set the climber's value where it is another one."""

    def reset(self) -> None:
        """Set what was configured."""


class PoolControl:
    """The size of a pool: `load` tells what it has to do, `resize` sets it, from 1 to `most`."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Load],
        resize: Callable[[int], None],
        *,
        most: int,
        enabled: Callable[[], bool],
        shortest: float = SHORTEST,
    ) -> None:
        self.name = self.resource = self.flag = name
        self.enabled = enabled
        self._load, self._resize = load, resize
        self._most, self._shortest = most, shortest
        start = load().size
        self.climber = Climber(start, least=1, most=max(start, most), price=PRICE)
        self._skipped = 0  # calls of the size before that are still to come back
        self._waited_at = 0.0
        self._open(0.0, load())

    def step(self, now: float) -> None:
        """Look once; set another size where the climber says so."""
        load = self._load()
        if load.waiting:
            self._waited, self._waited_at = True, now
        done, seconds = load.done - self._done, now - self._began
        if self._skipped:
            if done >= self._skipped or seconds > LONGEST:
                self._skipped = 0
                self._open(now, load)
        elif done >= max(FEWEST, 2 * load.size) and seconds >= self._shortest:
            self._close(now, load, done / seconds)
        elif seconds > LONGEST:
            self._give_up(now, load)

    def reset(self) -> None:
        """Set what was configured."""
        self.climber.begin()
        self._set(self._load())

    def _close(self, now: float, load: Load, rate: float) -> None:
        """Take a window's score, if it can say anything: with nobody waiting at `best` more cannot help."""
        climber = self.climber
        if self._waited or climber.value != climber.best:
            climber.most = max(climber.best, min(self._most, load.busy + load.waiting))
            climber.feed(rate)
        else:
            climber.give_up()
        self._open(now, load)
        self._set(load)

    def _give_up(self, now: float, load: Load) -> None:
        self.climber.give_up()
        if now - self._waited_at > CALM and self.climber.best != self.climber.start:
            self.climber.begin()
            self.climber.why = f"nobody has waited for {CALM:g} s"
        self._open(now, load)
        self._set(load)

    def _open(self, now: float, load: Load) -> None:
        self._began, self._done, self._waited = now, load.done, False

    def _set(self, load: Load) -> None:
        size = round(self.climber.value)
        if size != load.size:
            self._skipped = load.busy
            self._resize(size)


class LingerControl:
    """The longest wait of a batcher's items behind a running batch, between 1 ms and what was set."""

    def __init__(self, name: str, batcher: MicroBatcher[Any, Any], *, enabled: Callable[[], bool]) -> None:
        self.name, self.resource, self.flag = f"linger {name}", f"batch {name}", "linger"
        self.enabled = enabled
        self._batcher = batcher
        self._set_to = batcher.max_wait
        start = max(batcher.max_wait, SHORTEST_LINGER)
        self.climber = Climber(start, least=SHORTEST_LINGER, most=start, price=PRICE, whole=False, up=False)
        self._skipping = False
        self._open(0.0)

    def step(self, now: float) -> None:
        """Look once; set another wait where the climber says so."""
        stats = self._batcher.stats()
        self._looks += 1
        self._inside += stats.waiting + stats.serving
        self._waiting += stats.waiting
        ended, seconds = stats.items - stats.waiting - stats.serving - self._ended, now - self._began
        if self._skipping:
            if ended >= FEWEST or seconds > LONGEST:
                self._skipping = False
                self._open(now)
        elif ended >= ITEMS and seconds >= SHORTEST:
            self._close(now, ended / seconds)
        elif seconds > LONGEST:
            self.climber.give_up()
            self._open(now)

    def reset(self) -> None:
        """Set what was configured."""
        self.climber.begin()
        self._batcher.max_wait = self._set_to

    def _close(self, now: float, rate: float) -> None:
        inside = self._inside / self._looks
        if inside and (self._waiting > inside * self._looks / 2 or self.climber.trying is not None):
            stay = inside / rate
            if self.climber.best > 2 * stay:
                self.climber.bound(stay, f"items stay {stay * 1000:.0f} ms: none lingers longer")
            self.climber.most = self.climber.start
            self.climber.feed(1 / stay)
        self._open(now)
        if self._batcher.max_wait != self.climber.value:
            self._batcher.max_wait = self.climber.value
            self._skipping = True

    def _open(self, now: float) -> None:
        stats = self._batcher.stats()
        self._began, self._ended = now, stats.items - stats.waiting - stats.serving
        self._looks = self._waiting = self._inside = 0
