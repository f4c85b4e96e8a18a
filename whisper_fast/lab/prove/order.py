"""Promise 3: one user's messages are put to the model and answered in order, and nobody is starved.

All users write at once, some messages ahead of their answers. The model takes exponential times, fails now and then
with errors of both kinds, and the turns of different users overlap. A message that failed is out of the order from
then on: its sender was told so.

How long a user waits is counted in calls of the model for others, between two calls for a user who has more to be
answered: a fair queue lets each of the others by about once. So the figure is that of the queue, whatever the machine
is busy with. A wait in which a call for the user has failed does not count: the engine pauses then.
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

__all__ = ["Order", "Wait"]

AHEAD = 8  # messages a user sends before the first of them is answered
MEAN_SECONDS = 0.002  # the model's
FAILING = 0.01  # of the calls, each kind
STARVED = 5.0  # times as many calls for others as there are users


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
            self._order.pausing(messages[-1]["content"])
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


class Wait:
    """How long one user has waited: `since` which call of the model, None while there is nothing to be answered."""

    __slots__ = ("left", "longest", "pausing", "since")

    def __init__(self) -> None:
        self.since: int | None = None
        self.left = 0  # messages that were sent and not yet put to the model
        self.longest = 0
        self.pausing = False

    def failed(self) -> None:
        """Note that the user's call fails, and that a pause follows."""
        self.pausing, self.since = True, None

    def sent(self, calls: int) -> None:
        """Note a message that is sent after so many calls."""
        if not self.left and not self.pausing:
            self.since = calls
        self.left += 1

    def asked(self, calls: int, *, first: bool) -> None:
        """Note the user's call, with a message that was not put to the model before if it is the `first`."""
        if self.since is not None:
            self.longest = max(self.longest, calls - self.since)
        self.left -= first
        self.pausing = False
        self.since = calls if self.left else None


class Order(Proof):
    """`users` users with `messages` messages each."""

    name = "order"
    must_be_zero = ("inversions", "starved")
    must_not_be_zero = ("answered",)

    def __init__(self, users: int = 500, messages: int = 20, seed: int = 0, engine: type[Engine] = Engine) -> None:
        self.arguments = f"--users {users} --messages {messages} --seed {seed}"
        self.users = users
        self.each = messages
        self.seed = seed
        self._engine = engine
        self._asked: defaultdict[str, Numbers] = defaultdict(Numbers)
        self._answered: defaultdict[str, Numbers] = defaultdict(Numbers)
        self._failed: set[str] = set()
        self._waits: defaultdict[str, Wait] = defaultdict(Wait)
        self._sent = self._calls = 0
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
        """Return messages, answered, inversions, failed, starved, worst_wait_ratio.

        starved: users who had to let others by more than five times as often as there are users, or were not answered
        at all; worst_wait_ratio: how often the one who waited longest had to, over the users.
        """
        longest = {user: max(self._now(wait), wait.longest) / self.users for user, wait in self._waits.items()}
        every = (*self._asked.values(), *self._answered.values())
        return {
            "messages": self._sent,
            "inversions": sum(one.inversions for one in every),
            "failed": len(self._failed),
            "answered": sum(one.seen for one in self._answered.values()),
            "starved": sum(over > STARVED or not self._answered[user].seen for user, over in longest.items()),
            "worst_wait_ratio": round(max(longest.values()), 2) if longest else None,
            "users": self.users,
            "seconds": round(perf_counter() - self._began, 1),
            "seed": self.seed,
        }

    def asked(self, words: str) -> None:
        """Note that the model was asked for "user number"; a second try after a failure does not count."""
        user, number = words.split()
        self._calls += 1
        self._waits[user].asked(self._calls, first=int(number) > self._asked[user].last)
        if words not in self._failed and (sequence := self._asked[user]).last != int(number):
            sequence.note(int(number))

    def pausing(self, words: str) -> None:
        """Note that a call fails: what its user waits from now on is a pause."""
        self._waits[words.split()[0]].failed()

    def _now(self, wait: Wait) -> int:
        return 0 if wait.since is None else self._calls - wait.since

    async def _talk(self, engine: Engine, user: str) -> None:
        answers: deque[asyncio.Task[None]] = deque(maxlen=AHEAD)
        async with asyncio.TaskGroup() as hearing:
            for number in range(self.each):
                text = f"{user} {number}"
                ticket = await engine.submit(Message(user=user, text=text, id=text, channel="lab", platform="lab"))
                self._sent += 1
                self._waits[user].sent(self._calls)
                answers.append(hearing.create_task(self._hear(ticket, user, number), name="hear"))
                if len(answers) == AHEAD:
                    await answers.popleft()

    async def _hear(self, ticket: Ticket, user: str, number: int) -> None:
        try:
            await ticket.reply()
        except WhisperFastError:
            self._failed.add(f"{user} {number}")
        else:
            self._answered[user].note(number)
