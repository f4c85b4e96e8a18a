"""What the pool's control loops achieve, simulated on a virtual clock with pinned seeds: no time is measured here.

`make bench ARGS=bench_admission.py` prints

    the adaptive limit after a fourfold drop of capacity: its value after 20 windows, goodput beside the best fixed
    limit (found by trying), the share of 429s; for a server that queues and for one that refuses
    Jain's index and the largest gap between users in a saturated hour
    the tail of a two-point latency (8 ms, one in twenty 200 ms) with and without hedges, and what they add
"""

from __future__ import annotations

import asyncio
from statistics import median

import pytest
from queueing import Server
from steered import HELLO
from test_limits import best, goodput
from test_llm_fairness import HOUR, Tokens, fixed, jain, loop_of
from test_llm_hedging import TwoPoint, timed
from virtual import run

from whisper_fast.limits import AdaptiveLimit
from whisper_fast.llm import LLMPool

SEEDS = range(10)


@pytest.mark.parametrize("refuses", [False, True], ids=["queues", "refuses"])
def test_limit_after_a_fourfold_drop(benchmark, refuses):
    def measure():
        rows = []
        for seed in SEEDS:
            limit = AdaptiveLimit(50)
            server = Server(limit, seed=seed, refuses=refuses)
            server.windows(60)
            before = limit.value
            server.capacity, calls, refused, begun, work = 16, server.calls, server.refused, server.now, server.work
            after = server.windows(20)[-1]
            server.run(begun + 1000)
            share = (server.work - work) / 1000 / best(16, 1000, seed, refuses=refuses)
            rows.append((before, after, share, (server.refused - refused) / (server.calls - calls)))
        return [sorted(column) for column in zip(*rows, strict=True)]

    before, after, share, refused = benchmark.pedantic(measure, rounds=1)
    print(
        f"64 -> 16 at once, the server {'refuses' if refuses else 'queues'}, {len(SEEDS)} seeds: limit {before[0]}-"
        f"{before[-1]} -> {after[0]}-{after[-1]} after 20 windows, goodput {median(share):.3f} of the "
        f"best fixed limit's (least {share[0]:.3f}), 429s {100 * refused[-1]:.2f} % at most"
    )


def test_fairness_in_a_saturated_hour(benchmark):
    async def main(clock):
        llm = Tokens(clock)
        async with fixed(llm, clock) as pool:
            callers = [loop_of(pool, f"u{n}", clock, HOUR) for n in range(20) for _ in range(20 if n % 2 else 2)]
            await asyncio.gather(*callers)
        return list(llm.served.values())

    served = benchmark.pedantic(lambda: run(main), rounds=1)
    print(
        f"20 users, half of them with 20 calls waiting and half with 2, one hour: Jain {jain(served):.5f}, "
        f"gap {max(served) - min(served):.0f} of {sum(served) / 20:.0f} tokens"
    )


@pytest.mark.parametrize("hedging", [False, True], ids=["plain", "hedged"])
def test_the_tail(benchmark, hedging):
    async def main(clock):
        replicas = [TwoPoint("a", 1), TwoPoint("b", 2)]
        async with LLMPool(replicas, order="fastest", hedging=lambda: hedging, clock=clock) as pool:
            seconds = await timed(clock, lambda: pool.chat(HELLO), 20_000)
        return seconds, sum(replica.asked for replica in replicas) / 20_000 - 1

    seconds, extra = benchmark.pedantic(lambda: run(main), rounds=1)
    p50, p99 = (1000 * seconds[int(len(seconds) * share)] for share in (0.5, 0.99))
    print(
        f"hedging {'on' if hedging else 'off'}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {100 * extra:.1f} % more requests"
    )


def test_limit_in_recovery(benchmark):
    def measure():
        found = []
        for seed in SEEDS:
            limit = AdaptiveLimit(16)
            server = Server(limit, seed=seed, capacity=16)
            server.windows(40)
            server.capacity = 64
            found.append(next(n for n in range(1, 200) if server.windows(1)[-1] >= 58))
        return sorted(found)

    found = benchmark.pedantic(measure, rounds=1)
    print(f"16 -> 64 at once: within 10 % after {median(found):.0f} windows (at most {found[-1]})")


def test_goodput_of_a_start_under_overload(benchmark):
    def measure():
        shares = []
        for seed in SEEDS:
            server = Server(AdaptiveLimit(50), seed=seed, capacity=16)
            server.windows(30)
            shares.append(goodput(server, 1000) / best(16, 1000, seed))
        return sorted(shares)

    shares = benchmark.pedantic(measure, rounds=1)
    print(f"started at 50 where 16 are borne, after 30 windows: goodput {median(shares):.3f} (least {shares[0]:.3f})")
