"""What to do about a bottleneck: a sentence with what was seen, the setting to change, and the effect to expect.

How many servers a station wants follows from Little's law: as many as are served and wait there now.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Final

from .resources import Station

if TYPE_CHECKING:
    from collections.abc import Callable

    from .resources import Reading

__all__ = ["advice"]

NOTHING: Final = Station(0.0)
CACHES: Final = {
    "recall": "WHISPER_FAST_MEMORY_CACHE_BYTES",
    "conversation": "WHISPER_FAST_CONVERSATION_CACHE_BYTES",
}


def advice(resource: str, share: float, reading: Reading) -> str:
    """Return the sentence for a resource that costs `share` of all turns' time."""
    kind, _, name = resource.partition(" ")
    say = SAYS.get(resource) or SAYS.get("llm limit" if resource.startswith("llm limit ") else kind, unknown)
    name = name.removeprefix("limit ") if kind == "llm" else name
    station = reading.stations.get(resource.replace("llm limit ", "llm "), NOTHING)
    return f"{say(name, station, reading)} Without that a turn would take up to {share:.0%} less."


def component(name: str, station: Station, _: Reading) -> str:
    return (
        f"{station.busy:.1f} turns wait for the component {name} itself, and for nothing that the engine could give "
        f"it: make {name} faster, or give it a shorter deadline (component(..., deadline=), "
        "WHISPER_FAST_COMPONENT_DEADLINE)."
    )


def pool(setting: str, what: str) -> Callable[[str, Station, Reading], str]:
    def say(_: str, station: Station, __: Reading) -> str:
        wanted = ceil(station.busy + station.waiting)
        return (
            f"{station.waiting:.1f} calls wait for {station.servers:.0f} {what} that are {station.utilisation:.0%} "
            f"busy: raise {setting} towards {max(wanted, round(station.servers) + 1)}."
        )

    return say


def linger(name: str, station: Station, _: Reading) -> str:
    return (
        f"{station.waiting:.1f} items of {name} wait for the next batch while {station.busy:.1f} of "
        f"{station.servers:.0f} batches run: lower BATCH_TIMEOUT_MS, or raise BATCH_SIZE."
    )


def cache(name: str, station: Station, _: Reading) -> str:
    setting = CACHES.get(name, "the cache's size")
    return (
        f"the cache behind {name} put out {station.overflow:.0f} entries and read {station.done:.0f} again: "
        f"raise {setting} until what active users need fits."
    )


def disk(_: str, station: Station, __: Reading) -> str:
    return (
        f"{station.waiting:.1f} writes wait for the disk, which is {station.utilisation:.0%} busy: put "
        "WHISPER_FAST_DATA_DIR on a disk with a faster fsync; what is answered stays on the disk first in any case."
    )


def reads(_: str, station: Station, __: Reading) -> str:
    return (
        f"{station.busy + station.waiting:.1f} questions are with the disk's readers: put WHISPER_FAST_DATA_DIR on a "
        "faster disk, or raise WHISPER_FAST_MEMORY_CACHE_BYTES so that fewer are asked."
    )


def model(name: str, station: Station, reading: Reading) -> str:
    waiting = station.waiting + reading.stations["slots"].waiting
    return (
        f"the model {name} has {station.busy:.1f} calls of at most {station.servers:.0f} in flight and {waiting:.1f} "
        "turns wait for it: take a faster model, add a server (WHISPER_FAST_LLM_FALLBACK_URLS), or raise "
        "MAX_CONCURRENT_REQUESTS if it bears more."
    )


def rate(name: str, station: Station, _: Reading) -> str:
    return (
        f"the model {name} refused {station.overflow:.0f} calls for their rate and {station.servers:.0f} are let "
        "through: ask its owner for a higher limit, or add a server (WHISPER_FAST_LLM_FALLBACK_URLS)."
    )


def loop(_: str, station: Station, reading: Reading) -> str:
    line = f", longest by {reading.line}" if reading.line else ""
    return (
        f"the event loop is held for {station.busy:.0%} of the time{line}: let what blocks run in a thread (register "
        "it as a plain function, not as a coroutine), or share the users among more engines."
    )


def interpreter(_: str, station: Station, reading: Reading) -> str:
    return (
        f"threads hold the interpreter for {station.busy:.0%} of the time while "
        f"{reading.stations['threads'].busy:.1f} are at work: move what computes to a process "
        '(Executor.run(kind="process"), PROCESS_POOL_SIZE); more threads do not help.'
    )


def memory(_: str, station: Station, __: Reading) -> str:
    return (
        f"{station.busy / (1 << 20):.0f} MiB of {station.servers / (1 << 20):.0f} are used and caches gave way or "
        f"messages were refused ({station.overflow:.0f}): give the container more memory, and raise "
        "WHISPER_FAST_MEMORY_BUDGET with it."
    )


def one_user(_: str, __: Station, reading: Reading) -> str:
    return (
        f"{reading.stations['users'].waiting:.0f} messages of one user wait behind that user's own: nobody else "
        'waits for them; WHISPER_FAST_WHEN_BUSY="merge" or "drop" keeps such lanes short.'
    )


def sender(_: str, __: Station, ___: Reading) -> str:
    return "turns wait for their platform's sender (Engine.on_reply): let it return sooner."


def unknown(name: str, _: Station, __: Reading) -> str:
    return f"turns wait for {name}."


SAYS: Final[dict[str, Callable[[str, Station, Reading], str]]] = {
    "component": component,
    "threads": pool("THREAD_POOL_SIZE", "threads"),
    "processes": pool("PROCESS_POOL_SIZE", "worker processes"),
    "batch": linger,
    "cache": cache,
    "disk": disk,
    "reads": reads,
    "llm": model,
    "llm limit": rate,
    "loop": loop,
    "interpreter": interpreter,
    "memory": memory,
    "one user": one_user,
    "sender": sender,
}
