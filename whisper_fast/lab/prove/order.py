"""Promise 3: one user's messages are put to the model and answered in order, and nobody is starved.

All users write at once, some messages ahead of their answers. The model takes exponential times, fails now and then
with errors of both kinds, and the turns of different users overlap. A message that failed is out of the order from
then on: its sender was told so.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine import Engine
from ...errors import LLMRejected, LLMUnavailable, WhisperFastError
from ...llm import SimulatedLLM
from ...message import Message
from ...settings import Settings
from .proof import Proof

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...llm.completion import Completion
    from ...message import ChatMessage
    from ...ticket import Ticket
    from .proof import Show

__all__ = ["Order"]

AHEAD = 8  # messages a user sends before the first of them is answered
MEAN_SECONDS = 0.002  # the model's
FAILING = 0.01  # of the calls, each kind


class Moody(SimulatedLLM):
    """A model of random pace that fails now and then; `asked(words)` is told of each call."""

    def __init__(self, seed: int, order: Order) -> None:
        super().__init__(lambda rng: -np.log(1.0 - rng.random()) * MEAN_SECONDS, seed=seed)
        self._order = order
        self._dice = Random(seed)

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer, or fail."""
        self._order.asked(messages[-1]["content"])
        die = self._dice.random()
        answer = await super().chat(messages, **params)
        if die < FAILING:
            raise LLMUnavailable("the model is away, as it was told to be", status=503)
        if die < 2 * FAILING:
            raise LLMRejected("the model refuses, as it was told to", status=400)
        return answer


class Numbers:
    """The numbers of one user as they come by: `inversions` are those below one that came before."""

    __slots__ = ("inversions", "last", "seen")

    def __init__(self) -> None:
        self.last = -1
        self.seen = 0
        self.inversions = 0

    def note(self, number: int) -> None:
        self.inversions += number < self.last
        self.last = max(self.last, number)
        self.seen += 1


class Order(Proof):
    """`users` users with `messages` messages each."""

    name = "order"
    must_be_zero = ("inversions", "starved")

    def __init__(self, users: int = 500, messages: int = 20, seed: int = 0, engine: type[Engine] = Engine) -> None:
        self.arguments = f"--users {users} --messages {messages} --seed {seed}"
        self.users = users
        self.each = messages
        self.seed = seed
        self._engine = engine
        self._asked: defaultdict[str, Numbers] = defaultdict(Numbers)
        self._answered: defaultdict[str, Numbers] = defaultdict(Numbers)
        self._failed: set[str] = set()
        self._waits: defaultdict[str, float] = defaultdict(float)
        self._sent = 0
        self._began = perf_counter()

    async def run(self, folder: Path, show: Show) -> None:
        """Let all users talk at once."""
        room = self.users * (AHEAD + 1)
        settings = Settings(data_dir=folder, max_wait_seconds=3600.0, max_waiting=room, process_pool_size=1)
        self._began = perf_counter()
        async with self._engine.open(settings, llm=Moody(self.seed, self)) as engine, asyncio.TaskGroup() as group:
            talking = {group.create_task(self._talk(engine, f"u{user}"), name="talk") for user in range(self.users)}
            while talking:
                _, talking = await asyncio.wait(talking, timeout=0.25)
                show(self._sent / (self.users * self.each), f"{self._sent} messages")

    def figures(self) -> dict[str, Any]:
        """Return messages, inversions, failed, starved users, and the longest mean wait over the mean of all."""
        ended = {user: self._answered[user].seen for user in self._asked}
        waits = [self._waits[user] / seen for user, seen in ended.items() if seen]
        every = (*self._asked.values(), *self._answered.values())
        return {
            "messages": self._sent,
            "inversions": sum(one.inversions for one in every),
            "failed": len(self._failed),
            "starved": sum(not seen for seen in ended.values()),
            "worst_wait_ratio": round(max(waits) / float(np.mean(waits)), 2) if waits else None,
            "users": self.users,
            "seconds": round(perf_counter() - self._began, 1),
            "seed": self.seed,
        }

    def asked(self, words: str) -> None:
        """Note that the model was asked for "user number"; a second try after a failure does not count."""
        user, number = words.split()
        if words not in self._failed and (sequence := self._asked[user]).last != int(number):
            sequence.note(int(number))

    async def _talk(self, engine: Engine, user: str) -> None:
        answers: deque[asyncio.Task[None]] = deque(maxlen=AHEAD)
        async with asyncio.TaskGroup() as hearing:
            for number in range(self.each):
                text = f"{user} {number}"
                began = perf_counter()
                ticket = await engine.submit(Message(user=user, text=text, id=text, channel="lab", platform="lab"))
                self._sent += 1
                answers.append(hearing.create_task(self._hear(ticket, user, number, began), name="hear"))
                if len(answers) == AHEAD:
                    await answers.popleft()

    async def _hear(self, ticket: Ticket, user: str, number: int, began: float) -> None:
        try:
            await ticket.reply()
        except WhisperFastError:
            self._failed.add(f"{user} {number}")
        else:
            self._answered[user].note(number)
            self._waits[user] += perf_counter() - began
