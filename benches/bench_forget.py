"""Forgetting a user of 10,000 memories: what the caller waits for, and what wipes the traces afterwards.

The caller waits until the rows are gone and that is on the disk (goal: 50 ms). The compaction that follows by itself
is done between messages; beside it stands SQLite's own way, a VACUUM, which holds the writer all the time.
"""

import asyncio
import random
from time import perf_counter

import uvloop

from whisper_fast import Engine, Settings
from whisper_fast.llm import SimulatedLLM

USERS, MEMORIES = 5, 10_000
WORDS = [f"word{n}" for n in range(3000)]


async def forgetting(folder):
    choose = random.Random(1)
    async with Engine.open(Settings(data_dir=folder), llm=SimulatedLLM(latency=0)) as engine:
        for user in range(USERS):
            for _ in range(0, MEMORIES, 500):
                await engine.memory.add_many(f"u{user}", [" ".join(choose.choices(WORDS, k=15)) for _ in range(500)])
        figures = {"forget": [], "compaction": [], "vacuum": [], "longest wait beside the compaction": []}
        for user in range(USERS - 1):
            await timed(figures["forget"], engine.forget(f"u{user}"))
            waits = figures["longest wait beside the compaction"]
            beside = asyncio.create_task(longest(engine, waits))
            await timed(figures["compaction"], engine._database.compact())
            beside.cancel()
        await timed(figures["vacuum"], asyncio.to_thread(vacuum, engine._database.path))
        return figures, engine._database.path.stat().st_size


async def timed(figures, awaitable):
    since = perf_counter()
    await awaitable
    figures.append((perf_counter() - since) * 1000)


async def longest(engine, waits):
    """Write small memories one after the other; keep how long the slowest took, in milliseconds."""
    waits.append(0.0)
    while True:
        since = perf_counter()
        await engine.memory.add("beside", "a small thing")
        waits[-1] = max(waits[-1], (perf_counter() - since) * 1000)


def vacuum(path):
    import apsw

    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(5000)
    connection.execute("VACUUM")
    connection.close()


def test_forget(benchmark, tmp_path, capsys):
    done = []
    benchmark.pedantic(lambda: done.append(uvloop.run(forgetting(tmp_path))), rounds=1)
    [(figures, size)] = done
    with capsys.disabled():
        print(f"\n{USERS} users of {MEMORIES} memories, {size / 1e6:.0f} MB")
        for name, took in figures.items():
            print(f"  {name:36} {min(took):7.1f} to {max(took):7.1f} ms")
    benchmark.extra_info.update({name: round(min(took), 1) for name, took in figures.items()})
