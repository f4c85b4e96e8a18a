"""The process that is killed: `python -m whisper_fast.lab.prove.victim`.

It reads one `Life` a line, as JSON, forks a child that lives it, and says `born <pid>` and, when the child is dead,
`dead <status>`. The fork saves the imports alone: each child opens its engine, its files and its loop by itself.
The child writes to the same pipe, in lines that a pipe keeps whole:

    accepted <id>            when `Engine.submit` has returned, and never before
    answered <id> <digest>   when the reply has come
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from ...engine import Engine
from ...llm import SimulatedLLM
from ...models.embedder import StaticEmbedder
from ...settings import Settings
from ..audit import digest
from ..users import message
from .points import arm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...llm.completion import Completion
    from ...message import ChatMessage, Message
    from ...ticket import Ticket

__all__ = ["Life", "Voice", "settings"]

REDELIVERED = 0.2
UNDER_WAY = 3  # messages of one user at a time


class Life(msgspec.Struct):
    """What a child does until it is killed; with `last` it finishes what is open and ends by itself."""

    folder: str
    number: int
    seed: int
    users: int = 8
    point: str | None = None
    passes: int = 1
    last: bool = False


class Voice(SimulatedLLM):
    """A simulated model that never says the same twice, so that a second answer cannot pass for the first."""

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer, differently each time."""
        answer = await super().chat(messages, **params)
        return msgspec.structs.replace(answer, text=f"{os.urandom(8).hex()} {answer.text}")


def settings(folder: str) -> Settings:
    """Return a victim's settings: nothing is quarantined, for it is never the message that kills."""
    return Settings(data_dir=Path(folder), quarantine_after=0, process_pool_size=1, thread_pool_size=2)


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


class Victim:
    """One life."""

    def __init__(self, life: Life, engine: Engine) -> None:
        self.life = life
        self.engine = engine
        self.random = Random(f"{life.seed}/{life.number}")
        self.answers: set[asyncio.Task[None]] = set()

    async def talk(self, user: int) -> None:
        """Send messages of one user, new ones and old ones, until killed."""
        room = asyncio.Semaphore(UNDER_WAY)
        for number in count(self.life.number * 1_000_000):
            await room.acquire()
            await self.send(self.again(user, number), room)
            await self.send(message(user, number, self.life.seed), room)

    def again(self, user: int, number: int) -> Message | None:
        """Return a message of this life or the one before, to be delivered once more; mostly none."""
        if self.random.random() >= REDELIVERED:
            return None
        begin = 1_000_000 * (self.life.number if number % 1_000_000 else max(1, self.life.number - 1))
        return message(user, self.random.randrange(begin, max(begin + 3, number)), self.life.seed)

    async def send(self, sent: Message | None, room: asyncio.Semaphore) -> None:
        """Send a message and say so; its answer is waited for beside the next one."""
        if sent is None:
            return
        ticket = await self.engine.submit(sent)
        say(f"accepted {sent.id}")
        task = asyncio.get_running_loop().create_task(self.hear(ticket, room), name="hear")
        self.answers.add(task)
        task.add_done_callback(self.answers.discard)

    async def hear(self, ticket: Ticket, room: asyncio.Semaphore) -> None:
        reply = await ticket.reply()
        say(f"answered {ticket.message_id} {digest(reply.text)}")
        room.release()


async def lived(life: Life, embedder: StaticEmbedder) -> None:
    """Live one life."""
    model = Voice(latency=0.002)
    async with Engine.open(settings(life.folder), llm=model, embedder=embedder) as engine:
        if not life.last:
            victim = Victim(life, engine)
            await asyncio.gather(*map(victim.talk, range(life.users)))


def main() -> None:
    """Fork one child for each line of stdin, one after the other."""
    logging.getLogger("whisper_fast").addHandler(logging.NullHandler())  # each start says what it goes on with
    embedder = StaticEmbedder()
    embedder.embed(["warm"])
    for line in sys.stdin:
        life = msgspec.json.decode(line, type=Life)
        pid = os.fork()
        if not pid:
            if life.point is not None:
                arm(life.point, life.passes)
            asyncio.run(lived(life, embedder))
            os._exit(0)
        say(f"born {pid}")
        say(f"dead {os.waitpid(pid, 0)[1]}")


if __name__ == "__main__":
    main()
