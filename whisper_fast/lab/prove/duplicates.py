"""Promise 2: a message delivered again gets the same answer, whenever it comes and whatever was in between.

A fifth of all deliveries is a message that was delivered before: while it is being answered, later, and after
restarts, every second of which leaves its turns in the middle. The model never says the same twice, so an answer that
was made a second time shows. The journal keeps all that is finished: what it has let go of would be a new message.
"""

from __future__ import annotations

import asyncio
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ...engine import Engine
from ...errors import Closed
from ...message import Message
from ...settings import Settings
from ..audit import Ledger, digest, duplicated
from .proof import Proof
from .victim import Voice

if TYPE_CHECKING:
    from pathlib import Path

    from .proof import Show

__all__ = ["Duplicates"]

AGAIN = 0.2
RESTARTS = 4
ALL = 1 << 40  # bytes of finished messages that the journal may keep
AT_ONCE = 256
USERS = 500


class Duplicates(Proof):
    """`deliveries` deliveries over five runs of an engine on one folder."""

    name = "duplicates"
    must_be_zero = ("duplicates", "lost")
    must_not_be_zero = ("heard", "redelivered")

    def __init__(self, deliveries: int = 10_000, seed: int = 0, engine: type[Engine] = Engine) -> None:
        self.arguments = f"--deliveries {deliveries} --seed {seed}"
        self.deliveries = deliveries
        self.seed = seed
        self._engine = engine
        self._random = Random(seed)
        self._ledger = Ledger()
        self._delivered = self._fresh = self._stored_twice = self._lost = 0
        self._began = perf_counter()

    async def run(self, folder: Path, show: Show) -> None:
        """Deliver in parts with a restart after each, then finish what is open and count."""
        self._began = perf_counter()
        for part in range(RESTARTS + 1):
            upto = self.deliveries * (part + 1) // (RESTARTS + 1)
            hasty = part % 2 == 0 and part < RESTARTS
            settings = Settings(
                data_dir=folder,
                drain_seconds=0.001 if hasty else 60.0,
                max_wait_seconds=3600.0,
                max_concurrent_requests=AT_ONCE,
                process_pool_size=1,
                quarantine_after=0,
                journal_max_bytes=ALL,
            )
            async with self._engine.open(settings, llm=Voice(latency=0.001)) as engine:
                workers = [
                    asyncio.create_task(self._deliver(engine, upto, show), name="deliver") for _ in range(AT_ONCE)
                ]
                while hasty and self._delivered < upto - AT_ONCE // 2:
                    await asyncio.wait(workers, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
                if not hasty:
                    await asyncio.gather(*workers)
            await asyncio.gather(*workers)
        self._stored_twice, self._lost = duplicated(folder), self._ledger.lost(folder)

    def figures(self) -> dict[str, Any]:
        """Return deliveries, duplicates (other answers to a message, turns stored twice), lost, messages, heard."""
        return {
            "deliveries": self._delivered,
            "duplicates": self._stored_twice + self._ledger.contradicted,
            "lost": self._lost,
            "messages": self._fresh,
            "heard": len(self._ledger.heard),
            "redelivered": self._delivered - self._fresh,
            "restarts": RESTARTS,
            "seconds": round(perf_counter() - self._began, 1),
            "seed": self.seed,
        }

    async def _deliver(self, engine: Engine, upto: int, show: Show) -> None:
        """Deliver one message after the other until the part is over or the engine stops."""
        while self._delivered < upto:
            message = self._next()
            self._delivered += 1
            if self._delivered % 100 == 0:
                show(self._delivered / self.deliveries, f"{self._delivered} deliveries")
            try:
                ticket = await engine.submit(message)
                self._ledger.note(f"accepted {message.id}")
                reply = await ticket.reply()
            except Closed:
                return
            self._ledger.note(f"answered {message.id} {digest(reply.text)}")

    def _next(self) -> Message:
        if self._fresh and self._random.random() < AGAIN:
            near = self._random.random() < 0.5  # half of them just now: the first one is being answered
            number = self._random.randrange(max(0, self._fresh - AT_ONCE) if near else 0, self._fresh)
        else:
            number = self._fresh
            self._fresh += 1
        user = f"u{number % USERS}"
        return Message(user=user, text=f"{user} says {number}", id=f"m{number}", channel="lab", platform="lab")
