"""The last minute of counters and histograms that only ever grow: what was added since a mark that was set then.

A mark is set at most every `STEP` seconds, and only when somebody looks, so that an engine that nobody looks at keeps
nothing. `STEP` bounds what is kept too: SPAN / STEP + 2 copies of 16 kB for each histogram.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from .. import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .._metrics import Histogram

__all__ = ["Percentiles", "Rates"]

SPAN: Final = 60.0  # seconds that percentiles look back
STEP: Final = 15.0
RATE_SPAN: Final = 5.0  # seconds that rates look back
RATE_STEP: Final = 0.9
QUANTILES: Final = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Rates:
    """How fast numbers grow, a second; before there is an earlier look, since `born`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._marks = deque([(clock.monotonic(), dict.fromkeys(names, 0.0))])

    def look(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return `<name>_per_s` for each name, and `over_s`, the seconds that they look back."""
        now = clock.monotonic()
        latest = {name: float(numbers[name]) for name in self._names}
        while len(self._marks) > 1 and now - self._marks[1][0] >= RATE_SPAN:
            self._marks.popleft()
        at, before = self._marks[0]
        seconds = now - at
        if now - self._marks[-1][0] >= RATE_STEP:
            self._marks.append((now, latest))
        grown = {f"{name}_per_s": (latest[name] - before[name]) / seconds if seconds else 0.0 for name in self._names}
        return {**grown, "over_s": seconds}


class Mark(NamedTuple):
    """All histograms as they were at a time."""

    at: float
    copies: dict[str, Histogram]


class Percentiles:
    """The percentiles of the values that histograms were told lately; `family()` gives each with its name."""

    def __init__(self, family: Callable[[], Iterable[tuple[str, Histogram]]]) -> None:
        self._family = family
        self._marks = deque([Mark(clock.monotonic(), {})])

    def look(self) -> dict[str, dict[str, float]]:
        """Return count, p50, p95 and p99 for each name that was told anything."""
        now = clock.monotonic()
        while len(self._marks) > 1 and now - self._marks[1].at >= SPAN:
            self._marks.popleft()
        before = self._marks[0].copies
        members = tuple(self._family())
        found = {name: figures(whole, before.get(name)) for name, whole in members}
        if now - self._marks[-1].at >= STEP:
            self._marks.append(Mark(now, {name: whole.copy() for name, whole in members}))
        return {name: value for name, value in found.items() if value["count"]}

    @property
    def seconds(self) -> float:
        """How far `look` looks back."""
        return clock.monotonic() - self._marks[0].at


def figures(whole: Histogram, before: Histogram | None) -> dict[str, float]:
    lately = whole if before is None else whole.since(before)
    return {"count": lately.count, **{name: lately.quantile(share) for name, share in QUANTILES.items()}}
