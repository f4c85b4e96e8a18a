"""Promise 1 and 2 under `kill -9`: every message that was accepted is answered and remembered, exactly once.

Each kill ends a child process (`victim`) by SIGKILL, half of them at a random moment, its start and its recovery
included, half at a named point (`points`). The next child opens what the last one left. After every `ROUND` kills a
last child finishes what is open, and the folder is audited from outside (`lab/audit.py`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from contextlib import suppress
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ...errors import StoreError
from ..audit import Ledger
from .points import POINTS
from .proof import Proof
from .victim import Life

if TYPE_CHECKING:
    from pathlib import Path

    from .proof import Show

__all__ = ["Crash"]

ROUND = 50  # kills on one data folder
LONGEST = 0.4  # seconds a child lives at most before a random kill
PATIENCE = 5.0  # seconds in which a named point comes by, or the child is killed wherever it is
ENDING = 120.0  # seconds the last child of a round may take
VICTIM = (sys.executable, "-P", "-m", "whisper_fast.lab.prove.victim")


class Child:
    """The process that lives now."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.killed = False

    def kill(self) -> None:
        """Kill it from here, at whatever it is doing."""
        with suppress(ProcessLookupError):  # it has just died by itself, at its point
            os.kill(self.pid, signal.SIGKILL)
            self.killed = True


class Crash(Proof):
    """`kills` kills of an engine that is answering; `victim` is the command that starts the process to be killed."""

    name = "crash"
    must_be_zero = ("lost", "duplicated")
    must_not_be_zero = ("accepted", "heard")

    def __init__(self, kills: int = 100, seed: int = 0, victim: tuple[str, ...] = VICTIM) -> None:
        self.arguments = f"--kills {kills} --seed {seed}"
        self.kills = kills
        self.seed = seed
        self.at: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self._random = Random(seed)
        self._victim = victim
        self._process: asyncio.subprocess.Process | None = None
        self._began = perf_counter()

    async def run(self, folder: Path, show: Show) -> None:
        """Kill, and audit after each round. Raises StoreError when a child ends that nobody killed."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._victim, stdin=pipe, stdout=pipe, start_new_session=True
        )
        self._began = perf_counter()
        try:
            while (done := self.at.total()) < self.kills:
                await self._round(folder / str(done), min(ROUND, self.kills - done), show)
            cast("asyncio.StreamWriter", self._process.stdin).close()
        except BaseException:  # whoever waits has gone: nobody is left behind
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        finally:
            await self._process.wait()

    def figures(self) -> dict[str, Any]:
        """Return kills, accepted, lost, duplicated; heard: answers that came; at: kills at each point."""
        names = ("accepted", "lost", "duplicated", "heard")
        return {
            "kills": self.at.total(),
            **{name: self.counts[name] for name in names},
            "at": dict(sorted(self.at.items())),
            "seconds": round(perf_counter() - self._began, 1),
            "seed": self.seed,
        }

    async def _round(self, folder: Path, kills: int, show: Show) -> None:
        ledger = Ledger()
        for number in range(1, kills + 1):
            await self._life(self._drawn(folder, number), ledger)
            show(self.at.total() / self.kills, f"{self.at.total()} kills, {self.counts['accepted']} accepted")
        status = await self._life(Life(str(folder), kills + 1, self.seed, last=True), ledger)
        if status:
            raise StoreError(
                f"the engine did not finish after {self.at.total()} kills: its process ended with {status}"
            )
        self.counts["lost"] += ledger.lost(folder)
        self.counts["duplicated"] += ledger.duplicated(folder)
        self.counts["accepted"] += len(ledger.accepted)
        self.counts["heard"] += len(ledger.heard)

    def _drawn(self, folder: Path, number: int) -> Life:
        point = self._random.choice(tuple(POINTS)) if self._random.random() < 0.5 else None
        return Life(str(folder), number, self.seed, point=point, passes=self._random.randint(1, 60))

    async def _life(self, life: Life, ledger: Ledger) -> int:
        """Let a child live and die; return its wait status."""
        process = cast("asyncio.subprocess.Process", self._process)
        cast("asyncio.StreamWriter", process.stdin).write(msgspec.json.encode(life) + b"\n")
        words = (await self._line()).split()
        alive = (PATIENCE if life.point else self._random.uniform(0.0, LONGEST)) if not life.last else ENDING
        child = Child(int(words[1]))
        timer = asyncio.get_running_loop().call_later(alive, child.kill)
        try:
            while not (line := await self._line()).startswith("dead"):
                ledger.note(line)
        finally:
            timer.cancel()
        status = int(line.split()[1])
        if not life.last:
            if status != signal.SIGKILL:
                raise StoreError(f"a child ended by itself with the status {status}; its stderr says why")
            self.at["random" if child.killed or life.point is None else life.point] += 1
        return status

    async def _line(self) -> str:
        process = cast("asyncio.subprocess.Process", self._process)
        line = await cast("asyncio.StreamReader", process.stdout).readline()
        if not line:
            raise StoreError("the process that starts the children has ended; its stderr says why")
        return line.decode().strip()
