"""A thread hop and a process round trip, beside run_in_executor over concurrent.futures' pools.

Goals: a hop at most 15 us and at least twice as fast as run_in_executor; a process round trip at most 60 us.
"""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from time import perf_counter

import uvloop

from whisper_fast.executor import Executor

HOPS = 2000
AT_ONCE = 64
THREADS = 8


def nothing():
    """The hop is all that is measured."""


async def in_a_row(call, count=HOPS):
    for _ in range(count // 10):
        await call()
    begin = perf_counter()
    for _ in range(count):
        await call()
    return (perf_counter() - begin) / count * 1e6


async def at_once(call, count=HOPS):
    begin = perf_counter()
    for _ in range(count // AT_ONCE):
        await asyncio.gather(*(call() for _ in range(AT_ONCE)))
    return (perf_counter() - begin) / (count // AT_ONCE * AT_ONCE) * 1e6


async def learnt(executor):
    """Return the cost of a call of a function that `auto` has learnt to run inline."""
    while executor.stats().functions[f"{__name__}.nothing"].kind != "inline":
        await executor.run(nothing)
    return await in_a_row(lambda: executor.run(nothing))


async def threads():
    loop = asyncio.get_running_loop()
    async with Executor(threads=THREADS, processes=1) as executor:
        with ThreadPoolExecutor(THREADS) as pool:
            for measure in (in_a_row, at_once):
                ours = await measure(lambda: executor.run(nothing, kind="thread"))
                theirs = await measure(lambda: loop.run_in_executor(pool, nothing))
                yield f"thread hop, {measure.__name__}", ours, theirs
        yield "learnt to be inline", await learnt(executor), theirs


async def processes():
    loop = asyncio.get_running_loop()
    spawn = multiprocessing.get_context("spawn")
    async with Executor(threads=1, processes=1) as executor:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            ours = await in_a_row(lambda: executor.run(int, kind="process"), HOPS // 4)
            theirs = await in_a_row(lambda: loop.run_in_executor(pool, int), HOPS // 4)
            yield "process round trip", ours, theirs


async def table():
    return [row for rows in (threads(), processes()) async for row in rows]


def best(loop_run, runs=3):
    """Return each row with its smallest figures of several runs, which other load on the machine disturbs least."""
    tables = [loop_run(table()) for _ in range(runs)]
    return [(rows[0][0], min(r[1] for r in rows), min(r[2] for r in rows)) for rows in zip(*tables, strict=True)]


def test_table(capsys):
    for loop_run in (uvloop.run, asyncio.run):
        found = best(loop_run)
        with capsys.disabled():
            print(f"\n{loop_run.__module__:24}{'Executor':>12}{'futures':>12}{'ratio':>8}   (us)")
            for name, ours, theirs in found:
                print(f"{name:24}{ours:12.1f}{theirs:12.1f}{ours / theirs:8.2f}")


def test_thread_hop(benchmark):
    async def hops():
        async with Executor(threads=THREADS) as executor:
            await at_once(lambda: executor.run(nothing, kind="thread"))

    benchmark.pedantic(lambda: uvloop.run(hops()), rounds=5, warmup_rounds=1)
