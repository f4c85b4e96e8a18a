"""Open-loop load: messages come at their own times, whether the engine keeps up or not.

A message's time counts from the moment it was
due, not from the moment we came round to send it, so that a stall of ours is not left out of the figures. A user who
writes again before the reply waits for it, as promised: `total_ms` holds that wait, `added_ms` does not.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil

from .. import clock
from ..engine import Engine
from ..errors import Overloaded, WhisperFastError
from ..llm import SimulatedLLM
from ..settings import Settings
from . import audit, users
from .figures import Figures
from .pace import Pace
from .traffic import Sessions, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .traffic import Arrival

__all__ = ["load"]

LOOK = 0.25  # seconds between two looks at the process


async def load(
    traffic: Traffic, *, llm_latency: float, data_dir: Path | None = None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run the traffic against an engine in this process and return the figures; the journal is audited at the end.

    The model's calls may all be in flight at once. `data_dir` None uses a temporary one. Raises StoreError.
    """
    with folder(data_dir) as place:
        settings = Settings(data_dir=place, max_concurrent_requests=max(50, traffic.users))
        run = Run(traffic, llm_latency)
        async with Engine.open(settings, llm=SimulatedLLM(latency=llm_latency)) as engine:
            await run.drive(engine, progress)
        return run.report(place)


@contextmanager
def folder(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        yield data_dir
        return
    with TemporaryDirectory(prefix="whisper-fast-load-") as temporary:
        yield Path(temporary)


class Run:
    """One run: what was sent, what came back, and what it cost."""

    def __init__(self, traffic: Traffic, llm_latency: float) -> None:
        self.traffic = traffic
        self.figures = Figures(0, llm_latency)
        self.answered: list[str] = []
        self.errors = 0
        self.shed = 0
        self.out_of_order = 0
        self.in_flight_peak = 0
        self.cpu_seconds = 0.0
        self.wall_seconds = 0.0
        self.rss_peak = 0
        self._last: dict[int, tuple[int, float]] = {}  # a user's last answered number, and when
        self._running: set[asyncio.Task[None]] = set()

    async def drive(self, engine: Engine, progress: Callable[[str], None]) -> None:
        """Send every message when it is due and wait for the last reply."""
        process = psutil.Process()
        cpu = sum(process.cpu_times()[:2])
        self.figures.start()
        pace = Pace(Sessions(self.traffic), partial(self._send, engine), self.figures.began)
        sending = asyncio.create_task(pace.run(), name="load:pace")
        while not sending.done():
            self._look(process, progress, clock.monotonic() - self.figures.began)
            await asyncio.wait([sending], timeout=LOOK)
        await sending
        while self._running:
            self._look(process, progress, clock.monotonic() - self.figures.began)
            await asyncio.wait(self._running, timeout=LOOK)
        self.wall_seconds = clock.monotonic() - self.figures.began
        self.cpu_seconds = sum(process.cpu_times()[:2]) - cpu

    def report(self, data_dir: Path) -> dict[str, Any]:
        """Return the figures; reads the journal, so the engine has to be closed."""
        turns = len(self.answered)
        return {
            "turns": turns,
            "turns_per_s": round(self.figures.turns_per_s, 2),
            "errors": self.errors,
            "shed": self.shed,
            "lost": audit.lost(data_dir, self.answered),
            "duplicated": audit.duplicated(data_dir),
            "out_of_order": self.out_of_order,
            "in_flight_peak": self.in_flight_peak,
            "added_ms": self.figures.added_ms(50, 99, 99.9),
            "total_ms": self.figures.total_ms(50, 99, 99.9),
            "cpu_us_per_turn": round(self.cpu_seconds / turns * 1e6, 1) if turns else None,
            "cpu_utilization": round(self.cpu_seconds / self.wall_seconds / (os.cpu_count() or 1), 4),
            "rss_peak_mb": round(self.rss_peak / 1e6, 1),
            "wall_seconds": round(self.wall_seconds, 3),
            **asdict(self.traffic),
        }

    def _send(self, engine: Engine, arrival: Arrival) -> None:
        name = f"load:{arrival.user}-{arrival.number}"
        task = asyncio.get_running_loop().create_task(self._turn(engine, arrival), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        self.in_flight_peak = max(self.in_flight_peak, len(self._running))

    async def _turn(self, engine: Engine, arrival: Arrival) -> None:
        message = users.message(arrival.user, arrival.number, self.traffic.seed)
        try:
            await engine.respond(message)
        except Overloaded:
            self.shed += 1
        except WhisperFastError:
            self.errors += 1
        else:
            self._answered(arrival, message.id, clock.monotonic() - self.figures.began)

    def _answered(self, arrival: Arrival, message_id: str, now: float) -> None:
        number, replied = self._last.get(arrival.user, (-1, 0.0))
        self.figures.note(now - arrival.at, queued=max(0.0, replied - arrival.at))
        self.answered.append(message_id)
        self.out_of_order += arrival.number < number
        self._last[arrival.user] = arrival.number, now

    def _look(self, process: psutil.Process, progress: Callable[[str], None], now: float) -> None:
        self.rss_peak = max(self.rss_peak, process.memory_info().rss)
        progress(f"{now:5.1f} s  {len(self.answered)} turns  {len(self._running)} in flight  {self.shed} shed")
