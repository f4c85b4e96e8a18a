"""What watching costs: the loop's watch at rest and beside work, and one reading of the memory's state.

    python benches/bench_watch.py

The share of a processor is this process's CPU time over the time passed, at rest less that of the same loop without a
watch. Beside work the loop is awake anyway: counted are the beats and the thread by themselves.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from whisper_fast.monitor import Gauge, LoopWatch
from whisper_fast.monitor.loop import owner

SECONDS = 8.0
READINGS = 500


class TimedWatch(LoopWatch):
    """Takes down the processor time of its two halves."""

    used = 0.0

    def _beat(self, loop):
        begun = time.thread_time()
        self._outside = self._outside or owner(sys._getframe(1))  # it would take this method for what runs the loop
        super()._beat(loop)
        self.used += time.thread_time() - begun

    def _watch(self, watched):
        super()._watch(watched)
        self.used += time.thread_time()


async def at_rest(watch):
    begun = time.process_time()
    await asyncio.sleep(SECONDS)
    return (time.process_time() - begun) / SECONDS


async def with_watch(work):
    watch = TimedWatch()
    watch.start()
    try:
        return await work(watch), watch
    finally:
        watch.stop()


async def beside_work(_):
    """Keep the loop half busy with callbacks of half a millisecond."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        busy = time.monotonic() + 0.0005
        while time.monotonic() < busy:
            pass
        await asyncio.sleep(0.001)


def main():
    for name, factory in (("uvloop", uvloop.new_event_loop), ("asyncio", asyncio.new_event_loop)):
        with asyncio.Runner(loop_factory=factory) as runner:
            without = runner.run(at_rest(None))
            rest, _ = runner.run(with_watch(at_rest))
            _, watch = runner.run(with_watch(beside_work))
        print(
            f"{name}: at rest {(rest - without) * 100:.3f} % of a processor, beside work {watch.used / SECONDS:.3%}"
        )
    gauge, begun = Gauge(), time.process_time()
    for _ in range(READINGS):
        gauge.read()
    print(f"memory ({gauge.kind}): {(time.process_time() - begun) / READINGS * 1e6:.0f} us a reading, in a thread")


if __name__ == "__main__":
    main()
