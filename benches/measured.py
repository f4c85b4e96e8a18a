"""Peers that take turns within one run, and a model that costs nothing."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import uvloop

from whisper_fast.llm import Completion
from whisper_fast.message import Delta

MESSAGES = [
    {"role": "system", "content": "You are kind.\n" + "\n".join(f"- memory number {n}" for n in range(10))},
    {"role": "user", "content": "where did I leave my umbrella?"},
]
ANSWER = Completion(text="there")
TURNS = 15


class Instant:
    """A provider that answers at once, so that only what stands above it costs."""

    name = "instant"

    async def chat(self, messages, **params):
        return ANSWER

    async def stream(self, messages, **params):
        for _ in range(200):
            yield Delta("word")

    async def close(self):
        pass


async def times(call, calls):
    """Return the microseconds that one of `calls` calls in sequence takes."""
    begin = perf_counter()
    for _ in range(calls):
        await call()
    return (perf_counter() - begin) / calls * 1e6


async def compared(peers, calls):
    """Return the median microseconds of each peer, which take turns so that the machine's moods hit all alike."""
    seen = {name: [] for name in peers}
    for _ in range(TURNS):
        for name, call in peers.items():
            seen[name].append(await times(call, calls))
    return {name: median(values) for name, values in seen.items()}


async def alternated(peers, calls):
    """Return the median microseconds of each peer's single calls, which take turns one by one.

    Over a socket a call costs more than its peers differ by; so neighbours in time are compared, not blocks.
    """
    seen = {name: [] for name in peers}
    for _ in range(calls):
        for name, call in peers.items():
            begin = perf_counter()
            await call()
            seen[name].append((perf_counter() - begin) * 1e6)
    return {name: median(values) for name, values in seen.items()}


def reported(benchmark, what, medians, units=1):
    """Print the medians and their distances and ratios to the first of them."""
    base = next(iter(medians.values()))
    for name, value in medians.items():
        line = f"{what}, {name}: {value / units:8.2f} us"
        print(line if value is base else f"{line}  (+{(value - base) / units:.2f} us, x{value / base:.2f})")
        benchmark.extra_info[f"{name}_us"] = round(value / units, 2)


def run(benchmark, measure):
    """Run `measure()` once on uvloop under pytest-benchmark."""
    return benchmark.pedantic(lambda: uvloop.run(measure()), rounds=1)
