"""The batcher's linger: what the control settles at, beside every fixed one: `python bench_linger.py [seconds]`.

Sixty callers ask one after the other, in batches of at most 8: of a model on one processor, where a batch waits for
the one before, and of a server that takes several at once. The score is items a second; the control starts at 1 s.
"""

from __future__ import annotations

import asyncio
import os
import sys

from whisper_fast import clock
from whisper_fast.batcher import MicroBatcher
from whisper_fast.monitor import Adaptation
from whisper_fast.monitor.controls import LingerControl

CALLERS, LARGEST = 60, 8
LINGERS = (0.001, 0.005, 0.02, 0.05, 0.1, 1.0)


class Serial:
    """One batch at a time: 5 ms and 0.5 ms an item."""

    def __init__(self):
        self.free = asyncio.Lock()

    async def __call__(self, items):
        async with self.free:
            await asyncio.sleep(0.005 + 0.0005 * len(items))
        return items


class Remote:
    """Several at once: 40 ms, whatever is in a batch."""

    async def __call__(self, items):
        await asyncio.sleep(0.04)
        return items


async def asks(batcher):
    while True:
        await batcher.submit(1)


async def rate(batcher, linger, seconds):
    batcher.max_wait = linger
    await asyncio.sleep(0.3)
    done, began = batcher.stats().items, clock.monotonic()
    await asyncio.sleep(seconds)
    return (batcher.stats().items - done) / (clock.monotonic() - began)


async def settled(batcher, seconds):
    batcher.max_wait = max(LINGERS)
    adaptation = Adaptation((LingerControl("bench", batcher, enabled=lambda: True),), busy=lambda: True)
    task = asyncio.create_task(adaptation.run())
    await asyncio.sleep(seconds)
    task.cancel()
    return adaptation.stats()["linger bench"]["best"], adaptation.moves


async def compare(kind, seconds):
    async with MicroBatcher(kind(), max_batch=LARGEST) as batcher:
        callers = [asyncio.create_task(asks(batcher)) for _ in range(CALLERS)]
        rates = {linger: await rate(batcher, linger, 1.0) for linger in LINGERS}
        best = max(rates, key=rates.__getitem__)
        found, moves = await settled(batcher, seconds)
        pairs = [(await rate(batcher, found, 1.0), await rate(batcher, best, 1.0)) for _ in range(4)]
        ratio = sum(one for one, _ in pairs) / sum(other for _, other in pairs)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
    name = kind.__name__.lower()
    print(f"{name:7} fixed: " + " ".join(f"{linger * 1000:g}ms:{rates[linger]:.0f}" for linger in LINGERS))
    came = f"best fixed {best * 1000:g} ms, adaptive {found * 1000:.1f} ms after {moves} moves"
    print(f"{name:7} {came}: {ratio:.1%} of its items/s")


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {seconds:g} s to adapt")
    for kind in (Serial, Remote):
        asyncio.run(compare(kind, seconds))


if __name__ == "__main__":
    main()
