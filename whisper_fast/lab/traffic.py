"""Traffic: who writes when. Users write in sessions, think between two messages, leave, and come back later.

A place is always taken: `users` people write at any time, each a message every `period` seconds on average. After a
message one leaves with the probability 1 / `session` and somebody takes the place: who left long enough ago, else a
person who was here before the run began. So the rate stays users / period while the people change.

Open loop: the next message is due a gap after the last one was due, whether that one was answered or not, so that a
server that stalls slows nobody. Closed loop: a gap after the reply, as tools do that wait for each answer.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from random import Random
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

from ..errors import SettingsError
from ..llm.simulated import Constant, LogNormal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..llm.simulated import Distribution

__all__ = ["Arrival", "Arrivals", "Exponential", "Gaps", "Length", "Sessions", "Traffic", "arrivals"]

Gaps = Literal["exponential", "lognormal", "constant"]

SPREAD = 1.0  # sigma of log-normal gaps: one in a hundred is ten times the median
AWAY_SPREAD = 0.7


class Length(NamedTuple):
    """How long a real request was, in tokens of its prompt and of its answer."""

    prompt: int
    answer: int


class Arrival(NamedTuple):
    """A message that is due `at` seconds after the start: the `number`-th of `user`, counted from 0.

    `words` and `length` are those of a replayed one.
    """

    at: float
    user: int
    number: int
    words: str | None = None
    length: Length | None = None


class Arrivals(Protocol):
    """Messages in the order in which they are due; times are seconds since the start."""

    @property
    def next(self) -> float:
        """When the next message that is known is due, else the end."""

    def take(self) -> Arrival | None:
        """Return that message, None at the end."""

    def over(self, user: int, at: float) -> None:
        """Hear that the user's message has come to its end, whatever it is."""


@dataclass(frozen=True, slots=True)
class Exponential:
    """Exponential: what has no memory, such as many people who know nothing of each other."""

    mean: float

    def __call__(self, rng: Random) -> float:
        """Draw one value."""
        return rng.expovariate(1.0) * self.mean


@dataclass(frozen=True, slots=True)
class Traffic:
    """Who writes and how often; times in seconds. Raises SettingsError for what nobody could do.

    `session` is the mean number of messages until one leaves, `away` the mean time until one comes back. Nobody
    leaves with a `session` of 0.
    """

    users: int
    period: float
    seconds: float
    seed: int = 0
    closed: bool = False
    gaps: Gaps = "exponential"
    session: float = 20.0
    away: float = 3600.0

    def __post_init__(self) -> None:
        at_least(self.users, "users", 1)
        above_zero(self.period, "period")
        above_zero(self.seconds, "seconds")
        above_zero(self.away, "away")
        if self.session:
            at_least(self.session, "session", 1)
        if self.gaps not in get_args(Gaps):
            raise SettingsError(f"gaps is {self.gaps!r:.80}; allowed are {', '.join(get_args(Gaps))}")

    @property
    def rate(self) -> float:
        """Messages a second that are offered, in open loop."""
        return self.users / self.period


def at_least(value: float, name: str, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise SettingsError(f"{name} is {value}; at least {least:g} is needed")


def above_zero(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise SettingsError(f"{name} is {value}; more than 0 seconds are needed")


def gap(traffic: Traffic) -> Distribution:
    """Return what draws the seconds between two messages of a user, `period` on average."""
    if traffic.gaps == "constant":
        return Constant(traffic.period)
    if traffic.gaps == "lognormal":
        return LogNormal(traffic.period * math.exp(-(SPREAD**2) / 2), SPREAD)
    return Exponential(traffic.period)


def rest(gap: Distribution, rng: Random) -> float:
    """Draw what is left of a gap that began before we looked: long gaps are met more often than short ones.

    That is a gap drawn with a probability in proportion to its length, times a uniform share of it; for the
    log-normal the former is one with the median times exp(sigma squared) (Cox, Renewal Theory, 1962).
    """
    if isinstance(gap, LogNormal):
        return rng.random() * LogNormal(gap.median * math.exp(gap.sigma**2), gap.sigma)(rng)
    if isinstance(gap, Constant):
        return rng.random() * gap.value
    return gap(rng)


class Sessions:
    """The arrivals of a Traffic; the same seed gives the same, in closed loop as far as the replies come alike."""

    def __init__(self, traffic: Traffic) -> None:
        self._rng = Random(traffic.seed)
        self._traffic = traffic
        self._gap = gap(traffic)
        self._away = LogNormal(traffic.away * math.exp(-(AWAY_SPREAD**2) / 2), AWAY_SPREAD)
        self._leaves = 1 / traffic.session if traffic.session else 0.0
        self._people = array("L", range(traffic.users))  # who has which place
        self._numbers = array("L", bytes(traffic.users * array("L").itemsize))  # a person's messages so far
        self._left: list[tuple[float, int]] = []  # heap: when somebody would come back, and who
        self._places: dict[int, int] = {}  # in closed loop: the place of who waits for a reply
        self._due = [(rest(self._gap, self._rng), place) for place in range(traffic.users)]
        heapify(self._due)

    @property
    def people(self) -> int:
        """How many have been here so far."""
        return len(self._numbers)

    @property
    def next(self) -> float:
        """When the next message is due, else the end."""
        return min(self._due[0][0], self._traffic.seconds) if self._due else self._traffic.seconds

    def take(self) -> Arrival | None:
        """Return the next message, None at the end."""
        if not self._due or self._due[0][0] >= self._traffic.seconds:
            return None
        at, place = heappop(self._due)
        user = self._people[place]
        number = self._numbers[user]
        self._numbers[user] = number + 1
        if self._traffic.closed:
            self._places[user] = place
        else:
            self._think(place, at)
        return Arrival(at, user, number)

    def over(self, user: int, at: float) -> None:
        """In closed loop, begin to think about the next message."""
        if self._traffic.closed:
            self._think(self._places.pop(user), at)

    def _think(self, place: int, at: float) -> None:
        due = at + self._gap(self._rng)
        if self._leaves and self._rng.random() < self._leaves:
            heappush(self._left, (at + self._away(self._rng), self._people[place]))
            self._people[place] = self._newcomer(due)
        heappush(self._due, (due, place))

    def _newcomer(self, due: float) -> int:
        if self._left[0][0] <= due:
            return heappop(self._left)[1]
        self._numbers.append(0)
        return len(self._numbers) - 1


def arrivals(source: Arrivals) -> Iterator[Arrival]:
    """Yield all arrivals of an open loop at once, for what is not paced."""
    while (arrival := source.take()) is not None:
        yield arrival
