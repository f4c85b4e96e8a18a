"""What fanning out over five components costs, beside asyncio.gather over the same five coroutines.

Goals: 6 us when none of them suspends; no slower than gather when all do.
"""

import asyncio

import pytest
import uvloop

from whisper_fast.components import Component
from whisper_fast.executor import Executor
from whisper_fast.message import Message, Turn
from whisper_fast.pipeline import Pipeline

FIVE = ("emotion", "embedding", "recall", "conversation", "persona")
MESSAGE = Message(user="u", text="hello")


async def at_once(turn):
    return turn


async def suspending(turn):
    await asyncio.sleep(0)
    return turn


async def fan_out(component, count):
    async with Executor(threads=1, processes=1) as executor:
        pipeline = Pipeline(executor, parallel=lambda: True)
        for name in FIVE:
            pipeline.add(Component(name, component, deadline=1.0))
        for _ in range(count):
            await pipeline.run(Turn(MESSAGE))
        await pipeline.close()


async def gathered(component, count):
    for _ in range(count):
        turn = Turn(MESSAGE)
        await asyncio.gather(*[component(turn) for _ in FIVE])


@pytest.mark.parametrize("component", [at_once, suspending], ids=["none suspends", "all suspend"])
@pytest.mark.parametrize("way", [fan_out, gathered], ids=["pipeline", "gather"])
def test_fan_out_of_five(benchmark, way, component):
    """One round is 2,000 turns: the figure divided by 2,000 is the cost of a turn's fan-out."""
    benchmark.group = component.__name__
    benchmark.pedantic(lambda: uvloop.run(way(component, 2000)), rounds=7, warmup_rounds=1)
    benchmark.extra_info["us_per_turn"] = (
        round(benchmark.stats["median"] / 2000 * 1e6, 2) if benchmark.stats else None
    )
