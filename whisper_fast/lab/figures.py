"""Figures of a run: the times of each turn as they were measured, and what they come to."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import clock

__all__ = ["Figures", "milliseconds"]


class Figures:
    """The turns of one side, all kept: percentiles are exact, not those of a histogram.

    `added` is a turn's whole time less the model's own, which is known because the model is simulated, and less the
    wait for the same user's earlier reply, which is in that turn's figures. What the event loop wakes late is ours.
    """

    def __init__(self, turns: int, llm_latency: float) -> None:
        self.expected = turns
        self.llm_latency = llm_latency
        self.total: list[float] = []
        self.added: list[float] = []
        self.began = clock.monotonic()
        self.ended = self.began

    def start(self) -> None:
        """Begin to count."""
        self.began = self.ended = clock.monotonic()

    def note(self, seconds: float, *, queued: float = 0.0) -> None:
        """Count a turn that took `seconds` from when it was due, `queued` of them behind its user's earlier turn."""
        self.total.append(seconds)
        self.added.append(seconds - queued - self.llm_latency)
        self.ended = clock.monotonic()

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
        return milliseconds(self.added, *percents)

    def total_ms(self, *percents: float) -> dict[str, float]:
        """Return percentiles of the whole time in milliseconds."""
        return milliseconds(self.total, *percents)

    def as_dict(self) -> dict[str, Any]:
        """Return turns, seconds, turns per second, and the added time."""
        return {
            "turns": len(self.total),
            "seconds": round(self.seconds, 3),
            "turns_per_s": round(self.turns_per_s, 2),
            "added_ms": self.added_ms(50, 99),
        }


def milliseconds(seconds: list[float], *percents: float) -> dict[str, float]:
    """Return percentiles of seconds, in milliseconds: `{"p50": ..., "p999": ...}` (99.9); empty without any."""
    if not seconds:
        return {}
    values = np.percentile(seconds, percents) * 1000
    return {f"p{percent:g}".replace(".", ""): round(float(v), 3) for percent, v in zip(percents, values, strict=True)}
