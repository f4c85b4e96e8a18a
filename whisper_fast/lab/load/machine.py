"""What a run takes of the machine: processor time and memory, workers included, and each processor's load."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import psutil

from ... import clock

__all__ = ["Load", "Machine"]

MIB: Final = 1 << 20


class Load(NamedTuple):
    """A look: CPU seconds so far, bytes of memory, and the share of each processor that was busy since the last."""

    cpu_seconds: float
    rss: int
    cores: list[float]


class Machine:
    """Looks at this process and its workers; a look takes some hundred microseconds."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._workers: dict[int, psutil.Process] = {}
        self._gone: dict[int, float] = {}  # CPU seconds of each worker when it was seen last
        self._begun = clock.monotonic()
        psutil.cpu_percent(percpu=True)
        self._cpu_at_start = self._cpu_seconds()
        self.rss_peak = 0
        self.busy: list[float] = []  # CPU shares of each processor, summed over the looks
        self.looks = 0

    def look(self) -> Load:
        """Look now; the peak is that of all looks."""
        rss = self._own.memory_info().rss + sum(map(memory, self._workers.values()))
        self.rss_peak = max(self.rss_peak, rss)
        cores = [share / 100 for share in psutil.cpu_percent(percpu=True)]
        self.busy = [a + b for a, b in zip(self.busy, cores, strict=True)] if self.looks else cores
        self.looks += 1
        return Load(self._cpu_seconds() - self._cpu_at_start, rss, cores)

    def _cpu_seconds(self) -> float:
        for number in offspring(self._own.pid):
            if number not in self._workers:
                try:
                    self._workers[number] = psutil.Process(number)
                except psutil.Error:
                    continue
        for number, worker in list(self._workers.items()):
            try:
                self._gone[number] = sum(worker.cpu_times()[:2])
            except psutil.Error:  # its time so far stays counted
                del self._workers[number]
        return sum(self._own.cpu_times()[:2]) + sum(self._gone.values())


def memory(process: psutil.Process) -> int:
    """Return the bytes that only this process has, 0 when it has ended: workers share most with who forked them."""
    try:
        found = process.memory_info()
    except psutil.Error:
        return 0
    return max(0, int(found.rss - getattr(found, "shared", 0)))


def offspring(number: int) -> set[int]:
    """Return the processes that a process has begun, and theirs; none where there is no /proc."""
    found = set()
    for file in Path(f"/proc/{number}/task").glob("*/children"):
        try:
            children = {int(child) for child in file.read_text().split()}
        except OSError:
            continue
        found |= children.union(*map(offspring, children))
    return found
