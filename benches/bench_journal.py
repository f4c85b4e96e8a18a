"""Durable accepts: messages a second and how long one waits, on the disk of the temporary folder.

Ours through the async API as the engine calls it, with many on their way (group commit) and one after the other;
beside it a commit each by the standard library's sqlite3 and by aiosqlite, both with the same journal mode, sync and
table, and redis with `appendfsync always`. The best of three rounds counts; an fsync of 4 KiB at that moment stands
beside it, for it is the limit.
"""

import asyncio
import gc
import shutil
import socket
import sqlite3
import subprocess
from contextlib import closing, contextmanager
from time import perf_counter

import apsw
import pytest
import uvloop

from whisper_fast import Message
from whisper_fast.doctor import fsync_ms
from whisper_fast.journal import Journal, encoded
from whisper_fast.store.schema import MIGRATIONS
from whisper_fast.store.sqlite import Database

MANY, FEW = 200_000, 2_000
TEXT = "I walked along the river today and thought of what you said about the boat; it was lovely."
INSERT = """INSERT INTO journal (platform, channel, message_id, user, accepted_at, message)
            VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"""


def messages(count):
    made = [Message(user=f"u{n % 1000}", text=TEXT, id=f"m{n}", channel="c") for n in range(count)]
    return [(message, encoded(message)) for message in made]


def row(message, body):
    return (message.platform, message.channel, message.id, message.user, message.at, body)


async def sent(given, in_flight, accept):
    """Send all of `given`, `in_flight` at a time; return messages a second and what each waited, sorted."""
    waited, rest = [], iter(given)

    async def sender():
        for message, body in rest:
            since = perf_counter()
            await accept(message, body)
            waited.append(perf_counter() - since)

    gc.collect()
    gc.freeze()  # the messages made for this bench are not the store's garbage
    since = perf_counter()
    await asyncio.gather(*(sender() for _ in range(in_flight)))
    took = perf_counter() - since
    gc.unfreeze()
    return len(given) / took, sorted(waited)


async def ours(folder, count, in_flight):
    given = messages(count)
    database = await Database.open(folder)
    try:
        return await sent(given, in_flight, Journal(database).accept)
    finally:
        await database.close()


def table(folder):
    """An empty journal as ours, in the given folder; return its path."""
    folder.mkdir()
    with closing(apsw.Connection(str(folder / "peer.db"))) as connection:
        connection.pragma("journal_mode", "wal")
        for script in MIGRATIONS:
            connection.execute(script)
    return folder / "peer.db"


async def plain(folder, count):
    with closing(sqlite3.connect(table(folder), isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = full")

        async def accept(message, body):
            connection.execute(INSERT, row(message, body))

        return await sent(messages(count), 1, accept)


async def threaded(folder, count, in_flight):
    aiosqlite = pytest.importorskip("aiosqlite", reason="aiosqlite is not installed: pip install -e '.[bench]'")
    async with aiosqlite.connect(table(folder), isolation_level=None) as connection:
        await connection.execute("PRAGMA synchronous = full")

        async def accept(message, body):
            await connection.execute_insert(INSERT, row(message, body))

        return await sent(messages(count), in_flight, accept)


@contextmanager
def redis_server(folder):
    """A redis of our own on a free port, with an append-only file that is synced before each answer."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("there is no redis-server on this machine")
    folder.mkdir()
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    options = (
        "--port",
        f"{port}",
        "--dir",
        f"{folder}",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--save",
        "",
    )
    with subprocess.Popen([binary, *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            next(line for line in server.stdout if "Ready to accept" in line)
            yield port
        finally:
            server.terminate()


async def redis_always(folder, count, in_flight):
    redis = pytest.importorskip("redis.asyncio", reason="redis is not installed: pip install redis")
    with redis_server(folder) as port:
        async with redis.Redis(port=port, max_connections=in_flight) as client:

            async def accept(message, body):
                await client.set(f"{message.platform}:{message.channel}:{message.id}:{message.user}", body, nx=True)

            return await sent(messages(count), in_flight, accept)


WAYS = {
    "sqlite3, a commit each": lambda folder: plain(folder, FEW),
    "aiosqlite, 96 on their way": lambda folder: threaded(folder, FEW, 96),
    "redis always, 96 on their way": lambda folder: redis_always(folder, 20_000, 96),
    "ours, one by one": lambda folder: ours(folder, FEW, 1),
    "ours, 96 on their way": lambda folder: ours(folder, MANY, 96),
    "ours, 256 on their way": lambda folder: ours(folder, MANY, 256),
}
rates = {}


@pytest.mark.parametrize("way", WAYS)
def test_durable_accepts(benchmark, tmp_path, capsys, way):
    figures = []

    def run():
        folder = tmp_path / str(len(figures))
        figures.append((*uvloop.run(WAYS[way](folder)), fsync_ms(tmp_path)))

    benchmark.pedantic(run, rounds=3)
    rate, waited, fsync = max(figures, key=lambda figure: figure[0])
    rates[way] = rate
    ratio = rate / rates.get("sqlite3, a commit each", rate)
    p50, p99 = (waited[int(len(waited) * share)] * 1000 for share in (0.5, 0.99))
    benchmark.extra_info.update(
        messages_per_s=round(rate), p50_ms=round(p50, 2), p99_ms=round(p99, 2), fsync_ms=fsync
    )
    with capsys.disabled():
        print(f"\n{way:30} {rate:7.0f} messages/s  x{ratio:4.1f}", end="")
        print(f"   p50 {p50:6.2f} ms   p99 {p99:6.2f} ms   (an fsync {fsync} ms)")
