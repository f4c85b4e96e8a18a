"""What the pool costs a request, beside LiteLLM's Router, its parts beside each other, and how fast it lets go.

`make bench ARGS=bench_pool.py` prints, each measured in turns within one run:

    the pool over a provider that answers at once, with all flags on, all off, and half of its slots taken
    LiteLLM's Router (usage-based and simple routing) over its own mocked response, against the pool over an equal one
    the breaker's closed path, one answer counted by the adaptive limit
    from a caller's cancellation to the moment when the server sees its connection closed
    the pool over its own provider on one connection to a server in this process
    the pool over a provider that does no work, but whose call leaves the processor's caches cold, as HTTP does
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from statistics import median, quantiles
from time import perf_counter, perf_counter_ns

import pytest
import uvloop
from measured import ANSWER, MESSAGES, Instant, alternated, compared, reported, run

from whisper_fast.breaker import Breaker
from whisper_fast.limits import AdaptiveLimit
from whisper_fast.llm import Endpoint, LLMPool
from whisper_fast.llm.latency import Latency
from whisper_fast.llm.slots import Caller

CALLS = 500


def off():
    return False


class Slow(Latency):
    """Makes the pool think that calls take a minute, so that it watches each for a hedge."""

    def observe(self, seconds):
        super().observe(seconds)
        self.high = 60.0


def plain(*sources, **options):
    return LLMPool(sources, adaptive=off, hedging=off, coalescing=off, **options)


def test_pool_over_its_provider(benchmark):
    instant = Instant()

    async def measure():
        async with AsyncExitStack() as stack:
            full = await stack.enter_async_context(LLMPool([instant]))
            bare = await stack.enter_async_context(plain(instant))
            busy = await stack.enter_async_context(plain(instant, max_concurrent=2))
            watching = await stack.enter_async_context(LLMPool([instant]))
            watching._upstreams[0].whole = Slow(0.93)
            holders = [asyncio.create_task(hold(busy))]
            await asyncio.sleep(0)
            peers = {
                "provider": lambda: instant.chat(MESSAGES),
                "pool, all on": lambda: full.chat(MESSAGES, user="u"),
                "pool, all on, watched for a hedge": lambda: watching.chat(MESSAGES, user="u"),
                "pool, all off": lambda: bare.chat(MESSAGES, user="u"),
                "pool, all off, half full": lambda: busy.chat(MESSAGES, user="u"),
            }
            try:
                return await compared(peers, CALLS)
            finally:
                for holder in holders:
                    holder.cancel()
                await asyncio.wait(holders)

    reported(benchmark, "a request", run(benchmark, measure))


async def hold(pool):
    """Take one slot until cancelled."""
    visit = pool._upstreams[0].take(Caller("holder"), perf_counter())
    try:
        await asyncio.Event().wait()
    finally:
        visit.left()


@pytest.mark.filterwarnings("ignore")  # LiteLLM's own
def test_pool_beside_litellm(benchmark):
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices otherwise
    litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed: pip install 'whisper-fast[bench]'")
    litellm.suppress_debug_info = True
    instant = Instant()
    deployments = [
        {
            "model_name": "m",
            "litellm_params": {"model": "openai/m", "api_key": "none", "mock_response": "there"},
        }
    ]

    async def measure():
        router = litellm.Router(model_list=deployments, num_retries=0)
        prioritised = litellm.Router(model_list=deployments, num_retries=0, default_priority=1)
        async with LLMPool([instant]) as pool:
            peers = {
                "provider": lambda: instant.chat(MESSAGES),
                "pool": lambda: pool.chat(MESSAGES, user="u"),
                "litellm.acompletion": lambda: litellm.acompletion(
                    "openai/m", MESSAGES, api_key="none", mock_response="there"
                ),
                "litellm.Router": lambda: router.acompletion("m", MESSAGES),
                "litellm.Router, by priority": lambda: prioritised.acompletion("m", MESSAGES),
            }
            return await compared(peers, 60)

    medians = run(benchmark, measure)
    reported(benchmark, "a request", medians)
    ours = medians["pool"] - medians["provider"]
    theirs = medians["litellm.Router"] - medians["litellm.acompletion"]
    print(f"Router over its own completion: {theirs:.1f} us, x{theirs / ours:.0f} of the pool over its provider")
    print(f"Router in all: x{medians['litellm.Router'] / medians['pool']:.0f} of the pool in all")
    benchmark.extra_info["router_over_pool"] = round(medians["litellm.Router"] / medians["pool"])


def test_breaker_and_limit(benchmark):
    breaker, limit, rounds = Breaker(), AdaptiveLimit(50), range(20_000)

    def nothing():
        for _ in rounds:
            pass

    def closed():
        for _ in rounds:
            breaker.succeeded(breaker.enter(1.0))

    def answered():
        for at in rounds:
            limit.answered(at, at - 5.0, 50, 300.0)

    def timed(work):
        begin = perf_counter_ns()
        work()
        return (perf_counter_ns() - begin) / len(rounds)

    def measure():
        turns = [(timed(nothing), timed(closed), timed(answered)) for _ in range(25)]
        return [median(column) for column in zip(*turns, strict=True)]

    base, enter, count = benchmark.pedantic(measure, rounds=1)
    print(
        f"breaker, closed path in and out: {enter - base:.0f} ns   adaptive limit, one answer: {count - base:.0f} ns"
    )
    benchmark.extra_info.update(breaker_ns=round(enter - base), limit_ns=round(count - base))


class Watcher:
    """A server that answers nothing and says when each connection was closed by the other side."""

    def __init__(self):
        self.begun, self.closed = asyncio.Queue(), asyncio.Queue()

    async def serve(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        self.begun.put_nowait(None)
        while await reader.read(65536):
            pass
        self.closed.put_nowait(perf_counter())
        writer.close()


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_from_cancellation_to_the_closed_connection(benchmark, streamed):
    async def drained(pool):
        async for _ in pool.stream(MESSAGES):
            pass

    async def measure():
        watcher, seconds = Watcher(), []
        async with await asyncio.start_server(watcher.serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with LLMPool([Endpoint(url, "m")]) as pool:
                for _ in range(200):
                    task = asyncio.create_task(drained(pool) if streamed else pool.chat(MESSAGES))
                    await watcher.begun.get()
                    begun = perf_counter()
                    task.cancel()
                    seconds.append(await watcher.closed.get() - begun)
                    await asyncio.wait([task])
                    assert pool.stats()["in_flight"] == 0
        return seconds

    seconds = benchmark.pedantic(lambda: uvloop.run(measure()), rounds=1)
    p50, p99 = median(seconds) * 1e3, quantiles(seconds, n=100)[98] * 1e3
    print(
        f"cancelled, {'streamed' if streamed else 'whole'}: the server sees it after {p50:.2f} ms (p99 {p99:.2f} ms)"
    )
    benchmark.extra_info.update(p50_ms=round(p50, 3), p99_ms=round(p99, 3))


def test_pool_over_the_transport(benchmark):
    """Over a server in this process: the pool's distance to its provider is its own, that of the second row noise."""
    answer = (
        b'{"choices":[{"message":{"content":"there"},"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":9,"completion_tokens":1}}'
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)

    class Answering(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            if data.endswith(b"}"):
                self.transport.write(head + answer)

    async def measure():
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        async with server:
            endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m")
            async with LLMPool([endpoint]) as pool:
                provider = pool._upstreams[0].provider  # the same connection: two of them differ by more than a pool
                peers = {
                    "provider": lambda: provider.chat(MESSAGES),
                    "provider again": lambda: provider.chat(MESSAGES),
                    "pool": lambda: pool.chat(MESSAGES, user="u"),
                }
                return await alternated(peers, 4000)

    reported(benchmark, "a request over loopback", run(benchmark, measure))


class Sweeping(Instant):
    """Answers after it has read so much memory that nothing of the caller's is in the cache."""

    def __init__(self):
        self.memory = bytearray(2 << 20)

    async def chat(self, messages, **params):
        self.memory[::64]  # a line of each
        return ANSWER


def test_pool_with_cold_caches(benchmark):
    """The pool's own work as it is between two calls that go over a socket."""
    sweeping = Sweeping()

    async def measure():
        async with LLMPool([sweeping]) as pool:
            peers = {
                "provider": lambda: sweeping.chat(MESSAGES),
                "pool": lambda: pool.chat(MESSAGES, user="u"),
            }
            return await alternated(peers, 1000)

    reported(benchmark, "a request with cold caches", run(benchmark, measure))
