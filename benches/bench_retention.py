"""How long an accept waits while retention deletes: 20,000 finished entries go, eight users write all the while.

Before, during and after on the same disk in the same run; where a machine is busy, look at the ratios.
The ids of the deleted are scattered, as those of a chat network are, so that each lies in another page of the index.
"""

import asyncio
from functools import partial
from time import perf_counter

import uvloop

from whisper_fast import Message
from whisper_fast.journal import DONE, Journal, encoded, stub
from whisper_fast.retention import Retention
from whisper_fast.store.sqlite import Database

OLD, WRITERS, EVERY, SECONDS = 20_000, 8, 0.004, 4
INSERT = """INSERT INTO journal (platform, channel, message_id, user, accepted_at, message, reply, state, age)
            VALUES (?, ?, ?, ?, 0, ?, ?, ?, 0)"""


def fill(connection, numbers):
    for number in numbers:
        message = Message(user=f"u{number % 1000}", text="", id=f"{number * 2654435761 % 2**32:08x}", channel="c")
        names = (message.platform, message.channel, message.id, message.user)
        connection.execute(INSERT, (*names, encoded(stub(message)), bytes(600), DONE))


async def write(journal, number, waited):
    for count in range(1 << 30):
        message = Message(user=f"w{number}", text="t" * 90, id=f"{count}:{perf_counter()}", channel="c")
        since = perf_counter()
        await journal.accept(message, encoded(message))
        waited.append(perf_counter() - since)
        await asyncio.sleep(EVERY)


async def while_writing(journal, work):
    """Return the median and the p99 of the accepts during `work`, in ms, what it returned and its seconds."""
    waited, since = [], perf_counter()
    writers = [asyncio.create_task(write(journal, number, waited)) for number in range(WRITERS)]
    result = await work
    took = perf_counter() - since
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    waited.sort()
    return waited[len(waited) // 2] * 1000, waited[int(0.99 * len(waited))] * 1000, result, took


async def measured(folder):
    database = await Database.open(folder)
    try:
        journal = Journal(database)
        for first in range(0, OLD, 10_000):
            await database.write(partial(fill, numbers=range(first, first + 10_000)))
        journal._born -= 10_000  # seconds that it has served, all at once
        retention = Retention(database, journal, max_age=1000, max_bytes=1 << 40)
        before = await while_writing(journal, asyncio.sleep(SECONDS))
        during = await while_writing(journal, retention.sweep())
        return before, during, await while_writing(journal, asyncio.sleep(SECONDS))
    finally:
        await database.close()


def test_accepts_while_retention_deletes(tmp_path, capsys):
    before, during, after = uvloop.run(measured(tmp_path))
    assert during[2] == OLD
    with capsys.disabled():
        print(f"\n{OLD} entries deleted in {during[3]:.1f} s")
        for name, (middle, late, *_) in {"before": before, "during": during, "after": after}.items():
            print(f"  an accept {name:6}  p50 {middle:6.2f} ms  p99 {late:6.2f} ms  {late / before[1]:.2f}x")
