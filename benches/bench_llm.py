"""What the pool and the provider cost beside what they stand on, measured in turns within one run.

`make bench ARGS=bench_llm.py` prints microseconds a request: the pool beside its provider, the provider
beside bare aiohttp over the same loopback server, and a streamed piece beside an aiohttp read without parsing.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import aiohttp
import pytest
from measured import MESSAGES, Instant, compared, reported, run

from whisper_fast.llm import Endpoint, LLMPool, OpenAIProvider, SimulatedLLM


@pytest.fixture(scope="module")
def stub():
    """Start the server in a process of its own, so that its work is not counted as ours."""
    command = [sys.executable, "-m", "whisper_fast.lab.serving", "--latency", "0", "--tokens", "800"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield process.stderr.readline().split()[-1]
        process.terminate()


def test_pool_with_a_queue(benchmark):
    instant = SimulatedLLM(0)

    async def measure():
        async with LLMPool([instant], max_concurrent=50, queue_timeout=90) as pool:
            peers = {
                "1,000 at once, provider": lambda: asyncio.gather(*(instant.chat(MESSAGES) for _ in range(1000))),
                "1,000 at once, pool of 50": lambda: asyncio.gather(*(pool.chat(MESSAGES) for _ in range(1000))),
            }
            return await compared(peers, 3)

    reported(benchmark, "a request", run(benchmark, measure), units=1000)


def test_pool_streaming(benchmark):
    instant = Instant()

    async def drained(source):
        async for _ in source.stream(MESSAGES):
            pass

    async def measure():
        async with LLMPool([instant]) as pool:
            return await compared({"provider": lambda: drained(instant), "pool": lambda: drained(pool)}, 20)

    reported(benchmark, "a piece", run(benchmark, measure), units=200)


def test_provider_over_bare_aiohttp(benchmark, stub):
    body = {"model": "stub-model", "messages": MESSAGES}

    async def measure():
        provider = OpenAIProvider(Endpoint(stub, "stub-model"))
        async with aiohttp.ClientSession() as session, LLMPool([Endpoint(stub, "stub-model")]) as pool:

            async def bare():
                async with session.post(f"{stub}/chat/completions", json=body) as response:
                    return json.loads(await response.read())

            peers = {
                "bare aiohttp": bare,
                "provider": lambda: provider.chat(MESSAGES),
                "pool of one": lambda: pool.chat(MESSAGES),
            }
            try:
                return await compared(peers, 100)
            finally:
                await provider.close()

    reported(benchmark, "a request over loopback", run(benchmark, measure))


def test_provider_streaming_over_bare_aiohttp(benchmark, stub):
    body = {"model": "stub-model", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}

    async def measure():
        provider = OpenAIProvider(Endpoint(stub, "stub-model"))
        async with aiohttp.ClientSession() as session:

            async def bare():
                async with session.post(f"{stub}/chat/completions", json=body) as response:
                    async for _ in response.content.iter_any():
                        pass

            async def ours():
                async for _ in provider.stream(MESSAGES):
                    pass

            try:
                return await compared({"bare aiohttp, unparsed": bare, "provider": ours}, 30)
            finally:
                await provider.close()

    reported(benchmark, "a stream of 22 events over loopback", run(benchmark, measure))


@pytest.mark.parametrize(
    "llm", [SimulatedLLM(0), SimulatedLLM(0, tokens=lambda rng: 300 + rng.random())], ids=["constant", "drawn"]
)
def test_simulated_call(benchmark, llm):
    medians = run(
        benchmark,
        lambda: compared({"asyncio.sleep(0)": lambda: asyncio.sleep(0), "chat": lambda: llm.chat(MESSAGES)}, 2000),
    )
    reported(benchmark, "a simulated call", medians)
