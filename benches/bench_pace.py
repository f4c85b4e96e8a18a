"""How late messages are let go at 5,000 a second, beside the loop's own timers: `python bench_pace.py`.

The three ways take turns on the same arrivals, ten times two seconds each, on uvloop: our pace, a sleep until each
message is due, and a tick of 5 ms. A message becomes a task that does nothing. Printed are percentiles of how late
the messages of all turns were, and the share of one processor that it took. The p99 is to be at most 100 us.
"""

from __future__ import annotations

import asyncio
import sys
from time import monotonic, process_time

import numpy as np
import uvloop

from whisper_fast.lab.pace import Pace
from whisper_fast.lab.traffic import Sessions, Traffic, arrivals

RATE, SECONDS, TURNS = 5000, 2.0, 10
TICK = 0.005


class Sent:
    """What was let go, and by how much too late."""

    def __init__(self):
        self.late = []
        self.cpu = self.wall = 0.0

    def send(self, arrival, began):
        self.late.append(monotonic() - began - arrival.at)
        asyncio.get_running_loop().create_task(nothing())


async def nothing():
    pass


async def paced(source, sent, began):
    await Pace(source, lambda arrival: sent.send(arrival, began), began).run()


async def slept(source, sent, began):
    for arrival in arrivals(source):
        wait = began + arrival.at - monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        sent.send(arrival, began)


async def ticked(source, sent, began):
    for arrival in arrivals(source):
        while began + arrival.at > monotonic():  # noqa: ASYNC110 - this is what the tick is
            await asyncio.sleep(TICK)
        sent.send(arrival, began)


WAYS = {"pace": paced, "asyncio.sleep": slept, "tick of 5 ms": ticked}


async def main():
    found = {name: Sent() for name in WAYS}
    for turn in range(TURNS):
        for name, way in WAYS.items():
            source = Sessions(Traffic(users=RATE, period=1.0, seconds=SECONDS, seed=turn, session=0))
            sent, cpu, began = found[name], process_time(), monotonic() + 0.05
            await way(source, sent, began)
            sent.cpu += process_time() - cpu
            sent.wall += monotonic() - began
    print(f"{'':16}{'p50 us':>9}{'p90':>9}{'p99':>9}{'p99.9':>9}{'CPU':>7}   {sys.platform}, {RATE} a second")
    for name, sent in found.items():
        late = np.percentile(np.array(sent.late) * 1e6, [50, 90, 99, 99.9])
        print(f"{name:16}" + "".join(f"{value:9.1f}" for value in late) + f"{sent.cpu / sent.wall:7.2f}")


if __name__ == "__main__":
    uvloop.run(main())
