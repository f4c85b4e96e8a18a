"""Promise 6: past its capacity the engine sheds early and keeps its pace, loses nothing and stays within memory.

The model has `SLOTS` places and takes `SECONDS` a call, so that it, and not this machine, is the limit. First as many
messages come as it can answer: the most turns answered in one second is the peak. Then ten times as many come in open
loop, whether they are answered or not.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psutil

from ...engine import Engine
from ...errors import Overloaded
from ...llm import SimulatedLLM
from ...message import Message
from ...settings import Settings
from .. import audit
from ..figures import milliseconds
from .proof import Proof

if TYPE_CHECKING:
    from pathlib import Path

    from .proof import Show

__all__ = ["Overload"]

SLOTS, SECONDS = 10, 0.1
CAPACITY = SLOTS / SECONDS  # turns a second
TIMES = 10
USERS = 10_000
TICK = 0.005  # seconds
ENOUGH = 0.9  # of the peak: below, the engine has collapsed
CALM = 5.0  # seconds after the flood


class Overload(Proof):
    """A flood of `seconds` seconds."""

    name = "overload"
    must_be_zero = ("lost",)

    def __init__(self, seconds: float = 10.0, seed: int = 0, engine: type[Engine] = Engine) -> None:
        self.arguments = f"--seconds {seconds:g} --seed {seed}"
        self.seconds = seconds
        self.seed = seed
        self._engine = engine
        self._random = Random(seed)
        self._ends: list[tuple[str, float, float]] = []  # phase, when, how long the sender waited
        self._shed: list[float] = []
        self._accepted: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0
        self._lost = 0
        self._rss = [0, 0]
        self._seconds = {"peak": max(3.0, min(seconds, 10.0)), "flood": seconds, "after": 2.0}

    async def run(self, folder: Path, show: Show) -> None:
        """Come to the peak, flood, and look once more when it is calm."""
        settings = Settings(
            data_dir=folder,
            max_concurrent_requests=SLOTS,
            max_wait_seconds=1.0,
            process_pool_size=1,
            feature_adaptive=False,
        )
        async with self._engine.open(settings, llm=SimulatedLLM(latency=SECONDS)) as engine:
            await self._phase(engine, "peak", CAPACITY * 1.1, show)
            self._rss[0] = psutil.Process().memory_info().rss
            await self._phase(engine, "flood", TIMES * CAPACITY, show)
            self._rss[1] = psutil.Process().memory_info().rss
            await asyncio.sleep(CALM)
            await self._phase(engine, "after", CAPACITY / 2, show)
            await asyncio.gather(*self._tasks)
        self._lost = audit.lost(folder, self._accepted)

    def figures(self) -> dict[str, Any]:
        """Return goodput_share, shed_p99_ms, lost; the peak, how much was shed, the medians before and after."""
        goodput = {phase: self._goodput(phase) for phase in ("peak", "flood")}
        return {
            "goodput_share": round(goodput["flood"] / goodput["peak"], 3) if goodput["peak"] else None,
            "shed_p99_ms": milliseconds(self._shed, 99).get("p99"),
            "lost": self._lost,
            "accepted": len(self._accepted),
            "shed": len(self._shed),
            "peak_per_s": round(goodput["peak"], 1),
            "flood_ms": milliseconds([took for phase, _, took in self._ends if phase == "flood"], 50, 99),
            "after_ms": milliseconds([took for phase, _, took in self._ends if phase == "after"], 50, 99),
            "rss_grown_mb": round((self._rss[1] - self._rss[0]) / 1e6, 1),
            "seconds": self.seconds,
            "seed": self.seed,
        }

    def broken(self) -> bool:
        """Say whether something is lost, or the goodput fell below 0.9 of the peak."""
        share = self.figures()["goodput_share"]
        return super().broken() or (share is not None and share < ENOUGH)

    def _goodput(self, phase: str) -> float:
        """Return the answers a second of a phase, its first and last second left out where it is long enough."""
        ends = Counter(int(when) for which, when, _ in self._ends if which == phase)
        whole = sorted(ends)[1:-1] or sorted(ends)
        return sum(ends[second] for second in whole) / len(whole) if whole else 0.0

    async def _phase(self, engine: Engine, phase: str, rate: float, show: Show) -> None:
        began, sent = perf_counter(), 0
        while (now := perf_counter() - began) < self._seconds[phase]:
            while sent < rate * now:
                task = asyncio.create_task(self._send(engine, phase, began), name="flood")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                sent += 1
            show(now / self._seconds[phase], f"{phase}: {len(self._accepted)} accepted, {len(self._shed)} shed")
            await asyncio.sleep(TICK)

    async def _send(self, engine: Engine, phase: str, began: float) -> None:
        self._number += 1
        user, number = f"u{self._random.randrange(USERS)}", self._number
        came = perf_counter()
        try:
            ticket = await engine.submit(Message(user=user, text=f"hello {number}", id=f"m{number}", platform="lab"))
        except Overloaded:
            self._shed.append(perf_counter() - came)
            return
        self._accepted.append(f"m{number}")
        await ticket.reply()
        now = perf_counter()
        self._ends.append((phase, now - began, now - came))
