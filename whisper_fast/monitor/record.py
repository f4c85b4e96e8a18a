"""The record of all turns: a histogram for each stage, and the waterfalls of the latest and of the slowest.

A stage is a lap of the way (`journal`, `lane`, `gather`, `llm`, `record`, `remember`), a component, or the wait for
the `first_token`. What a user waited for, the `reply`, is split into `llm`, from the question to the last word, and
`ours`: all the rest until the reply was on the disk. Nothing that a user wrote is kept, and no user's name: a
waterfall is found by its message's id.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

from .. import clock
from .._metrics import Counters, Histograms
from .loop import LoopWatch

if TYPE_CHECKING:
    from ..message import Turn

__all__ = ["Record", "Stage", "Waterfall"]

LATEST: Final = 500  # turns that can be looked up by their id
SLOWEST: Final = 20  # turns of each period
PERIOD: Final = 300.0  # seconds


class Stage(NamedTuple):
    """One bar of a waterfall: `start` is in seconds after the message came."""

    name: str
    start: float
    seconds: float


class Waterfall:
    """One turn as it went: `at` is when it came in epoch seconds, `seconds` how long it took until it was stored."""

    __slots__ = ("_began", "_started", "_timings", "at", "id", "partial", "seconds")

    def __init__(self, turn: Turn, seconds: float) -> None:
        self.id = turn.message.id
        self.at = clock.wall() - seconds
        self.seconds = seconds
        self.partial = tuple(turn.partial)
        self._started, self._began, self._timings = turn.started, turn.began, turn.timings

    @property
    def stages(self) -> list[Stage]:
        """Every stage in the order in which they began."""
        began, timings = self._began, self._timings
        bars = [Stage(name, at - self._started, timings[name]) for name, at in began.items() if name in timings]
        return sorted(bars, key=lambda bar: (bar.start, -bar.seconds))

    def as_dict(self) -> dict[str, object]:
        """Return it as JSON takes it."""
        stages = [bar._asdict() for bar in self.stages]
        return {"id": self.id, "at": self.at, "seconds": self.seconds, "partial": self.partial, "stages": stages}


class Slowest:
    """The slowest turns of this period and of the one before."""

    def __init__(self) -> None:
        self._now: list[Waterfall] = []
        self._before: list[Waterfall] = []
        self._until = 0.0

    def offer(self, one: Waterfall) -> None:
        """Keep a turn if it is among the slowest."""
        self._pass_time()
        if len(self._now) < SLOWEST or one.seconds > self._now[-1].seconds:
            self._now.append(one)
            self._now.sort(key=slowness)
            del self._now[SLOWEST:]

    def all(self) -> list[Waterfall]:
        """Return them, the slowest first."""
        self._pass_time()
        return sorted(self._now + self._before, key=slowness)[:SLOWEST]

    def _pass_time(self) -> None:
        now = clock.monotonic()
        if now >= self._until:
            self._before = self._now if now < self._until + PERIOD else []
            self._now, self._until = [], now + PERIOD


def split(turn: Turn) -> dict[str, float]:
    """Return the seconds until the reply was on the disk, and of them the model's and ours; {} if it is not there."""
    if "record" not in turn.began:
        return {}
    reply = turn.began["record"] + turn.timings["record"] - turn.started
    llm = min(turn.timings["llm"], reply)
    return {"reply": reply, "llm": llm, "ours": reply - llm}


def slowness(one: Waterfall) -> float:
    return -one.seconds


class Record:
    """Takes down every turn that has ended; a turn costs it about a microsecond. `loop` watches the event loop."""

    def __init__(self) -> None:
        self.loop = LoopWatch()
        self.stages = Histograms()
        self.replies = Histograms()
        self.missing = Counters()
        self.errors = Counters()
        self._latest: deque[Waterfall] = deque(maxlen=LATEST)
        self._slowest = Slowest()

    def ended(self, turn: Turn) -> None:
        """Take down a turn that was answered and remembered."""
        try:
            self.stages.observe_all(turn.timings)
            self.replies.observe_all(split(turn))
        except (
            TypeError,
            ValueError,
            KeyError,
        ) as error:  # a component wrote into the timings: no reason to fail a message
            self.failed(error)
            return
        for name in turn.partial:
            self.missing.inc(name)
        waterfall = Waterfall(turn, clock.monotonic() - turn.started)
        self._latest.append(waterfall)
        self._slowest.offer(waterfall)

    def failed(self, error: Exception) -> None:
        """Count an error that ended a turn for now."""
        self.errors.inc(type(error).__name__)

    def slowest(self) -> list[Waterfall]:
        """Return the slowest turns of the last five to ten minutes, the slowest first."""
        return self._slowest.all()

    def find(self, message: str) -> Waterfall | None:
        """Return the waterfall of a message by its id, None if it is too long ago."""
        known = chain(reversed(self._latest), self._slowest.all())
        return next((one for one in known if one.id == message), None)
