"""The door's own cost: CPU time of one request over a real socket, beside the same turn in library mode.

Sixteen connections ask in a closed loop. The client is a bare socket in the same process, so its CPU time is in the
figure too; `asking` measures it alone, against a server that only sends back a recorded answer.
"""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import uvloop

from whisper_fast import Engine, Message, Settings
from whisper_fast.door.app import build
from whisper_fast.door.server import Server, address_of, listener
from whisper_fast.llm import SimulatedLLM

CONNECTIONS, REQUESTS = 16, 100
TEXT = "do you remember what my dog is called?"


def request(n):
    body = json.dumps({"user": f"u{n}", "messages": [{"role": "user", "content": TEXT}]}).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def answered(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n", 1)[0]
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(size)


async def asking(port, n, count):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(count):
        writer.write(request(n))
        last = await answered(reader)
    writer.close()
    await writer.wait_closed()
    return last


@asynccontextmanager
async def engine_in(folder):
    settings = Settings(data_dir=folder, port=0)
    async with Engine.open(settings, llm=SimulatedLLM(latency=0)) as engine:
        yield engine, settings


@asynccontextmanager
async def door_over(engine, settings):
    stop, sock = asyncio.Event(), listener("127.0.0.1", 0)
    serving = asyncio.create_task(Server(build(engine, settings), stop, 1).serve(sockets=[sock]))
    yield int(address_of(sock).rsplit(":", 1)[1])
    stop.set()
    await serving


async def measured(one):
    """Run `one(n, count)` for every connection; return CPU microseconds a request."""
    await asyncio.gather(*(one(n, 5) for n in range(CONNECTIONS)))
    since = time.process_time()
    await asyncio.gather(*(one(n, REQUESTS) for n in range(CONNECTIONS)))
    return (time.process_time() - since) / (CONNECTIONS * REQUESTS) * 1e6


async def through_the_door(folder):
    async with engine_in(folder) as (engine, settings), door_over(engine, settings) as port:
        return await measured(lambda n, count: asking(port, n, count))


async def in_library_mode(folder):
    async with engine_in(folder) as (engine, _):

        async def one(n, count):
            for _ in range(count):
                await engine.respond(Message(user=f"u{n}", text=TEXT))

        return await measured(one)


async def of_the_client(folder):
    async with engine_in(folder) as (engine, settings), door_over(engine, settings) as port:
        recorded = await asking(port, 0, 1)
        size = len(request(0))

        async def echo(reader, writer):
            try:
                while True:
                    await reader.readexactly(size)
                    writer.write(recorded)
            except asyncio.IncompleteReadError:
                writer.close()

        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            fixed = server.sockets[0].getsockname()[1]
            return await measured(lambda n, count: asking(fixed, 0, count))


def test_door(benchmark, tmp_path, capsys):
    figures = {}

    def run():
        for name, way in (("door", through_the_door), ("library", in_library_mode), ("client", of_the_client)):
            cost = uvloop.run(way(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"))
            figures[name] = min(cost, figures.get(name, cost))

    benchmark.pedantic(run, rounds=3)
    own = figures["door"] - figures["library"] - figures["client"]
    benchmark.extra_info.update(
        {f"{name}_us": round(cost, 1) for name, cost in figures.items()}, own_us=round(own, 1)
    )
    with capsys.disabled():
        parts = ", ".join(f"{name} {cost:.0f}" for name, cost in figures.items())
        print(f"\nCPU us a request: {parts}; the door's own: {own:.0f}")
