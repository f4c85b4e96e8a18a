"""A real `kill -9`: a child process runs the engine and is killed in the middle; then we count what was promised.

The child prints a message's id as soon as `Engine.submit` returns, that is when it is durable, and never before.
Run as a module it is that child: `python -m whisper_fast.lab.crash DATA_DIR USERS SEED LLM_LATENCY`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..engine import Engine
from ..errors import StoreError
from ..llm import SimulatedLLM
from ..settings import Settings
from . import audit
from .users import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..llm.completion import Completion
    from ..message import ChatMessage

__all__ = ["crash"]


class Counting(SimulatedLLM):
    """A simulated model that counts how often it was asked."""

    calls = 0

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer, and count."""
        self.calls += 1
        return await super().chat(messages, **params)


async def crash(data_dir: Path, *, users: int, seed: int, llm_latency: float, kill_after: int) -> dict[str, int]:
    """Kill an engine after `kill_after` promises, start it again, ask again; return accepted, lost, duplicated.

    `duplicated` counts turns stored twice and messages that had a reply and were put to the model a second time.
    Raises StoreError if the child ends by itself or the store cannot be opened again.
    """
    promised = await killed(data_dir, users, seed, llm_latency, kill_after)
    before = audit.states(data_dir)
    missing = sum(message_id not in before for message_id in promised)
    model = Counting(latency=llm_latency)
    settings = lab_settings(data_dir, users)
    async with Engine.open(settings, llm=model) as engine:
        await asyncio.gather(*(engine.respond(again(message_id)) for message_id in promised))
    unanswered = len(before) - audit.answered(before) + missing
    return {
        "accepted": len(promised),
        "answered_before": audit.answered(before),
        "lost": missing + audit.lost(data_dir, promised),
        "duplicated": audit.duplicated(data_dir) + max(0, model.calls - unanswered),
    }


async def killed(data_dir: Path, users: int, seed: int, llm_latency: float, kill_after: int) -> list[str]:
    """Start the child, kill it after `kill_after` promises, and return all that it has promised."""
    arguments = ("-P", "-m", "whisper_fast.lab.crash", str(data_dir), str(users), str(seed), str(llm_latency))
    child = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    lines = cast("asyncio.StreamReader", child.stdout)
    promised: list[str] = []
    async for line in lines:
        promised.append(line.decode().strip())
        if len(promised) == kill_after:
            child.send_signal(signal.SIGKILL)
    if await child.wait() != -signal.SIGKILL:
        raise StoreError(f"the child ended by itself with {child.returncode} after {len(promised)} messages")
    return promised


def again(message_id: str) -> Any:
    """Return the message of that id as it was sent the first time."""
    seed, user, number = map(int, message_id.split("-"))
    return message(user, number, seed)


def lab_settings(data_dir: Path, users: int) -> Settings:
    """Return the settings of a run: room for every user's call to the model at once."""
    return Settings(data_dir=data_dir, max_concurrent_requests=max(50, users))


async def promise(data_dir: Path, users: int, seed: int, llm_latency: float) -> None:
    """Send messages round by round until killed; print each id once its message is durable."""
    async with Engine.open(lab_settings(data_dir, users), llm=SimulatedLLM(latency=llm_latency)) as engine:

        async def send(user: int, number: int) -> None:
            ticket = await engine.submit(message(user, number, seed))
            sys.stdout.write(ticket.message_id + "\n")
            sys.stdout.flush()
            await ticket.reply()

        for number in count():
            await asyncio.gather(*(send(user, number) for user in range(users)))


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    asyncio.run(promise(Path(folder), int(numbers[0]), int(numbers[1]), float(numbers[2])))
