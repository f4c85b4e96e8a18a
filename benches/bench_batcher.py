"""What the batcher costs an item, beside `batched` (mixedbread) and asyncio.gather over the same items.

Goals: 3 us an item awaited at batch 64, 0.3 us through submit_many; an idle batcher adds at most 50 us.
"""

import asyncio
import random
from time import perf_counter, thread_time

import pytest
import uvloop

from whisper_fast._batch import Assembly
from whisper_fast.batcher import MicroBatcher

try:
    from batched import aio as batched
except ImportError:
    batched = None

BATCH = 64
ROUNDS = 50


async def echo(items):
    return items


async def one(item):
    return (await echo([item]))[0]


async def awaited(batcher):
    for _ in range(ROUNDS):
        await asyncio.gather(*(batcher.submit(n) for n in range(BATCH)))


async def many(batcher):
    for _ in range(ROUNDS):
        await batcher.submit_many(range(BATCH))


async def idle(batcher):
    for n in range(ROUNDS * BATCH):
        await batcher.submit(n)


async def plain(batcher):
    for _ in range(ROUNDS):
        await asyncio.gather(*(one(n) for n in range(BATCH)))


async def theirs(call):
    """Cost of an item through `batched`: CPU at 64 at once, then wall time of one alone, in seconds."""
    for _ in range(2):
        begin = thread_time()
        for _ in range(ROUNDS // 5):
            await asyncio.gather(*(call([n]) for n in range(BATCH)))
        busy = (thread_time() - begin) / (ROUNDS // 5 * BATCH)
        waits = []
        for n in range(20):
            begin = perf_counter()
            await call([n])
            waits.append(perf_counter() - begin)
    return busy, sorted(waits)[10]


async def alone():
    """Return the median wall time of one item through an idle batcher, in seconds."""
    async with MicroBatcher(echo, max_batch=BATCH) as batcher:
        waits = []
        for n in range(500):
            begin = perf_counter()
            await batcher.submit(n)
            waits.append(perf_counter() - begin)
    return sorted(waits)[250]


async def work(kind):
    async with MicroBatcher(echo, max_batch=BATCH) as batcher:
        begin = thread_time()  # nothing here waits, and other load on the machine is no cost of ours
        await kind(batcher)
        return (thread_time() - begin) / (ROUNDS * BATCH)


@pytest.mark.parametrize("kind", [awaited, many, idle, plain], ids=lambda kind: kind.__name__)
def test_cost_of_3200_items(benchmark, kind):
    benchmark.pedantic(lambda: uvloop.run(work(kind)), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("users", [1, 50])
def test_assembly_of_64(benchmark, users):
    rng = random.Random(1)
    items = [(object(), f"user-{rng.randrange(users)}") for _ in range(BATCH)]
    assembly = Assembly(32)

    def through():
        for item, user in items:
            assembly.append(item, None, user)
        assembly.fill()
        assembly.fill()

    benchmark(through)


async def light_beside_flood(flooded):
    """Return the p99 of a light user's wait when the function takes 2 ms a batch."""

    async def fn(items):
        await asyncio.sleep(0.002)
        return items

    waits = []
    async with MicroBatcher(fn, max_batch=32, max_queue=20_000) as batcher:
        flood = asyncio.create_task(batcher.submit_many(range(10_000 if flooded else 1), user="flood"))
        for _ in range(100):
            begin = perf_counter()
            await batcher.submit("light", user="light")
            waits.append(perf_counter() - begin)
        await flood
    return sorted(waits)[98]


def test_table(capsys):
    spent = {
        kind.__name__: min(uvloop.run(work(kind)) for _ in range(5)) * 1e6 for kind in (plain, awaited, many, idle)
    }
    wait = uvloop.run(alone())
    lone, beside = (min(uvloop.run(light_beside_flood(flooded)) for _ in range(5)) * 1e3 for flooded in (False, True))
    with capsys.disabled():
        print(f"\n{'CPU us an item':32}{'':>8}{'x gather':>10}")
        for name, cost in spent.items():
            print(f"{name:32}{cost:8.2f}{cost / spent['plain']:10.2f}")
        print(f"one item through an idle batcher: {wait * 1e6:.0f} us")
        print(f"light user's p99: {lone:.1f} ms alone, {beside:.1f} ms beside 10,000 items ({beside / lone:.2f}x)")
        if batched is None:
            print("batched is not installed (pip install 'whisper-fast[bench]')")
            return
        busy, idle_wait = asyncio.run(theirs(batched.dynamically(echo, batch_size=BATCH, timeout_ms=5.0)))
        print(f"batched: {busy * 1e6:.1f} us of CPU an item ({busy * 1e6 / spent['awaited']:.1f}x awaited)", end="; ")
        print(f"one item when idle {idle_wait * 1e6:.0f} us ({idle_wait / wait:.0f}x)")
