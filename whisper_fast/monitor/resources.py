"""One reading of every resource of the engine: how much of it was used, who waited for it, what it turned away.

The method is USE (utilisation, saturation, errors: Gregg, "Thinking Methodically about Performance", ACM Queue 10,
2012). What is a number at a moment is looked at `EVERY` so many seconds and averaged, what is counted is subtracted.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .. import clock
from .probe import Visits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ..batcher import MicroBatcher
    from ..cache import Cache
    from ..executor import Executor
    from ..lanes import Lanes
    from ..llm import LLMPool
    from ..pipeline import Pipeline
    from ..store.sqlite import Database
    from .budget import Budget
    from .probe import Probe
    from .record import Record

__all__ = ["Parts", "Reading", "Resources", "Station"]

READERS: Final = 2.0
RECENT: Final = 10  # readings for which refusals and errors are remembered: as long as turns pause after them
RATE_LIMITED: Final = "LLMRateLimited"


class Station(NamedTuple):
    """One resource over the time of a reading.

    servers   how many it serves at once, inf for as many as come; bytes for memory
    busy      how many it served, on average
    waiting   how many waited for it, on average
    inside    how many turns' work is in what it served: a batch has several
    done      how many it has ended; of a cache how many it has begun to load
    overflow  how many it turned away or put out for want of room

    Of models and caches, where the two do not fall into one reading, they are those of the last `RECENT` readings.
    """

    servers: float
    busy: float = 0.0
    waiting: float = 0.0
    inside: float = 0.0
    done: float = 0.0
    overflow: float = 0.0

    @property
    def utilisation(self) -> float:
        """The share of it that was used, 0 to 1."""
        return min(1.0, self.busy / self.servers) if self.servers else 0.0


class Reading(NamedTuple):
    """All stations over `seconds`, from `looks` at them.

    errors    those that ended turns lately, by their class
    through   what a component may wait for in its own place: names of stations, in their order
    squeezed  caches that the memory budget has made smaller than they were set
    line      which held the loop longest, "" for none
    late      the share of the time in which something due waited for the loop
    """

    seconds: float
    looks: int
    stations: Mapping[str, Station]
    errors: Mapping[str, float]
    through: Mapping[str, tuple[str, ...]]
    squeezed: frozenset[str] = frozenset()
    line: str = ""
    late: float = 0.0

    def of(self, kind: str) -> dict[str, Station]:
        """Return the stations called `kind something`, by that something."""
        return {name[len(kind) + 1 :]: one for name, one in self.stations.items() if name.startswith(f"{kind} ")}


class Parts(NamedTuple):
    """The parts of an engine that are looked at; `caches` and `batchers` by the component that waits for them."""

    lanes: Lanes
    database: Database
    executor: Executor
    pipeline: Pipeline
    llm: LLMPool
    budget: Budget
    record: Record
    probe: Probe
    batchers: Mapping[str, MicroBatcher[Any, Any]]
    caches: Mapping[str, Cache[Any, Any]]
    retrying: Callable[[], int]
    sending: Callable[[], int]


class Marks(NamedTuple):
    """What only grows, at one moment."""

    at: float
    counts: Mapping[str, tuple[float, float]]  # done and overflow of a station
    errors: Mapping[str, float]
    lines: Mapping[str, float]  # seconds that each line has held the loop
    lag: float
    processor: tuple[float, float]  # seconds of the process, and of the loop's thread
    visits: Visits


class Resources:
    """Reads the stations of `parts`: call `look` at regular times, and `read` for what was since the last reading."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._lately: defaultdict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._failed: deque[Counter[str]] = deque(maxlen=RECENT)
        self.begin()

    def begin(self) -> None:
        """Begin anew: what was until now is not read."""
        self._looks = 0
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
        self._marks = self._mark()

    @property
    def seconds(self) -> float:
        """How long the present reading has gone on."""
        return clock.monotonic() - self._marks.at

    def look(self) -> None:
        """Add what is so now to what `read` returns."""
        self._looks += 1
        for name, *numbers in self._now():
            sums = self._sums[name]
            for at, number in enumerate(numbers):
                sums[at] += number

    def read(self) -> Reading:
        """Return the means and counts since the last reading; at least one look was taken."""
        looks, sums, before = self._looks, self._sums, self._marks
        self.begin()
        after = self._marks
        seconds = max(1e-9, after.at - before.at)
        means = {name: Station(*(number / looks for number in numbers)) for name, numbers in sums.items()}
        stations = {name: self._counted(name, station, before, after) for name, station in means.items()}
        held, others = used(before, after)
        stations["loop"] = stations["loop"]._replace(busy=held)
        stations["interpreter"] = Station(1.0, others)
        self._failed.append(Counter(grown(before.errors, after.errors)))
        lines = grown(before.lines, after.lines)
        return Reading(
            seconds,
            looks,
            stations,
            sum(self._failed, Counter()),
            self._through(),
            frozenset(name for name in self._parts.caches if self._parts.budget.squeezes(self._parts.caches[name])),
            max(lines, key=lines.__getitem__, default=""),
            min(1.0, (after.lag - before.lag) / seconds),
        )

    def _now(self) -> Iterator[tuple[str, float, float, float, float]]:
        """Yield name, servers, busy, waiting and inside of every station."""
        parts = self._parts
        lanes, database = parts.lanes, parts.database
        threads, processes = parts.executor.threads, parts.executor.processes
        told, reading = database.waiting, float(database.reading)
        yield "turns", inf, lanes.places, 0.0, 0.0
        yield "slots", lanes.slots, lanes.running, lanes.waiting, 0.0
        yield "users", inf, lanes.users, max(0, lanes.longest - 1), 0.0
        yield "retries", inf, parts.retrying(), 0.0, 0.0
        yield "sender", inf, parts.sending(), 0.0, 0.0
        yield "disk", 1.0, database.writing, told * database.writing, 0.0
        yield "loop", 1.0, 0.0, told * (not database.writing), 0.0
        yield "reads", READERS, min(READERS, reading), max(0.0, reading - READERS), 0.0
        yield "threads", threads.size, threads.busy, threads.waiting, 0.0
        yield "processes", processes.size, processes.busy, processes.waiting, 0.0
        yield "memory", parts.budget.size, parts.budget.used, parts.budget.tightness, 0.0
        for name, turns in parts.pipeline.gathering().items():
            yield f"component {name}", inf, turns, 0.0, turns
        for name, cache in parts.caches.items():
            yield f"cache {name}", inf, cache.loading, 0.0, 0.0
        for name, batcher in parts.batchers.items():
            batches = batcher.stats()
            yield f"batch {name}", batcher.max_concurrent, batches.running, batches.waiting, batches.serving
        for endpoint in parts.llm.stats()["endpoints"]:
            name, limit = f"llm {endpoint['name']}", endpoint["limit"]
            yield name, limit, endpoint["in_flight"], endpoint["waiting"], 0.0

    def _mark(self) -> Marks:
        parts = self._parts
        loop = parts.record.loop
        return Marks(
            clock.monotonic(),
            dict(self._counts()),
            {name: counter.value for name, counter in parts.record.errors.items()},
            {line: counter.value for line, counter in loop.seconds.items()},
            loop.lag.sum,
            (time.process_time(), time.thread_time()),
            parts.probe.visits,
        )

    def _counts(self) -> Iterator[tuple[str, tuple[float, float]]]:
        parts = self._parts
        yield "threads", (parts.executor.threads.done, 0.0)
        yield "processes", (parts.executor.processes.done, 0.0)
        yield "disk", (parts.database.commits, 0.0)
        yield "memory", (0.0, parts.lanes.refused["memory"])
        for name, cache in parts.caches.items():
            stats = cache.stats()
            yield f"cache {name}", (stats.loads, stats.evictions + stats.refused)
        for endpoint in parts.llm.stats()["endpoints"]:
            yield f"llm {endpoint['name']}", (endpoint["calls"], endpoint["errors"].get(RATE_LIMITED, 0))

    def _counted(self, name: str, station: Station, before: Marks, after: Marks) -> Station:
        """Add what a station has ended and turned away, of some also what they had some readings before."""
        if name not in after.counts:
            return station
        (done, overflow), (done_before, overflow_before) = after.counts[name], before.counts[name]
        lately = self._lately[name]
        if not name.startswith(("llm ", "cache ")):
            lately.clear()
        lately.append((max(0.0, done - done_before), max(0.0, overflow - overflow_before)))
        return station._replace(done=sum(one for one, _ in lately), overflow=sum(one for _, one in lately))

    def _through(self) -> dict[str, tuple[str, ...]]:
        parts, pools = self._parts, ("processes", "threads")
        ways = {one.name: pools if one.asynchronous else ("threads",) for one in parts.pipeline.components}
        return {
            **ways,
            **{name: (f"cache {name}", "reads") for name in parts.caches},
            **{name: (f"batch {name}", *pools) for name in parts.batchers},
        }


def used(before: Marks, after: Marks) -> tuple[float, float]:
    """Return the share of time in which the loop was held, and in which other threads had the interpreter.

    A visit that waited and then found the loop at rest counts for the loop by its share of the processor's time.
    While others have the interpreter the loop stands in its callbacks through no fault of its own.
    """
    visits = after.visits.since(before.visits)
    whole, own = (now - then for now, then in zip(after.processor, before.processor, strict=True))
    share = min(1.0, own / whole) if whole > 0 else 1.0
    seen = max(1, visits.all)
    others = (1.0 - share) * visits.waited / seen
    held = (visits.held + share * visits.unsure) / seen
    return held * (1.0 - others), others


def grown(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: now - before.get(name, 0.0) for name, now in after.items() if now > before.get(name, 0.0)}
