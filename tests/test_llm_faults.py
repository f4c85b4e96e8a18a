"""The twelve faults through the real pool: every call ends in time, typed or by a fallback, and leaves nothing.

The server speaks TLS, so that a wrong certificate is one; its counters say what reached it and what was left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import traceback
from collections import defaultdict
from random import Random
from time import monotonic

import aiohttp
import pytest

from whisper_fast import Engine, Message, Settings
from whisper_fast.door import metrics
from whisper_fast.errors import (
    DeadlineExceeded,
    LLMError,
    LLMProtocolError,
    LLMRateLimited,
    LLMRejected,
    LLMTimeout,
    LLMUnavailable,
    Overloaded,
)
from whisper_fast.lab.certificates import Certificates
from whisper_fast.lab.faulty import TWELVE, FaultyLLM, mixture
from whisper_fast.llm import Endpoint, LLMPool, SimulatedLLM, Timeouts

KEY = "sk-canary-of-a-key"
CANARY = "the-canary-in-the-prompt"
MESSAGES = [{"role": "system", "content": CANARY}, {"role": "user", "content": CANARY}]
SHORT = 0.4  # seconds of a call that nobody answers
EXPECTED = {
    "refuse": LLMUnavailable,
    "hang": LLMTimeout,
    "cut": LLMUnavailable,
    "drip": LLMTimeout,
    "rate_limited": LLMRateLimited,
    "error": LLMUnavailable,
    "bad_sse": LLMProtocolError,
    "bad_json": LLMProtocolError,
    "bad_utf8": LLMProtocolError,
    "huge": LLMProtocolError,
    "redirect": LLMProtocolError,
    "certificate": LLMUnavailable,
}
CASES = [(fault, stream) for fault in TWELVE for stream in (False, True)]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("ca"))


def endpoint(server, **options):
    return Endpoint(server.url, "m", KEY, ca_file=server.secure.ca_file, **options)


async def asked(pool, stream, **options):
    """Return the answer's text, whole or in pieces."""
    if not stream:
        return (await pool.chat(MESSAGES, **options)).text
    return "".join([piece async for piece in pool.stream(MESSAGES, **options)])


def told(error):
    """Return all that a log could show of an error, the source lines of this file left out."""
    shown = "".join(traceback.format_exception(error)).replace("CANARY", "")
    return f"{shown} {error!r} {error.args} {error.__dict__} {error.__cause__!r} {error.__context__!r}"


async def settled(pool, server):
    """Wait until the server knows that nobody waits, and see that no slot, connection or task of the pool is left."""
    async with asyncio.timeout(10):
        while server.open:
            await asyncio.sleep(0.002)
    stats = pool.stats()
    assert (stats["in_flight"], stats["waiting"]) == (0, 0)
    await pool.close()
    async with asyncio.timeout(10):
        while server.connections:
            await asyncio.sleep(0.002)


def test_there_are_twelve():
    assert len(TWELVE) == 12
    assert set(TWELVE) == set(EXPECTED)


@pytest.mark.parametrize(("fault", "stream"), CASES)
async def test_a_fault_ends_as_its_typed_error_by_the_deadline_and_tells_no_secret(
    fault, stream, certificates, caplog
):
    caplog.set_level(logging.DEBUG)
    timeout = SHORT if EXPECTED[fault] is LLMTimeout else 10
    async with FaultyLLM(SimulatedLLM(0.01), secure=certificates) as server:
        pool = LLMPool([endpoint(server)], timeout=timeout)
        async with asyncio.timeout(timeout + 10), server.suffering(fault):
            with pytest.raises(LLMError) as caught:
                await asked(pool, stream)
        assert type(caught.value) is EXPECTED[fault]
        shown = told(caught.value) + caplog.text + repr(pool.stats()) + repr(pool)
        assert KEY not in shown
        assert CANARY not in shown
        assert server.requests["/elsewhere"] == 0
        assert CANARY in await asked(pool, stream), "the fault over, the next call is whole"
        await settled(pool, server)


@pytest.mark.parametrize(("fault", "stream"), CASES)
async def test_a_fallback_answers_what_had_not_begun(fault, stream, certificates):
    begun = stream and fault in ("cut", "bad_sse", "bad_json", "bad_utf8", "huge")  # after pieces none is asked again
    silent = EXPECTED[fault] is LLMTimeout
    async with FaultyLLM(SimulatedLLM(0.01), secure=certificates) as server:
        first = endpoint(server, timeouts=Timeouts(first_token=SHORT) if silent else Timeouts())
        pool = LLMPool([first, SimulatedLLM(0, name="second")], timeout=20)
        async with server.suffering(fault):
            if begun:
                with pytest.raises(EXPECTED[fault]):
                    await asked(pool, stream)
            else:
                assert CANARY in await asked(pool, stream)
        await settled(pool, server)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_rejected_key_is_asked_once(stream, certificates):
    async with FaultyLLM(secure=certificates) as server:
        pool = LLMPool([endpoint(server), SimulatedLLM(0)])
        async with server.suffering("rejected"):
            with pytest.raises(LLMRejected, match="API key") as caught:
                await asked(pool, stream)
        assert KEY not in told(caught.value)
        assert not caught.value.retriable
        assert server.requests["/v1/chat/completions"] == 1
        await settled(pool, server)


async def burst(pool, rng, calls):
    """Start calls, streamed and not, cancel some on the way; return what each came to."""
    tasks = [asyncio.create_task(asked(pool, rng.random() < 0.5, user=f"u{n % 7}")) for n in range(calls)]
    for task in rng.sample(tasks, calls // 5):
        await asyncio.sleep(rng.random() * 0.01)
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


def unexpected(results):
    kinds = (str, LLMError, DeadlineExceeded, Overloaded, asyncio.CancelledError)
    return [result for result in results if not isinstance(result, kinds)]


async def test_all_faults_at_random_leave_nothing(certificates, caplog):
    caplog.set_level(logging.DEBUG)
    rng = Random(5)
    async with FaultyLLM(SimulatedLLM(0.01), secure=certificates) as server:
        server.draw = mixture(0.7, seed=5)
        pool = LLMPool([endpoint(server), endpoint(server)], max_concurrent=8, timeout=1.0)
        results = await burst(pool, rng, 60)
        assert not unexpected(results)
        assert len(server.struck) > 8, "the mixture is one"
        errors = "".join(told(result) for result in results if isinstance(result, Exception))
        assert KEY not in errors + caplog.text + repr(pool.stats())
        assert CANARY not in errors + caplog.text + repr(pool.stats())
        await settled(pool, server)


async def test_neither_key_nor_prompt_reaches_a_metric_or_a_log_of_the_engine(tmp_path, certificates, caplog):
    caplog.set_level(logging.DEBUG)
    async with FaultyLLM(secure=certificates) as server:
        settings = Settings(data_dir=tmp_path, llm_request_timeout=0.4, drain_seconds=0.1)
        async with Engine.open(settings, llm=endpoint(server)) as engine:
            for fault in ("rejected", "bad_sse", "cut"):
                async with server.suffering(fault):
                    with pytest.raises(LLMError):
                        await engine.respond(Message(user="u1", text=CANARY))
            text, _ = metrics.exposition(metrics.registry(engine.stats, metrics.Requests()), "")
            shown = str(text) + repr(engine.stats()) + caplog.text + repr(engine.llm)
        assert KEY not in shown
        assert CANARY not in shown


@contextlib.asynccontextmanager
async def apart(folder):
    """Serve the faulty model from a process of its own, so that its work holds nobody up here.

    Yields an Endpoint for it, and a function that sets what it suffers and returns its counters.
    """
    command = [sys.executable, "-m", "whisper_fast.lab.serving", "--latency", "0.05", "--tls", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        url = child.stderr.readline().split()[-1]
        found = Endpoint(url, "m", KEY, ca_file=folder / "ca.pem")
        connector = aiohttp.TCPConnector(ssl=found.trust(), keepalive_timeout=600)
        async with aiohttp.ClientSession(url.removesuffix("v1"), connector=connector) as session:

            async def suffer(**fault):
                await (await session.post("faulty", json=fault)).read()
                return await (await session.get("faulty")).json()

            yield found, suffer
        child.terminate()


@pytest.mark.soak
async def test_soak_every_call_ends_by_its_deadline(tmp_path, capsys):
    """Every fault and their mixture for a minute, each on a pool that is new and so not shut; prints how late."""
    rng, late, timeout = Random(7), defaultdict(list), 0.5

    async def timed(pool, stream, kind):
        begin = monotonic()
        with contextlib.suppress(LLMError, DeadlineExceeded):
            await asked(pool, stream)
        late[kind].append(1000 * (monotonic() - begin - 2 * timeout))

    async with apart(tmp_path) as (where, suffer):
        end = monotonic() + 60
        while monotonic() < end:
            fault = rng.choice([*TWELVE, None])
            await suffer(fault=fault, mix=0.0 if fault else 0.8, seed=rng.randrange(1 << 30))
            async with LLMPool([where], max_concurrent=16, timeout=timeout, queue_timeout=timeout) as pool:
                await asyncio.gather(*(timed(pool, rng.random() < 0.5, fault or "mixed") for _ in range(24)))
                stats = pool.stats()
                assert (stats["in_flight"], stats["waiting"]) == (0, 0)
        async with asyncio.timeout(30):
            while (told := await suffer(fault=None))["open"] > 1 or told["connections"] > 1:  # the one that asks
                await asyncio.sleep(0.05)
    with capsys.disabled():
        sys.stdout.write("\nms past the end of queue and call time\n")
        for kind, values in sorted(late.items()):
            values.sort()
            p50, p99 = values[len(values) // 2], values[int(len(values) * 0.99)]
            sys.stdout.write(
                f"{kind:13}{len(values):6} calls: p50 {p50:8.1f}, p99 {p99:8.1f}, latest {values[-1]:8.1f}\n"
            )
    assert max(map(max, late.values())) < 2000 * timeout, "nothing near the double of its time"
