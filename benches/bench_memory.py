"""The memory through its async API: recalls a second over many users, and how long any call holds the event loop.

It also prints what a memory takes in memory. The loop is held for as long as a task that does nothing but yield
waits for its next turn; the busiest of them is what a call costs everybody else. On a machine with other work the
other work is in it too.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from pathlib import Path
from sys import getsizeof
from time import perf_counter

import numpy as np
import pytest

from whisper_fast.lab.locomo import conversations
from whisper_fast.memory import MemoryStore
from whisper_fast.memory.embedding import pack
from whisper_fast.memory.item import as_item
from whisper_fast.memory.segment import Segment, item_terms
from whisper_fast.models.embedder import StaticEmbedder
from whisper_fast.store.sqlite import Database

DATA = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
USERS, EACH, RECALLS, AT_ONCE = 1_000, 1_000, 20_000, 64
LARGE = 20_000
WORDS = [f"{a}{b}" for a in ("cat", "tea", "rain", "train", "song", "moon", "bread", "shoe") for b in range(200)]


def texts(count, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(WORDS[i] for i in draw.zipf(1.3, 8) % len(WORDS)) for _ in range(count)]


@asynccontextmanager
async def held(label, lines):
    """Note the longest time for which the loop did not get round."""
    longest, going = 0.0, True

    async def watch():
        nonlocal longest
        while going:
            since = perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, perf_counter() - since)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    since, longest = perf_counter(), 0.0
    try:
        yield
    finally:
        going = False
        await watcher
        lines.append(f"  {label:34} {(perf_counter() - since) * 1e3:8.1f} ms  loop held {longest * 1e3:6.2f} ms")


async def lag(folder):
    lines = [f"one user with {LARGE} memories:"]
    async with MemoryStore.open(folder) as memory:
        told = texts(LARGE, 0)
        async with held("nothing, for comparison", lines):
            await asyncio.sleep(0.2)
        async with held("add_many", lines):
            await memory.add_many("u", told)
        async with held("recall that reads the segment", lines):
            await memory.recall("u", told[7])
        async with held("recall", lines):
            await memory.recall("u", told[8])
        async with held("add", lines):
            await memory.add("u", "one more")
        async with held("delete", lines):
            await memory.delete("u", LARGE // 2)
        async with held("export", lines):
            assert len([item async for item in memory.export("u")]) == LARGE
        async with held("forget", lines):
            await memory.forget("u")
    return lines


@asynccontextmanager
async def large(folder):
    """A store that keeps all segments in memory: what is measured is not the reading."""
    database = await Database.open(folder)
    memory = MemoryStore(database, StaticEmbedder(), cache_bytes=2 << 30)
    await memory.start()
    yield memory
    await memory.close()
    await database.close()


async def throughput(folder):
    async with large(folder) as memory:
        for user in range(USERS):
            await memory.add_many(f"u{user}", texts(EACH, user))
        for user in range(USERS):
            await memory.warm(f"u{user}")
        draw, asked = np.random.default_rng(1), texts(RECALLS, 996)
        users, times, left = draw.integers(0, USERS, RECALLS), [], iter(range(RECALLS))

        async def ask():
            for i in left:
                since = perf_counter()
                await memory.recall(f"u{users[i]}", asked[i])
                times.append(perf_counter() - since)

        since = perf_counter()
        await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
        took = perf_counter() - since
        since = perf_counter()
        for first in range(0, RECALLS, 200):
            await memory.recall_many([(f"u{users[i]}", asked[i]) for i in range(first, first + 200)])
        many = perf_counter() - since
        stats = memory.stats()
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    return [
        f"{USERS} users x {EACH} memories, {stats['segments']} of them in memory, {stats['bytes'] >> 20} MiB:",
        f"  recall, {AT_ONCE} at once    {RECALLS / took:9.0f} a second, p50 {p50:.2f} ms, p99 {p99:.2f} ms",
        f"  recall_many of 200    {RECALLS / many:9.0f} a second",
    ]


async def sizes(_):
    """Of LoCoMo's turns, with vectors of 384 dimensions: what a memory takes beside its text."""
    lines, draw = ["bytes of index a memory, 384 dimensions:"], np.random.default_rng(0)
    for talk in conversations(DATA / "locomo"):
        segment, texts = Segment(384), [turn["text"] for turn in talk.turns]
        vectors = pack(draw.normal(size=(len(texts), 384)).astype(np.float32))
        for number, (text, vector) in enumerate(zip(texts, vectors, strict=True), 1):
            item = as_item({"text": text, "at": float(number)})
            segment.append(number, item, vector, item_terms(item))
        lines.append(f"  {len(texts)} turns  {(segment.nbytes - sum(map(getsizeof, texts))) / len(texts):6.0f}")
    return lines if len(lines) > 1 else [f"there are no conversations in {DATA / 'locomo'} (WHISPER_FAST_DATA)"]


@pytest.mark.parametrize("measure", [lag, throughput, sizes])
def test_memory(benchmark, tmp_path, measure):
    if not benchmark.enabled:
        pytest.skip("takes minutes: make bench ARGS=bench_memory.py")
    lines = benchmark.pedantic(lambda: asyncio.run(measure(tmp_path)), rounds=1)
    print("\n" + "\n".join(lines))
