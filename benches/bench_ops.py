"""What a look at the operations page costs: one snapshot as JSON, after many turns of many users.

    python benches/bench_ops.py

All pages share one snapshot a second, so the share of a processor is its CPU time. `/metrics` stands beside it.
"""

from __future__ import annotations

import asyncio
import tempfile
import time

import uvloop

from whisper_fast import Engine, Message, Settings
from whisper_fast.door.auth import Keys
from whisper_fast.door.metrics import Requests, exposition, registry
from whisper_fast.door.ops import Operations
from whisper_fast.llm import SimulatedLLM

USERS, TURNS = 200, 5
LOOKS = 300


def cost(look):
    """Return the CPU milliseconds of one look, and its bytes."""
    size = len(look())
    begun = time.process_time()
    for _ in range(LOOKS):
        look()
    return 1000 * (time.process_time() - begun) / LOOKS, size


async def busy(engine):
    for turn in range(TURNS):
        messages = [Message(user=f"u{n}", text=f"hello {turn}", id=f"{n}-{turn}") for n in range(USERS)]
        await asyncio.gather(*map(engine.respond, messages))
    await engine.drain(30.0)  # the last turns are remembered too


async def main():
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=folder, max_concurrent_requests=USERS, process_pool_size=1)
        async with Engine.open(settings, llm=SimulatedLLM(latency=0.01)) as engine:
            await busy(engine)
            operations = Operations(engine, Keys())

            def page():
                operations._until = 0.0
                return operations._look()

            source = registry(engine.stats, Requests(), engine.record)
            for name, look in (("/ops", page), ("/metrics", lambda: exposition(source, "")[0])):
                ms, size = cost(look)
                print(f"{name:9} {ms:6.3f} ms of CPU, {size} bytes; once a second {ms / 10:.3f} % of a processor")


if __name__ == "__main__":
    uvloop.run(main())
