"""The bottleneck: which one resource costs the turns that are under way most of their time now.

By Little's law (L = X * R; Little, Operations Research 9, 1961; for measured intervals of any system: Denning and
Buzen, "The Operational Analysis of Queueing Network Models", Computing Surveys 10, 1978) the mean number of turns at
a station is the time that all turns spend there in a second. So turns are counted where they are, and each is put
down to what keeps it there:

    at a component      the component; of those whose work waits for a thread or process: that pool. With others in
                        the interpreter for a share u of the time (utilisation law, u = X * D), u of what is in
                        threads is put down to the interpreter: more threads would not help
    at a cache's load   the cache, as far as it put out an entry for each that it loads; the disk's reads else; the
                        memory, where the budget has squeezed the cache
    in a batcher        for the next batch although another might run: the linger; else what its batches wait for
    for a slot          whatever those wait for who have one; the model's limit, where refusals have set it
    behind one's own    one user, as far as the longest lane is longer than the mean of the others; else what the
                        first ones of the lanes wait for
    between two tries   what the tries failed of
    on the way to disk  the disk while it writes; the loop where the disk has written and nobody could be told
    nowhere             the loop: they could go on if it let them

What stops everybody takes its share of time from all others' part: the loop while a callback holds it, the
interpreter while others have it and the loop is late (what is read from the disk holds it, too: that part is put
down to the reads), the memory while messages are refused or tasks stall for it; a message that is refused for memory
counts as a turn that the memory holds.

    share       turns put down to a resource / turns under way: what a turn would be faster by without that wait
    confidence  (first - second) / first * n / (n + 20), of n times that a turn was seen

Nothing is compared with a fixed mark, so it means the same at ten turns as at ten thousand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from .resources import Station

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .resources import Reading

__all__ = ["Blame", "Held", "blamed", "confidence"]

DOUBT: Final = 20.0  # times that a turn must be seen to be half sure
NOTHING: Final = Station(0.0)


class Held(dict[str, float]):
    """Turns by the resource that they are put down to."""

    @property
    def total(self) -> float:
        """How many turns that are."""
        return sum(self.values())

    def put(self, resource: str, turns: float) -> None:
        """Put turns down to a resource."""
        if turns > 0:
            self[resource] = self.get(resource, 0.0) + turns

    def share_out(self, turns: float, among: Mapping[str, float]) -> None:
        """Put turns down to several resources, in proportion to what is put down to each already."""
        total = sum(among.values())
        for resource, part in tuple(among.items()) if total > 0 else ():
            self.put(resource, turns * part / total)

    def faded(self, by: float) -> Held:
        """Return all of it multiplied by a factor."""
        return Held({resource: turns * by for resource, turns in self.items() if turns * by > 0})

    @property
    def ranks(self) -> list[tuple[str, float]]:
        """The resources with their turns, the first one first."""
        return sorted(self.items(), key=lambda item: -item[1])


class Blame(msgspec.Struct, frozen=True):
    """One resource: the share of all turns' time that is put down to it, and how much of it was used."""

    resource: str
    share: float
    utilisation: float
    waiting: float


def blamed(reading: Reading) -> Held:
    """Return how many turns are held by each resource, on average; their sum is at most the turns under way."""
    at = Held()
    stations = reading.stations
    slots = stations["slots"]
    holders = gathered(reading)
    ask(holders, reading, max(0.0, slots.busy - holders.total))
    at.share_out(holders.total, holders)
    at.share_out(slots.waiting, limited(reading, holders))
    at.put("disk", stations["disk"].waiting)
    at.put("loop", stations["loop"].waiting)
    at.share_out(stations["retries"].busy, failed(reading))
    behind(at, stations)
    return stopped(reading, at)


# ---- turns that gather


def gathered(reading: Reading) -> Held:
    """Return the turns that wait for components, by what those wait for."""
    at = Held()
    components = reading.of("component")
    sure = sum(one.busy for name, one in components.items() if reading.through.get(name) == ("threads",))
    for name, one in components.items():
        spread(at, reading, name, one.busy, sure)
    return at


def spread(at: Held, reading: Reading, name: str, turns: float, sure: float) -> None:
    """Put the turns at one component down; `sure` turns are in threads for certain, so no others' calls are."""
    calls = turns
    for way in reading.through.get(name, ()):
        station = reading.stations.get(way, NOTHING)
        if way.startswith("cache "):
            turns -= loaded(at, reading, way, turns)
        elif way.startswith("batch "):
            turns -= lingered(at, way, station, turns)
            calls = station.busy
        elif way in ("threads", "processes") and calls > 0:
            known = reading.through[name] == ("threads",)
            there = station.busy + station.waiting - (sure if way == "threads" and not known else 0.0)
            turns -= pooled(at, reading, way, turns * min(1.0, max(0.0, there) / calls))
    at.put(f"component {name}", turns)


def loaded(at: Held, reading: Reading, way: str, turns: float) -> float:
    """Put turns that wait for a load down; return how many."""
    cache, name = reading.stations[way], way.removeprefix("cache ")
    here = min(turns, cache.busy)
    again = here * min(1.0, cache.overflow / cache.done) if cache.done else 0.0
    at.put("memory" if name in reading.squeezed else way, again)
    at.put("reads", here - again)
    return here


def lingered(at: Held, way: str, batch: Station, turns: float) -> float:
    """Put turns down that wait for the next batch although one more might run; return how many."""
    here = batch.waiting + batch.inside
    if not here:
        return 0.0
    free = 1.0 - batch.utilisation
    waiting = turns * batch.waiting / here * free
    at.put(way, waiting)
    return waiting


def pooled(at: Held, reading: Reading, way: str, turns: float) -> float:
    """Put turns whose calls are in a pool down, as far as they wait; return how many."""
    pool = reading.stations[way]
    others = reading.stations["interpreter"].busy if way == "threads" else 0.0
    calls = pool.busy + pool.waiting
    waiting = turns * (1.0 - others) * pool.waiting / calls if calls else 0.0
    at.put("interpreter", turns * others)
    at.put(way, waiting)
    return turns * others + waiting


# ---- turns at a model, and those before and after


def ask(at: Held, reading: Reading, turns: float) -> None:
    """Put down turns that ask a model: to the model, or to the limit that its refusals set.

    Who has a slot and is not seen at a model pauses after an error, or could go on if the loop were free.
    """
    models = reading.of("llm")
    calls = sum(one.busy + one.waiting for one in models.values())
    part = min(1.0, turns / calls) if calls else 0.0
    for name, one in models.items():
        at.put(f"llm {name}", part * one.busy)
        at.put(f"llm limit {name}" if one.overflow else f"llm {name}", part * one.waiting)
    rest = turns - part * calls
    causes = Held({name: number for name, number in failed(reading).items() if name.startswith("llm ")})
    at.share_out(rest, causes or {"loop": 1.0})


def limited(reading: Reading, holders: Held) -> Held:
    """Return what a wait for a slot is put down to: a limit made by refusals, where it holds anybody."""
    shifted = Held(holders)
    for name, one in reading.of("llm").items():
        if one.overflow:
            shifted.put(f"llm limit {name}", shifted.pop(f"llm {name}", 0.0))
    return shifted


def failed(reading: Reading) -> Held:
    """Return what the tries failed of lately."""
    causes, models = Held(), reading.of("llm")
    for error, number in reading.errors.items():
        if error == "LLMRateLimited":
            causes.share_out(number, {f"llm limit {name}": one.overflow for name, one in models.items()})
        elif error.startswith("LLM") or error == "DeadlineExceeded":
            causes.share_out(number, {f"llm {name}": 1.0 for name in models})
        elif error.startswith("Store"):
            causes.put("disk", number)
    return causes


def behind(at: Held, stations: Mapping[str, Station]) -> None:
    """Put down the turns that wait behind their own user's, those that are being sent, and those that are nowhere."""
    turns, users, slots = stations["turns"].busy, stations["users"], stations["slots"]
    on_disk = stations["disk"].waiting + stations["loop"].waiting
    first = max(0.0, users.busy - slots.waiting - slots.busy - stations["retries"].busy)  # on the disk, or being sent
    waiting = max(0.0, turns - users.busy - max(0.0, on_disk - first))
    longest = min(waiting, users.waiting)
    mean = (waiting - longest) / (users.busy - 1) if users.busy > 1 else 0.0
    flood = max(0.0, longest - mean)
    heads = Held(at)
    at.put("sender", min(stations["sender"].busy, first - on_disk))
    at.put("loop", first - on_disk - stations["sender"].busy)
    at.put("one user", flood)
    at.share_out(waiting - flood, heads)


def stopped(reading: Reading, at: Held) -> Held:
    """Return the same after what stops everybody has taken its share of all turns' time."""
    stations, total = reading.stations, max(reading.stations["turns"].busy, at.total)
    memory, interpreter = stations["memory"], stations["interpreter"]
    stops = {
        "memory": min(1.0, memory.waiting),
        "loop": stations["loop"].busy,
        "interpreter": interpreter.busy * reading.late,
    }
    for name, share in stops.items():
        before, at = at, at.faded(1.0 - share)
        by_reads = reading_share(before, stations) if name == "interpreter" else 0.0
        at.put(name, share * total * (1.0 - by_reads))
        at.share_out(share * total * by_reads, loads(before))
    at.put("memory", memory.overflow * stops["memory"])
    return at


def reading_share(at: Held, stations: Mapping[str, Station]) -> float:
    """Return the part of others' use of the interpreter that is due to what is read from the disk."""
    reads, threads = stations["reads"].busy, stations["threads"].busy
    return reads / (reads + threads) if reads and loads(at) else 0.0


def loads(at: Held) -> dict[str, float]:
    return {name: turns for name, turns in at.items() if name == "reads" or name.startswith("cache ")}


def confidence(first: float, second: float, seen: float) -> float:
    """Return how sure the first place is, 0 to 1."""
    return (first - second) / first * seen / (seen + DOUBT) if first > 0 else 0.0
