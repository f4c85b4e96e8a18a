"""What the adaptive pool of threads finds, beside every fixed size: `python bench_adaptation.py [seconds]`.

Forty callers call one after the other: work that waits, work that computes in Python, and a mixture. A fixed pool of
each size gives the best throughput there is, and the size that brings 99 % of it. The adaptive pool starts at 8; its
throughput is that of the size that it has settled at, measured after the others, alternating with the best one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from whisper_fast import clock
from whisper_fast.executor import Executor
from whisper_fast.monitor import Adaptation
from whisper_fast.monitor.controls import PoolControl

CALLERS = 40
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40)
START, MOST = 8, 64


def compute(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(200))


def waits():
    time.sleep(0.02)


def computes():
    compute(0.002)


def both():
    compute(0.002)
    time.sleep(0.01)


async def calls(executor, work):
    while True:
        await executor.run(work, kind="thread")


async def rate(executor, seconds):
    done, began = executor.threads.done, clock.monotonic()
    await asyncio.sleep(seconds)
    return (executor.threads.done - done) / (clock.monotonic() - began)


async def fixed(executor, size, seconds):
    executor.resize(threads=size)
    await asyncio.sleep(0.2)
    return await rate(executor, seconds)


async def settled(executor, seconds):
    """Let the pool adapt; return the size that it came to."""
    executor.resize(threads=START)
    control = PoolControl(
        "threads",
        lambda: executor.threads,
        lambda size: executor.resize(threads=size),
        most=MOST,
        enabled=lambda: True,
    )
    adaptation = Adaptation((control,), busy=lambda: True)
    task = asyncio.create_task(adaptation.run())
    await asyncio.sleep(seconds)
    task.cancel()
    return int(control.climber.best), adaptation.moves


async def compare(work, seconds):
    async with Executor(START, 1) as executor:
        callers = [asyncio.create_task(calls(executor, work)) for _ in range(CALLERS)]
        rates = {size: await fixed(executor, size, 1.0) for size in SIZES}
        most = max(rates.values())
        best = min(size for size in SIZES if rates[size] >= 0.99 * most)
        found, moves = await settled(executor, seconds)
        pairs = [(await fixed(executor, found, 1.0), await fixed(executor, best, 1.0)) for _ in range(4)]
        ratio = sum(one for one, _ in pairs) / sum(other for _, other in pairs)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
    print(f"{work.__name__:9} fixed: " + " ".join(f"{size}:{rates[size]:.0f}" for size in SIZES))
    came = f"best fixed {best}, adaptive {found} after {moves} moves"
    print(f"{work.__name__:9} {came}: {found / best:.2f}x threads, {ratio:.1%} of its calls/s")


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, {seconds:g} s to adapt")
    for work in (waits, computes, both):
        asyncio.run(compare(work, seconds))


if __name__ == "__main__":
    main()
