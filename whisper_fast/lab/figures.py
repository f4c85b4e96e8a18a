"""Figures of a run: the times of each turn as they were measured, and what they come to."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

__all__ = ["Figures", "milliseconds"]


class Figures:
    """The turns of one side, all kept: percentiles are exact, not those of a histogram.

    `added` is a turn's whole time less the model's own, which is known because the model is simulated. What the
    event loop wakes late counts as ours.
    """

    def __init__(self, turns: int, llm_latency: float) -> None:
        self.expected = turns
        self.llm_latency = llm_latency
        self.total: list[float] = []
        self.began = perf_counter()
        self.ended = self.began

    def start(self) -> None:
        """Begin to count."""
        self.began = self.ended = perf_counter()

    def note(self, seconds: float) -> None:
        """Count a turn that took `seconds` from the moment it was due to its reply."""
        self.total.append(seconds)
        self.ended = perf_counter()

    @property
    def seconds(self) -> float:
        """From the start to the last reply."""
        return self.ended - self.began

    @property
    def turns_per_s(self) -> float:
        """Turns answered per second, 0.0 before the first."""
        return len(self.total) / self.seconds if self.total else 0.0

    def added_ms(self, *percents: float) -> dict[str, float]:
        """Return percentiles of the added time in milliseconds, as `p50`."""
        return milliseconds(np.asarray(self.total) - self.llm_latency, *percents)

    def total_ms(self, *percents: float) -> dict[str, float]:
        """Return percentiles of the whole time in milliseconds."""
        return milliseconds(np.asarray(self.total), *percents)

    def as_dict(self) -> dict[str, Any]:
        """Return turns, seconds, turns per second, and the added time."""
        return {
            "turns": len(self.total),
            "seconds": round(self.seconds, 3),
            "turns_per_s": round(self.turns_per_s, 2),
            "added_ms": self.added_ms(50, 99),
        }


def milliseconds(seconds: Any, *percents: float) -> dict[str, float]:
    """Return percentiles of an array of seconds, in milliseconds: `{"p50": ..., "p99.9" as "p999": ...}`."""
    if not len(seconds):
        return {}
    values = np.percentile(seconds, percents) * 1000
    return {f"p{percent:g}".replace(".", ""): round(float(v), 3) for percent, v in zip(percents, values, strict=True)}
