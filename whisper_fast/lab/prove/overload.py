"""Promise 6: past its capacity the engine sheds early and keeps its pace, loses nothing and stays within memory.

The model has `SLOTS` places and takes `SECONDS` a call, so that it, and not this machine, is the limit. First as many
messages come as half of what it can answer, which says how long an answer takes; then as many as it can: the most
turns answered in one second is the peak. Then ten times as many come in open loop, whether they are answered or not,
and when it has been calm for five seconds half of what it can answer again.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from random import Random
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

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
ANY = float("inf")
CALM = 5.0  # seconds after the flood


class Overload(Proof):
    """A flood of `seconds` seconds."""

    name = "overload"
    must_be_zero = ("lost",)
    must_not_be_zero = ("accepted", "shed")
    bounds: ClassVar = {
        "goodput_share": (0.9, ANY),  # of the peak: below, the engine has collapsed
        "shed_p99_ms": (0.0, 10.0),
        "after_ratio": (0.0, 2.0),  # of an answer's time before the flood
        "rss_grown_mb": (-ANY, 128.0),
    }

    def __init__(self, seconds: float = 10.0, seed: int = 0, engine: type[Engine] = Engine) -> None:
        self.arguments = f"--seconds {seconds:g} --seed {seed}"
        self.seconds = seconds
        self.seed = seed
        self._engine = engine
        self._random = Random(seed)
        self._ends: list[tuple[str, float, float]] = []  # phase, when, how long the sender waited
        self._shed = array("d")  # seconds until each refusal
        self._accepted = array("l")  # the numbers of messages
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0
        self._lost = 0
        self._rss = dict.fromkeys(("peak", "flood"), 0)  # the most bytes in each
        self._seconds = {"before": 2.0, "peak": max(3.0, min(seconds, 10.0)), "flood": seconds, "after": 2.0}

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
            await self._phase(engine, "before", CAPACITY / 2, show)
            await self._phase(engine, "peak", CAPACITY * 1.1, show)
            await self._phase(engine, "flood", TIMES * CAPACITY, show)
            await asyncio.sleep(CALM)
            await self._phase(engine, "after", CAPACITY / 2, show)
            await asyncio.gather(*self._tasks)
        self._lost = audit.lost(folder, (f"m{number}" for number in self._accepted))

    def figures(self) -> dict[str, Any]:
        """Return goodput_share, shed_p99_ms, lost; the peak, how much was shed, the times of each phase.

        after_ratio: what an answer took after the flood over what it took before it, on average;
        rss_grown_mb: what the process was larger in the flood than at its peak.
        """
        times = {phase: milliseconds(self._took(phase), 50, 99) for phase in ("before", "flood", "after")}
        goodput = {phase: self._goodput(phase) for phase in ("peak", "flood")}
        return {
            "goodput_share": round(goodput["flood"] / goodput["peak"], 3) if goodput["peak"] else None,
            "shed_p99_ms": milliseconds(self._shed.tolist(), 99).get("p99"),
            "lost": self._lost,
            "accepted": len(self._accepted),
            "shed": len(self._shed),
            "peak_per_s": round(goodput["peak"], 1),
            **{f"{phase}_ms": found for phase, found in times.items()},
            "after_ratio": ratio(self._took("after"), self._took("before")),
            "rss_grown_mb": round((self._rss["flood"] - self._rss["peak"]) / 1e6, 1),
            "seconds": self.seconds,
            "seed": self.seed,
        }

    def _goodput(self, phase: str) -> float:
        """Return the answers a second of a phase, its first and last second left out where it is long enough."""
        ends = Counter(int(when) for which, when, _ in self._ends if which == phase)
        whole = sorted(ends)[1:-1] or sorted(ends)
        return sum(ends[second] for second in whole) / len(whole) if whole else 0.0

    def _took(self, phase: str) -> list[float]:
        return [took for which, _, took in self._ends if which == phase]

    async def _phase(self, engine: Engine, phase: str, rate: float, show: Show) -> None:
        began, sent, process = perf_counter(), 0, psutil.Process()
        while (now := perf_counter() - began) < self._seconds[phase]:
            while sent < rate * now:
                task = asyncio.create_task(self._send(engine, phase, began), name="flood")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                sent += 1
            if phase in self._rss:
                self._rss[phase] = max(self._rss[phase], process.memory_info().rss)
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
        self._accepted.append(number)
        await ticket.reply()
        now = perf_counter()
        self._ends.append((phase, now - began, now - came))


def ratio(after: list[float], before: list[float]) -> float | None:
    """Return the mean of one over that of the other; None where either has none."""
    return round(fmean(after) / fmean(before), 2) if after and before else None
