"""A whole turn in library mode: CPU time of the process a turn, everything on (goal: 400 us).

The model is simulated with no latency, so that what is left is ours; a hundred users with a little history each.
"""

import asyncio
import time

import uvloop

from whisper_fast import Engine, Message, Settings
from whisper_fast.llm import SimulatedLLM

USERS, TURNS = 100, 40
TEXTS = (
    "I went hiking with my sister in the mountains yesterday",
    "do you remember what my dog is called?",
    "I am so tired of this job, nothing works",
    "we are planning a trip to Lisbon in the spring",
)


async def turns(folder):
    async with Engine.open(Settings(data_dir=folder), llm=SimulatedLLM(latency=0)) as engine:

        async def user(n, count):
            for turn in range(count):
                await engine.respond(Message(user=f"u{n}", text=f"{TEXTS[(n + turn) % 4]} ({turn})"))

        await asyncio.gather(*(user(n, 5) for n in range(USERS)))  # warm: segments, conversations, words
        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.gather(*(user(n, TURNS) for n in range(USERS)))
        return time.process_time() - cpu, time.perf_counter() - wall


def test_whole_turn(benchmark, tmp_path, capsys):
    figures = []

    def run():
        figures.append(uvloop.run(turns(tmp_path / str(len(figures)))))

    benchmark.pedantic(run, rounds=3)
    cpu, wall = min(figures)
    per_turn = cpu / (USERS * TURNS) * 1e6
    benchmark.extra_info["cpu_us_per_turn"] = round(per_turn, 1)
    with capsys.disabled():
        print(f"\nwhole turn: {per_turn:.0f} us of CPU, {USERS * TURNS / wall:.0f} turns/s")
