"""A thread hop beside run_in_executor, and a process round trip beside concurrent.futures, loky and pebble.

Goals: a hop at most 15 us and at least twice as fast as run_in_executor; a process round trip at most 60 us; the
capacity is back 150 ms after a worker was killed. The waking of two threads, of which a hop can cost no less, is
measured beside it.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from queue import SimpleQueue
from time import perf_counter, sleep

import uvloop

from whisper_fast.executor import Executor

try:
    import loky
except ImportError:
    loky = None
try:
    import pebble
except ImportError:
    pebble = None

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


def two_wakings(count=200, windows=20):
    """Return what it takes to wake a thread and be woken by it, in us."""
    there, back = SimpleQueue(), SimpleQueue()
    thread = threading.Thread(target=lambda: [back.put(None) for _ in iter(there.get, None)])
    thread.start()
    seconds = []
    for _ in range(windows):
        begin = perf_counter()
        for _ in range(count):
            there.put(1)
            back.get()
        seconds.append((perf_counter() - begin) / count)
    there.put(None)
    thread.join()
    return min(seconds) * 1e6


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
                windows = [
                    (
                        await measure(lambda: executor.run(nothing, kind="thread"), HOPS // 10),
                        await measure(lambda: loop.run_in_executor(pool, nothing), HOPS // 10),
                    )
                    for _ in range(20)
                ]
                ours, theirs = map(min, zip(*windows, strict=True))
                yield f"thread hop, {measure.__name__}", ours, theirs
        yield "two wakings alone", two_wakings(), theirs
        yield "learnt to be inline", await learnt(executor), theirs


async def processes():
    """Yield the round trip of each peer that is installed, one worker each, beside ours."""
    loop = asyncio.get_running_loop()
    async with Executor(threads=1, processes=1) as executor:
        for name, pool, call in pools():
            with pool:
                windows = [
                    (
                        await in_a_row(lambda: executor.run(int, kind="process"), HOPS // 20),
                        await in_a_row(lambda call=call, pool=pool: call(loop, pool), HOPS // 20),
                    )
                    for _ in range(5)
                ]
            yield f"process, {name}", *map(min, zip(*windows, strict=True))


def pools():
    """Yield (name, pool, call) of the process pools that are installed."""
    spawn = multiprocessing.get_context("spawn")
    yield (
        "concurrent.futures",
        ProcessPoolExecutor(1, mp_context=spawn),
        lambda loop, pool: loop.run_in_executor(pool, int),
    )
    if loky is not None:
        yield "loky", loky.ProcessPoolExecutor(1), lambda loop, pool: loop.run_in_executor(pool, int)
    if pebble is not None:
        yield "pebble", pebble.ProcessPool(1, context=spawn), lambda _, pool: asyncio.wrap_future(pool.schedule(int))


async def until(condition):
    while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0.0005)


async def back_after_a_kill(kills=30):
    """Return the seconds from the death of one of two workers until two are there again, sorted."""
    seconds = []
    async with Executor(threads=1, processes=2) as executor:
        executor.warm()
        for _ in range(kills):
            await until(lambda: executor.stats().processes == 2)
            victim = await executor.run(os.getpid, kind="process")
            deaths, began = executor.stats().worker_deaths, perf_counter()
            os.kill(victim, signal.SIGKILL)
            await until(lambda deaths=deaths: executor.stats().worker_deaths > deaths)
            held = [executor.run(sleep, 0.001, kind="process") for _ in range(2)]  # so that both are needed
            await asyncio.gather(*held)
            await until(lambda: executor.stats().processes == 2)
            seconds.append(perf_counter() - began)
    return sorted(seconds)


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
            print(f"\n{loop_run.__module__:30}{'Executor':>10}{'peer':>10}{'faster':>8}   (us)")
            for name, ours, theirs in found:
                print(f"{name:30}{ours:10.1f}{theirs:10.1f}{theirs / ours:8.2f}")
    back = uvloop.run(back_after_a_kill())
    with capsys.disabled():
        print(f"two workers again after a kill: {back[len(back) // 2] * 1e3:.0f} ms, at most {back[-1] * 1e3:.0f} ms")
        for name, module in (("loky", loky), ("pebble", pebble)):
            if module is None:
                print(f"{name} is not installed (pip install 'whisper-fast[bench]')")


def test_thread_hop(benchmark):
    async def hops():
        async with Executor(threads=THREADS) as executor:
            await at_once(lambda: executor.run(nothing, kind="thread"))

    benchmark.pedantic(lambda: uvloop.run(hops()), rounds=5, warmup_rounds=1)
