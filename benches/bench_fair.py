"""The fair queue with 100,000 items waiting: what enqueue and dequeue cost, beside heapq and PriorityQueue.

`make bench ARGS=bench_fair.py` prints each for 1, 1,000 and 100,000 users. The peers only order by (priority,
arrival): they know no users, no costs and no way out for who leaves.
"""

from __future__ import annotations

from heapq import heappop, heappush
from queue import PriorityQueue
from random import Random
from statistics import median
from time import perf_counter_ns

import pytest

from whisper_fast._fair import FairQueue

WAITING = 100_000
ROUNDS = 7


def fair(users):
    queue, rng = FairQueue(), Random(1)
    keys = [f"user-{rng.randrange(users)}" for _ in range(2 * WAITING)]
    costs = [float(rng.randrange(1, 4000)) for _ in keys]
    for key, cost in zip(keys[:WAITING], costs, strict=False):
        queue.push(key, key, cost=cost)
    items = list(zip(keys[WAITING:], costs[WAITING:], strict=True))

    def enqueue():
        for key, cost in items:
            queue.push(key, key, cost=cost)

    def dequeue():
        for _ in items:
            queue.pop()

    return enqueue, dequeue


def heap():
    waiting, items = [], [(n % 3, n, None) for n in range(2 * WAITING)]
    for item in items[:WAITING]:
        heappush(waiting, item)

    def enqueue():
        for item in items[WAITING:]:
            heappush(waiting, item)

    def dequeue():
        for _ in range(WAITING):
            heappop(waiting)

    return enqueue, dequeue


def priority_queue():
    waiting, items = PriorityQueue(), [(n % 3, n) for n in range(2 * WAITING)]
    for item in items[:WAITING]:
        waiting.put(item)

    def enqueue():
        for item in items[WAITING:]:
            waiting.put(item)

    def dequeue():
        for _ in range(WAITING):
            waiting.get()

    return enqueue, dequeue


def nanoseconds(pair):
    """Return the median nanoseconds of one enqueue and of one dequeue, from 100,000 waiting to 200,000 and back."""
    seen = ([], [])
    for _ in range(ROUNDS):
        for work, times in zip(pair, seen, strict=True):
            begin = perf_counter_ns()
            work()
            times.append((perf_counter_ns() - begin) / WAITING)
    return [median(times) for times in seen]


@pytest.mark.parametrize("users", [1, 1000, 100_000])
def test_fair_queue_beside_its_peers(benchmark, users):
    peers = {"FairQueue": fair(users), "heapq": heap(), "queue.PriorityQueue": priority_queue()}
    found = benchmark.pedantic(lambda: {name: nanoseconds(pair) for name, pair in peers.items()}, rounds=1)
    for name, (into, out) in found.items():
        print(f"{users:>7} users, {name:20} enqueue {into:6.0f} ns   dequeue {out:6.0f} ns")
        benchmark.extra_info[name] = {"enqueue_ns": round(into), "dequeue_ns": round(out)}
