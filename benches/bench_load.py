"""What a load costs by itself, beside what it measures: `python bench_load.py`.

The same traffic, 500 messages a second for ten seconds, is put on a target that only waits as long as the model does,
and on the engine. Printed is the CPU of this process a message, and which share of the engine's is the load's own:
drawing, sending, timing and counting it.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from whisper_fast.lab.load import EngineTarget, Metered, Run, Target
from whisper_fast.lab.traffic import Sessions, Traffic

TRAFFIC = Traffic(users=5000, period=10.0, seconds=10.0)
LATENCY = 0.5


class Waits(Target):
    """Answers when the model would."""

    name = "waits"

    @asynccontextmanager
    async def open(self):
        yield self

    async def answer(self, message, accepted):
        accepted()
        await asyncio.sleep(LATENCY)
        return ()

    def model_seconds(self, message):
        return LATENCY


async def spent(target):
    run = Run(TRAFFIC, Sessions(TRAFFIC), target)
    await run.run()
    return run.figures()["cpu_us_per_turn"]


async def main():
    alone = await spent(Waits())
    with TemporaryDirectory() as folder:
        whole = await spent(EngineTarget(Path(folder), Metered(LATENCY), TRAFFIC.users))
    print(f"CPU a message: {alone:.0f} us of load alone, {whole:.0f} us with the engine; share {alone / whole:.2f}")


if __name__ == "__main__":
    uvloop.run(main())
