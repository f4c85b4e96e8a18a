"""What a streamed chunk costs us, beside the `openai` client and bare aiohttp; how soon a server learns of a leaver.

Chunks are those of a large service (about 250 bytes, ids and fingerprint included). The CPU time of this process is
what counts; the server is a process of its own. All peers take turns in the same run.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from statistics import median, quantiles
from time import monotonic, perf_counter, process_time

import aiohttp
import pytest
import uvloop

from whisper_fast.llm import Endpoint, LLMPool, OpenAIProvider
from whisper_fast.llm.pieces import PieceReader

MESSAGES = [{"role": "user", "content": "where did I leave my umbrella?"}]
CHUNK = (
    b'data: {"id":"chatcmpl-9xYzAbCdEfGhIjKlMnOpQrStUv","object":"chat.completion.chunk","created":1726000000,'
    b'"model":"gpt-4o-mini-2024-07-18","system_fingerprint":"fp_0ba0d124f1","choices":[{"index":0,'
    b'"delta":{"content":" umbrella"},"logprobs":null,"finish_reason":null}]}\n\n'
)
CHUNKS = 2000
ROUNDS = 15

CHILD = """
import asyncio, sys
chunk, count = sys.argv[1].encode().decode("unicode_escape").encode(), int(sys.argv[2])
last = chunk.replace(b'"finish_reason":null', b'"finish_reason":"stop"') + b"data: [DONE]\\n\\n"
head = b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n"

async def handle(reader, writer):
    while request := await reader.readuntil(b"\\r\\n\\r\\n"):
        lengths = (line for line in request.lower().split(b"\\r\\n") if line.startswith(b"content-length"))
        length = int(next(lengths).split(b":")[1])
        await reader.readexactly(length)
        writer.write(head)
        for body in (chunk,) * count + (last,):
            writer.write(b"%x\\r\\n%s\\r\\n" % (len(body), body))
            if len(body) * 16 < writer.transport.get_write_buffer_size():
                await writer.drain()
        writer.write(b"0\\r\\n\\r\\n")
        await writer.drain()

async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def streaming():
    """Serve streams of CHUNKS chunks from a process of its own; its address."""
    command = [sys.executable, "-c", CHILD, CHUNK.decode().encode("unicode_escape").decode(), str(CHUNKS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.terminate()


@pytest.fixture(scope="module")
def slow():
    """Serve the faulty language model, which takes its time, from a process of its own."""
    command = [sys.executable, "-m", "whisper_fast.lab.serving", "--latency", "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        yield process.stderr.readline().split()[-1]
        process.terminate()


@pytest.mark.benchmark(timer=process_time)
@pytest.mark.parametrize("together", [1, 2, 8, 64], ids=lambda n: f"{n}-a-read")
def test_bytes_to_pieces(benchmark, together):
    """SSE, JSON, validation and Delta: all that is ours between the socket and the reader."""
    reader, data = PieceReader("here"), CHUNK * together
    reader._events._left = 1 << 60
    reader.feed(data)
    benchmark.pedantic(reader.feed, (data,), rounds=200, iterations=200, warmup_rounds=10)
    if benchmark.stats is not None:
        cost = benchmark.stats.stats.median / together * 1e6
        benchmark.extra_info["us_a_chunk"] = round(cost, 2)
        print(f"\n{together} chunks a read: {cost:.2f} us a chunk")


async def drained(pieces):
    count = 0
    async for _ in pieces:
        count += 1
    return count


async def cpu(call):
    """Return the CPU microseconds a chunk that `call()` takes in this process."""
    begin = process_time()
    await call()
    return (process_time() - begin) / CHUNKS * 1e6


def test_stream_beside_the_openai_client(benchmark, streaming):
    openai = pytest.importorskip("openai", reason="the openai client is not installed (pip install openai)")

    async def measure():
        provider = OpenAIProvider(Endpoint(streaming, "m"))
        client = openai.AsyncOpenAI(base_url=streaming, api_key="none")
        async with (
            aiohttp.ClientSession(read_bufsize=64 << 10) as session,
            LLMPool([Endpoint(streaming, "m")]) as pool,
        ):

            async def bare():
                async with session.post(f"{streaming}/chat/completions", json={"messages": MESSAGES}) as response:
                    async for _ in response.content.iter_any():
                        pass

            async def theirs():
                assert (
                    await drained(await client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
                    > CHUNKS
                )

            async def ours(source):
                assert await drained(source.stream(MESSAGES)) > CHUNKS

            peers = {
                "bare aiohttp, unparsed": bare,
                "provider": lambda: ours(provider),
                "pool": lambda: ours(pool),
                "openai client": theirs,
            }
            seen = {name: [] for name in peers}
            for _ in range(ROUNDS):
                for name, call in peers.items():
                    seen[name].append(await cpu(call))
            await provider.close()
            await client.close()
        return {name: median(values) for name, values in seen.items()}

    found = benchmark.pedantic(lambda: uvloop.run(measure()), rounds=1)
    base = found["bare aiohttp, unparsed"]
    for name, value in found.items():
        print(f"\na chunk, {name}: {value:6.2f} us of CPU, {value - base:+.2f} us over bare aiohttp", end="")
    ratio = found["openai client"] / found["pool"]
    print(f"\na chunk of the openai client costs {ratio:.1f} times one of the pool, transport and all")
    benchmark.extra_info.update({name: round(value, 2) for name, value in found.items()})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_cancel_reaches_the_server(benchmark, slow, stream):
    """From task.cancel() to the server's handler seeing the disconnect; both read the machine's monotonic clock."""

    async def measure():
        left = []
        async with aiohttp.ClientSession() as session, LLMPool([Endpoint(slow, "m")]) as pool:

            async def told():
                async with session.get(slow.removesuffix("/v1") + "/faulty") as response:
                    return await response.json()

            known = len((await told())["aborted_at"])
            for _ in range(200):
                task = asyncio.create_task(drained(pool.stream(MESSAGES)) if stream else pool.chat(MESSAGES))
                while (await told())["open"] < 2:  # the question itself is the other one
                    pass
                left.append(monotonic())
                task.cancel()
                await asyncio.wait([task])
                while len(seen := (await told())["aborted_at"]) < known + len(left):
                    pass
        return [1000 * (at - begin) for begin, at in zip(left, seen[known:], strict=True)]

    begin = perf_counter()
    late = benchmark.pedantic(lambda: uvloop.run(measure()), rounds=1)
    p99 = quantiles(late, n=100)[98]
    kind = "streamed" if stream else "whole"
    print(
        f"\n{kind}: {len(late)} cancels in {perf_counter() - begin:.1f} s reach the server after "
        f"p50 {median(late):.2f} ms, p99 {p99:.2f} ms, worst {max(late):.2f} ms"
    )
    benchmark.extra_info.update(p50_ms=round(median(late), 3), p99_ms=round(p99, 3))
