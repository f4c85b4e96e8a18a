"""How long an endpoint's calls take: the mean, and a quantile, of late."""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from math import inf, log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import TimerHandle

__all__ = ["Latency"]

SHORTEST, RATIO, BUCKETS = 0.0001, 1.02, 800  # 0.1 ms to 760 s in steps of 2 %
STEP = 1 / log(RATIO)
FULL = 2000  # samples after which the past counts half
AVERAGED = 50.0  # samples that the mean is of, about
FRESH = 200  # samples between two looks for the quantile


class Latency:
    """A histogram with logarithmic buckets that halves its counts every 2,000 samples.

    `high` is the upper edge of the bucket of the `quantile`, so at most 2 % above it; infinite while fewer than 200
    samples are known.
    """

    __slots__ = ("_counts", "_fresh", "_total", "high", "mean", "quantile", "timer", "watched")

    def __init__(self, quantile: float) -> None:
        self.quantile = quantile
        self.high = inf
        self.mean = 0.0
        self._counts = [0.0] * BUCKETS
        self._total = self._fresh = 0.0
        self.watched: deque[Any] = deque()  # see Hedges
        self.timer: TimerHandle | None = None

    def observe(self, seconds: float) -> None:
        """Count one call."""
        bucket = int(log(seconds / SHORTEST) * STEP) if seconds > SHORTEST else 0
        self._counts[bucket if bucket < BUCKETS else -1] += 1
        self._total += 1
        self.mean += (seconds - self.mean) / (min(AVERAGED, self._total))
        self._fresh += 1
        if self._fresh >= FRESH:
            self._look()

    def _look(self) -> None:
        self._fresh = 0
        if self._total >= FULL:
            self._counts = [count / 2 for count in self._counts]
            self._total /= 2
        below = accumulate(self._counts)
        bucket = next(at for at, count in enumerate(below, 1) if count >= self.quantile * self._total)
        self.high = SHORTEST * RATIO**bucket
