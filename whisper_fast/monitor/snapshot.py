"""What the operator looks at, once a second: everything that is known of a running engine, as plain values for JSON.

It is read from `Engine.stats()` and the record of the turns alone, so that page, metrics and library show the same
numbers. Nothing of what users wrote is in it, and no user's name. What is not measured is not there.

    at, uptime_s     epoch seconds; seconds since the first snapshot could have been taken
    health           ready; `problems`: kind and text of each thing that an operator should see to
    traffic          messages: accepted and answered a second, in flight, waiting, refused by reason
    bottleneck       what limits now, how sure that is, and what to do; `resource` is "" while nothing is under way
    replies          seconds until the reply, split into `llm` and `ours`: count, p50, p95, p99 of the last minute
    stages           the same for every stage and component, with how often it was missing
    endpoints        each language model: breaker, limit and why it was moved last, latency, errors
    batchers         items and calls; `fill` is the share of `max_batch` that a batch had on average
    caches           hit ratio, bytes held and the present bound
    memory           what the process holds against its budget, and the latest changes of the budget
    loop             `lag`: how late the event loop was lately; the lines that held it since the start
    slowest          the slowest replies of the last minutes as waterfalls
    flags            every optimisation: whether it is on, what it does, how often it failed, whether it rests
    flag_changes     the latest changes of flags, each with its reason
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .. import clock
from .window import Percentiles, Rates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ..flags import Flags
    from .record import Record

__all__ = ["Snapshots"]

COUNTED: Final = ("accepted", "answered", "failed", "duplicates", "lost", "doubled", "shed", "partial")
NOW: Final = ("in_flight", "in_flight_limit", "running", "slots", "waiting", "oldest_waiting", "retrying", "refused")
SHOWN: Final = 10  # slowest replies, lines that held the loop, changes of the budget


class Snapshots:
    """Takes snapshots of one engine; rates and percentiles look back as far as somebody has looked before."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Any]],
        record: Record | None,
        flags: Flags,
        ready: Callable[[], Mapping[str, object]],
    ) -> None:
        self._stats = stats
        self._record = record
        self._flags = flags
        self._ready = ready
        self._born = clock.monotonic()
        self._rates = Rates(COUNTED)
        self._recorded = Recorded(record) if record is not None else None

    def take(self) -> dict[str, Any]:
        """Return everything as it is now."""
        stats = self._stats()
        shown = {
            "at": clock.wall(),
            "uptime_s": clock.monotonic() - self._born,
            "traffic": {
                **{name: stats[name] for name in (*COUNTED, *NOW)},
                **self._rates.look(stats),
            },
            "endpoints": stats["llm"]["endpoints"],
            "batchers": [batcher(name, counts) for name, counts in stats["batchers"].items()],
            "caches": list(caches(stats)),
            **({"bottleneck": stats["bottleneck"]} if "bottleneck" in stats else {}),
            "memory": {**stats["budget"], "history": stats["budget"]["history"][-SHOWN:]},
            **switches(self._flags),
            **(self._recorded.take(stats["loop"]) if self._recorded is not None else {}),
        }
        return {**shown, "health": health(self._ready(), shown)}


class Recorded:
    """The part of a snapshot that only an engine that monitors itself has."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._replies = Percentiles(record.replies.items)
        self._stages = Percentiles(record.stages.items)
        self._lag = Percentiles(lambda: [("lag", record.loop.lag)])

    def take(self, loop: Mapping[str, Any]) -> dict[str, Any]:
        """Return replies, stages, errors, loop and slowest."""
        record = self._record
        missing = {name: counter.value for name, counter in record.missing.items()}
        return {
            "replies": {**self._replies.look(), "over_s": self._replies.seconds},
            "stages": [{"name": k, **v, "missing": missing.get(k, 0)} for k, v in self._stages.look().items()],
            "errors": {name: counter.value for name, counter in record.errors.items()},
            "loop": {**loop, **self._lag.look(), "lines": loop["lines"][:SHOWN]},
            "slowest": [one.as_dict() for one in record.slowest()[:SHOWN]],
        }


def switches(flags: Flags) -> dict[str, Any]:
    told = flags.described()
    return {"flags": told["flags"], "flag_changes": told["changes"][:SHOWN]}


def batcher(name: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return a batcher's counters with its fill, None before the first batch."""
    batched = counts["items"] - counts["direct"] - counts["waiting"]
    batches = counts["batches"]
    return {"name": name, **counts, "fill": batched / batches / counts["max_batch"] if batches else None}


def caches(stats: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every cache with its hit ratio, None before the first question."""
    bounds = stats["budget"]["bounds"]
    named = (("memories", "memory", "segments"), ("conversations", "conversation", "conversations"))
    return [
        {
            "name": name,
            "hits": (part := stats[key])["hits"],
            "misses": part["misses"],
            "ratio": part["hits"] / asked if (asked := part["hits"] + part["misses"]) else None,
            "bytes": part["bytes"],
            "bound": bounds[bound],
            "evictions": part["evictions"],
        }
        for name, key, bound in named
    ]


def health(ready: Mapping[str, object], shown: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether messages are taken, and a sentence for each thing that an operator should see to."""
    found = [*of_store(ready), *of_models(shown["endpoints"]), *of_traffic(shown)]
    return {"ready": ready["ready"], "problems": [{"kind": kind, "text": text} for kind, text in found]}


def of_store(ready: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    told = [(kind, str(ready[kind])) for kind in ("store", "damage") if ready.get(kind, "ok") != "ok"]
    yield from told
    if not ready["ready"] and not told:
        yield "stopping", "The engine is stopping and takes no new messages."


def of_models(endpoints: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for one in endpoints:
        if one["breaker"] != "closed":
            yield (
                f"breaker {one['name']}",
                f"{one['name']} keeps failing and is left alone; it is tried again by itself.",
            )
        elif one["shut_for"]:
            yield f"pause {one['name']}", f"{one['name']} asked to be left alone for {one['shut_for']:.0f} s more."


def of_traffic(shown: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    traffic = shown["traffic"]
    if traffic["lost"] or traffic["doubled"]:
        yield "lost", f"{traffic['lost']} messages were lost and {traffic['doubled']} answered twice: see the log."
    if shown["memory"]["shedding"]:
        yield "memory", "Memory is short: new messages are refused (WHISPER_FAST_MEMORY_BUDGET)."
    if traffic["shed_per_s"]:
        yield "shed", f"{traffic['shed_per_s']:.1f} messages a second are refused."
    if resting := [flag["name"] for flag in shown["flags"] if flag["resting"]]:
        yield "flags", f"Switched off by itself because it failed, to be tried again: {', '.join(resting)}."
    if traffic["retrying"]:
        yield "retrying", f"{traffic['retrying']} messages have failed and wait to be tried again."
