"""Power cuts: one run of messages is recorded call by call, then the power is cut at any of its moments, many times.

The run holds what a disk does to a journal in its life: group commits, checkpoints, syncs that fail, a process that
is killed and begun again. Each cut takes what the platter may have kept at that moment, opens it as an engine does
(now and then with a second cut while it opens), and compares it with what had been promised by then.
"""

from __future__ import annotations

import asyncio
from contextlib import closing, suppress
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Final

import apsw

from ..conversation import Conversations
from ..errors import StoreError
from ..journal import Journal, encoded
from ..message import Message, Reply
from ..store.files import DATABASE, connect
from ..store.opened import Opened
from ..store.sqlite import Database
from . import audit
from .faulty_disk import FaultyDisk, memory_folder
from .platter import Platter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .platter import Event

__all__ = ["compared", "cuts", "record"]

SECOND: Final = 0.2  # the share of cuts with a second one while the engine starts
AGAIN: Final = 24  # messages that are delivered again to the next process
TOGETHER: Final = 8  # messages that are on their way side by side
FAILED_SYNCS: Final = 4  # in each process
PAUSE: Final = 0.01  # seconds after a refusal, as of somebody who tries again later


async def record(folder: Path, *, messages: int, processes: int, seed: int) -> list[Event]:
    """Lead messages through the journal of a new data folder; return every call to the disk and every promise.

    Each of the `processes` takes on its share of the `messages` and is killed at some moment; the next one is given
    the last of them again, as a platform delivers what was not answered.
    """
    random = Random(seed)
    with FaultyDisk(seed=seed, record=True) as disk:
        again: list[int] = []
        for process in range(processes):
            database = await Database.open(folder, vfs=disk.name)
            for _ in range(FAILED_SYNCS):
                disk.fail("xSync", nth=random.randrange(1, messages // processes))
            die(disk, random, messages)
            numbers = [*again, *range(process * messages // processes, (process + 1) * messages // processes)]
            await asyncio.gather(*(lane(database, disk, numbers[n::TOGETHER]) for n in range(TOGETHER)))
            disk.cut_power(after=0)
            await database.close()
            disk.restart()
            again = numbers[-AGAIN:]
        return list(disk.journal or ())


def die(disk: FaultyDisk, random: Random, messages: int) -> None:
    """Let the process die at some moment: at any call, or with a sync that fails."""
    if random.random() < 0.5:
        disk.cut_power(after=random.randrange(3 * messages, 8 * messages))
    else:
        disk.fail("xSync", nth=random.randrange(messages // 8, messages // 4), suffix="-wal", fatal=True)


async def lane(database: Database, disk: FaultyDisk, numbers: list[int]) -> None:
    for number in numbers:
        await lead(database, disk, number)


async def lead(database: Database, disk: FaultyDisk, number: int) -> None:
    """Lead one message as the engine does; a promise is noted when it is made. A step that fails ends it."""
    journal, conversations = Journal(database), talk(database)
    message = Message(user=f"u{number % 5}", text=f"message {number} " * 40, id=f"m{number}", channel="c")
    reply = Reply(id=message.id, user=message.user, text=f"reply {number} " * 10)
    try:
        entry = await journal.accept(message, encoded(message))
        disk.note(f"accepted {message.id}".encode())
        if entry.reply is None:  # else it was answered before the process died: that reply is given
            await journal.record(entry, reply)
        disk.note(f"answered {message.id}".encode())
        said = partial(conversations.insert, turn=entry.id, message=message, reply=reply.text)
        await journal.complete(entry, said, sent=lambda: True)
    except StoreError:
        await asyncio.sleep(PAUSE)


def talk(database: Database) -> Conversations:
    return Conversations(database, max_bytes=1 << 20, ttl=1.0, bootstrap=1, longest=1, caching=lambda: False)


def cuts(events: list[Event], count: int, *, seed: int) -> Iterator[dict[str, int]]:
    """Cut the power `count` times, at moments spread over the whole run; yield what each cut has cost.

    lost      messages that were accepted and are not there
    twice     messages that were answered and would be answered again, and turns that are stored more than once
    damaged   1 where the database cannot be opened or fails its integrity check
    """
    random = Random(seed)
    for position, platter, promised in moments(events, count, random):
        left = platter.survivors(Random(f"{seed} {position}"))
        yield audited(left, promised, random)


def moments(events: list[Event], count: int, random: Random) -> Iterator[tuple[int, Platter, dict[str, set[str]]]]:
    """Walk through a run; yield `count` moments in their order, with the disk and the promises of each."""
    chosen = sorted(random.randrange(len(events)) for _ in range(count))
    platter, promised, done = Platter(), {"accepted": set[str](), "answered": set[str]()}, 0
    for number, moment in enumerate(chosen):
        for event in events[done : moment + 1]:
            if event.kind == "note":
                kind, _, name = event.data.decode().partition(" ")
                promised[kind].add(name)
            platter.apply(event, random)
        done = moment + 1
        yield number, platter, promised


def audited(left: dict[str, bytes], promised: dict[str, set[str]], random: Random) -> dict[str, int]:
    with memory_folder() as folder:
        for name, content in left.items():
            (folder / name.rpartition("/")[2]).write_bytes(content)
        try:
            if random.random() < SECOND:
                open_and_cut(folder, random)
            opened = Opened.make(folder / DATABASE, exclusive=True, vfs=None)
            opened.close()
            return compared(folder, promised)
        except (StoreError, apsw.Error):
            return {"lost": 0, "twice": 0, "damaged": 1}


def open_and_cut(folder: Path, random: Random) -> None:
    """Start as an engine does, and lose the power once more on the way."""
    with FaultyDisk(seed=random.randrange(1 << 30)) as disk:
        disk.cut_power(after=random.randrange(1, 60))
        with suppress(StoreError):
            Opened.make(folder / DATABASE, exclusive=True, vfs=disk.name).close()
        disk.cut_power(after=0)
        disk.power_on()


def compared(folder: Path, promised: dict[str, set[str]]) -> dict[str, int]:
    """Return what a cut has cost, as `cuts` says, of the messages `accepted` and `answered` before it."""
    found = audit.states(folder)
    missing = promised["accepted"] - found.keys()
    again = promised["answered"] - audit.answered(found)
    with closing(connect(folder / DATABASE)) as connection:
        sound = connection.pragma("integrity_check") == "ok"
    return {"lost": len(missing), "twice": len(again) + audit.duplicated(folder), "damaged": int(not sound)}
