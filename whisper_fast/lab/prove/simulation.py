"""Promises 1 to 4 and 6 in virtual time: the real engine, day after day, each drawn from a seed of its own.

A day has messages and redeliveries in several scopes, a model that is slow and fails, a disk that fails and is slow,
power cuts, deaths and restarts, users to be forgotten, flags switched and clocks that jump, see `lab/simulation`. A
seed that breaks a promise breaks it each time.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..faulty_disk import memory_folder
from ..simulation import simulate
from .proof import Proof, told

if TYPE_CHECKING:
    from pathlib import Path

    from .proof import Show

__all__ = ["Simulation"]

SHOWN = 5  # seeds whose finding is told


class Simulation(Proof):
    """The days of `seeds` seeds, from `seed` on."""

    name = "simulation"
    must_be_zero = ("broken",)
    must_not_be_zero = ("messages", "answered")

    def __init__(self, seeds: int = 100, seed: int = 0) -> None:
        self.seed = seed
        self._seeds = seeds
        self._days = self._messages = self._answered = self._deaths = 0
        self._found: dict[int, dict[str, Any]] = {}
        self._began = perf_counter()

    async def run(self, folder: Path, show: Show) -> None:
        """Live one day after the other, in a thread that has a loop of its own for each life."""
        self._began = perf_counter()
        with memory_folder() as fast:
            for seed in range(self.seed, self.seed + self._seeds):
                await asyncio.to_thread(self._day, seed, fast / "day")
                show(self._days / self._seeds, f"{self._days} days, {self._deaths} deaths")

    def figures(self) -> dict[str, Any]:
        """Return seeds, broken (days with a broken promise), messages, answered, deaths, the first findings."""
        return {
            "seeds": self._days,
            "broken": len(self._found),
            "messages": self._messages,
            "answered": self._answered,
            "deaths": self._deaths,
            "found": {str(seed): self._found[seed] for seed in list(self._found)[:SHOWN]},
            "seconds": round(perf_counter() - self._began, 1),
            "seed": self.seed,
        }

    @property
    def replay(self) -> str:
        """The command that lives the first broken day again."""
        return f"whisper-fast prove simulation --seeds 1 --seed {next(iter(self._found), self.seed)}"

    def _day(self, seed: int, folder: Path) -> None:
        self._days += 1
        try:
            verdict = simulate(seed, folder)
        except Exception as error:  # noqa: BLE001 - a day that nobody foresaw is one to be lived again
            self._found[seed] = {"raised": told(error)}
            return
        self._messages += len(verdict.messages)
        self._answered += verdict.answers
        self._deaths += verdict.deaths
        if verdict.broken:
            self._found[seed] = verdict.broken
