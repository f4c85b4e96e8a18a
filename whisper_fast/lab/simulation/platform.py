"""A chat network as a bot sees it: it takes a reply, refuses it, or takes it and breaks off before it says so."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .plan import DEDUPLICATING

if TYPE_CHECKING:
    from ...engine import Engine
    from ...outbox import Outgoing
    from .world import World

__all__ = ["Platform"]

SLOW = 0.3  # mean seconds of a sending
HANGING = 45.0  # seconds, more than the engine waits


class Platform:
    """The network `name`; what its users are shown is in the world's verdict."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name

    def join(self, engine: Engine) -> None:
        """Let an engine send its replies here."""
        engine.on_reply(self.send, platform=self.name, deduplicates=self.name in DEDUPLICATING)

    async def send(self, out: Outgoing) -> None:
        """Show a reply, once in a while to no avail. Raises ConnectionError."""
        world, plan = self._world, self._world.plan
        world.note(f"send {out.message_id}{' again' if out.again else ''}")
        world.verdict.sending(out)
        await asyncio.sleep(plan.random.expovariate(1 / SLOW))
        fate = 1.0 if world.calm else plan.random.random() / max(plan.sender_fails, 1e-9)
        if fate < 0.4:
            raise ConnectionError("reset before it was shown")
        world.shown(out)
        if fate < 0.8:
            raise ConnectionError("reset after it was shown")
        if fate < 1.0:
            await asyncio.sleep(HANGING)
        world.verdict.known(out.reply.text)
