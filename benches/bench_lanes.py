"""What a place in the lanes costs: enter, start, run, leave, with 100,000 users, beside simpler ways to keep order.

Goal: at most 10 us of scheduling a message. Each way runs the same empty turns of the same users; `bare` is only the
task that every way needs, so what a way adds is its figure less that one. `queue a user` is an asyncio.Queue with a
task of its own for each user, `lock a user` an asyncio.Lock; neither is bounded, fair or has priorities.
"""

import asyncio
import gc
import time

import pytest
import uvloop

from whisper_fast.lanes import Lanes

USERS, EACH = 100_000, 2
SLOTS = 50


async def turn():
    pass


async def lanes():
    """All messages at once: every user has a lane, all but 50 wait in the fair queue."""
    taken = Lanes(USERS * EACH, 1 << 40, slots=lambda: SLOTS)
    for _ in range(EACH):
        for user in range(USERS):
            taken.enter(f"u{user}", 100, admitted=True).start(turn, "turn")
    await taken.drain(600)


async def bare():
    for _ in range(EACH):
        await asyncio.gather(*(asyncio.create_task(turn(), name="turn") for _ in range(USERS)))


async def queue_a_user():
    done = asyncio.Semaphore(0)

    async def worker(queue):
        for _ in range(EACH):
            work = await queue.get()
            await asyncio.create_task(work(), name="turn")
        done.release()

    queues = {f"u{user}": asyncio.Queue() for user in range(USERS)}
    workers = [asyncio.create_task(worker(queue)) for queue in queues.values()]
    for _ in range(EACH):
        for user in range(USERS):
            queues[f"u{user}"].put_nowait(turn)
    await asyncio.gather(*workers)


async def lock_a_user():
    locks = {}

    async def in_order(user):
        async with locks.setdefault(user, asyncio.Lock()):
            await turn()

    for _ in range(EACH):
        await asyncio.gather(*(asyncio.create_task(in_order(f"u{user}"), name="turn") for user in range(USERS)))


@pytest.mark.parametrize("way", [lanes, bare, queue_a_user, lock_a_user], ids=lambda way: way.__name__)
def test_scheduling(benchmark, way, capsys):
    figures = []

    def run():
        gc.collect()
        began = time.process_time()
        uvloop.run(way())
        figures.append((time.process_time() - began) / (USERS * EACH) * 1e6)

    benchmark.pedantic(run, rounds=3)
    benchmark.extra_info["us_per_message"] = round(min(figures), 2)
    with capsys.disabled():
        print(f"\n{way.__name__}: {min(figures):.2f} us of CPU a message, {USERS:,} users")


def test_refusal(benchmark):
    """What it costs to say no to a message when 20,000 wait."""
    from whisper_fast.errors import Overloaded

    async def refuse():
        taken = Lanes(1 << 30, 1 << 40, slots=lambda: SLOTS, max_wait=1e-9)
        for user in range(20_000):
            taken.enter(f"u{user}", 100, admitted=True).start(lambda: asyncio.sleep(3600), "turn")
        for _ in range(2 * SLOTS):  # a pace is known
            taken._admission.served(20_000, SLOTS)
            await asyncio.sleep(0)

        def no():
            for user in range(1000):
                with pytest.raises(Overloaded):
                    taken.enter(f"v{user}")

        benchmark.pedantic(no, rounds=20)
        await taken.abort()

    uvloop.run(refuse())
    if benchmark.stats:
        benchmark.extra_info["us_per_refusal"] = round(benchmark.stats["median"] / 1000 * 1e6, 2)
