"""The demonstration: the bot's sequential way and the engine on the same work, then kills with -9 and the count."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import clock
from ..engine import Engine
from ..llm import SimulatedLLM
from ..settings import Settings
from . import users as people
from .figures import Figures
from .prove.crash import Crash
from .reference import Sequential

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..memory import MemoryStore
    from ..message import Message, Reply

__all__ = ["Plan", "demo", "lab_settings"]

KILLS = 10


class Plan(NamedTuple):
    """What is simulated: each user has `memories` memories and sends one message, all at the same moment."""

    users: int = 200
    llm_latency: float = 0.2
    memories: int = 20
    seed: int = 0


async def demo(plan: Plan, show: Callable[[str, Figures], None]) -> dict[str, Any]:
    """Run both sides and the crash; return sequential, engine, speedup, kills, accepted, lost, duplicated.

    `show(side, figures)` is called as turns end. Raises StoreError.
    """
    with TemporaryDirectory(prefix="whisper-fast-demo-") as folder:
        sequential = await run_sequential(plan, Path(folder, "sequential"), show)
        engine = await run_engine(plan, Path(folder, "engine"), show)
        killing = Crash(KILLS, plan.seed)
        await killing.run(Path(folder, "crash"), lambda share, words: None)
        counted = killing.figures()
    return {
        "sequential": sequential.as_dict(),
        "engine": engine.as_dict(),
        "speedup": round(engine.turns_per_s / sequential.turns_per_s, 2),
        **{name: counted[name] for name in ("kills", "accepted", "lost", "duplicated")},
    }


async def run_sequential(plan: Plan, folder: Path, show: Callable[[str, Figures], None]) -> Figures:
    """Lead all messages through the bot's way."""
    async with Sequential.open(lab_settings(folder, plan.users), SimulatedLLM(latency=plan.llm_latency)) as bot:
        await tell(bot.memory, plan)
        return await measure("sequential", bot.respond, plan, show)


async def run_engine(plan: Plan, folder: Path, show: Callable[[str, Figures], None]) -> Figures:
    """Lead the same messages through the engine."""
    model = SimulatedLLM(latency=plan.llm_latency)
    async with Engine.open(lab_settings(folder, plan.users), llm=model) as engine:
        await tell(engine.memory, plan)
        return await measure("engine", engine.respond, plan, show)


def lab_settings(data_dir: Path, users: int) -> Settings:
    """Return the settings of a run: room for every user's call to the model at once."""
    return Settings(data_dir=data_dir, max_concurrent_requests=max(50, users))


async def tell(memory: MemoryStore, plan: Plan) -> None:
    """Give every user memories, so that recall has something to search."""
    for user in range(plan.users):
        await memory.add_many(f"user-{user}", people.memories(user, plan.memories, plan.seed))


async def measure(
    side: str, respond: Callable[[Message], Awaitable[Reply]], plan: Plan, show: Callable[[str, Figures], None]
) -> Figures:
    """Send every user's message now and time each reply."""
    figures = Figures(plan.users, plan.llm_latency)

    async def send(user: int) -> None:
        await respond(people.message(user, 0, plan.seed))
        figures.note(clock.monotonic() - figures.began)
        show(side, figures)

    figures.start()
    await asyncio.gather(*(send(user) for user in range(plan.users)))
    return figures
