"""One day of an engine, life after life of its process, and everything that was seen from outside."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from contextlib import asynccontextmanager, suppress
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from ... import clock
from ...errors import Closed, LLMRateLimited, LLMRejected, LLMUnavailable, StoreError, WhisperFastError
from ...llm.completion import Completion
from ...message import Delta
from ...models.embedder import StaticEmbedder
from ...settings import Settings
from ..faulty_disk import FaultyDisk
from ..prove.isolation import CANARY, MARKS, MAY_HEAR
from ..users import word
from .loop import Stalled, VirtualLoop
from .parts import simulated_engine
from .plan import DAY, DEDUPLICATING, PLATFORMS, Plan
from .platform import Platform
from .verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
    from pathlib import Path

    from ...engine import Engine
    from ...message import ChatMessage, Message
    from ...outbox import Outgoing
    from ...store.sqlite import Database

__all__ = ["World", "simulate"]

BIRTH = 1_700_000_000.0  # epoch seconds at which every day begins
HEALING = 5.0  # seconds a fault of the disk lasts at most
LOOK = 5.0  # seconds between two looks in calm and night
CALM = 2 * 3600.0  # seconds after the day in which an engine must finish everything by itself
NIGHT = 4 * 3600.0  # seconds after the day in which everything must be finished
EMBEDDERS: list[StaticEmbedder] = []
SETTINGS: list[Settings] = []


def simulate(seed: int, folder: Path) -> Verdict:
    """Live the day of a seed in `folder`, which is emptied first, and judge it."""
    if not EMBEDDERS:
        EMBEDDERS.append(StaticEmbedder())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random.seed(seed)
    with FaultyDisk(seed=seed) as disk:
        world = World(seed, folder, disk)
        world.live()
        return world.judged()


class Model:
    """A language model that is slow, fails, and never says the same twice; it reports every prompt to the world."""

    name = model = "simulated"

    def __init__(self, world: World) -> None:
        self._world = world
        self._answers = 0

    async def chat(self, messages: Sequence[ChatMessage], **_: Any) -> Completion:
        """Answer after a while, or fail."""
        world, plan = self._world, self._world.plan
        world.prompted(messages)
        await asyncio.sleep(plan.random.expovariate(1 / plan.model_seconds))
        if not world.calm and plan.random.random() < plan.model_fails:
            error = plan.random.choice(FAILURES)()
            if isinstance(error, LLMRejected):
                world.verdict.refused(messages[-1]["content"])
            raise error
        self._answers += 1
        return Completion(text=f"answer {self._answers} to {messages[-1]['content']}", model=self.name)

    async def stream(self, messages: Sequence[ChatMessage], **params: Any) -> AsyncGenerator[Delta, None]:
        """Answer in two pieces."""
        whole = (await self.chat(messages, **params)).text
        yield Delta(whole[:5])
        await asyncio.sleep(0.01)
        yield Delta(whole[5:], finish_reason="stop")

    async def close(self) -> None:
        """Hold nothing."""


FAILURES = (
    partial(LLMUnavailable, "away", status=503),
    partial(LLMRateLimited, "too much", status=429, retry_after=2.0),
    partial(LLMRejected, "never", status=400),
)


class World:
    """The day of a seed: `log` is all that was seen, in order."""

    def __init__(self, seed: int, folder: Path, disk: FaultyDisk) -> None:
        self.seed = seed
        self.plan = Plan(seed)
        self.folder = folder
        self.disk = disk
        self.now = 0.0
        self.jumped = 0.0
        self.calm = False
        self.verdict = Verdict(seed)
        self.log: list[str] = []
        self.acts = list(self.plan.acts)
        self.crashes = [*self.plan.crashes]
        self.model = Model(self)
        self.settings = settings_of(folder, self.plan.policy)
        self.clients: set[asyncio.Task[None]] = set()
        self.databases: list[Database] = []
        self.lane: list[str] = []  # the messages of this life, in the order in which they were sent
        self.died = False
        self.platforms = [Platform(self, name) for name in PLATFORMS]
        self.calmed = False  # whether a life has had hours in which all was well
        self.serving = False  # whether an engine is open and was not told to stop
        self.loop: VirtualLoop

    def live(self) -> None:
        """Let the process live and die until the day is over, then let the last one finish its work."""
        logging.disable(logging.CRITICAL)  # what fails here was made to fail
        try:
            while self.crashes or self.acts or not self.calmed:
                self._life(self._day())
            self._life(self._night())
        finally:
            logging.disable(logging.NOTSET)

    def judged(self) -> Verdict:
        """Return the verdict on the whole day."""
        self.verdict.audit(self.folder)
        self.verdict.digest = blake2b("\n".join(self.log).encode(), digest_size=16).hexdigest()
        return self.verdict

    def prompted(self, messages: Sequence[ChatMessage]) -> None:
        """Hold a prompt against its user; note in which order a user's messages come to the model."""
        user, scope, *_ = messages[-1]["content"].split()
        allowed = MAY_HEAR[scope]
        for message in messages:
            for found in CANARY.findall(str(message["content"])):
                if found != word(int(user)) and not (found in MARKS and MARKS[found] in allowed):
                    self.verdict.leaks += 1
        self.verdict.asked(messages[-1]["content"])
        self.note(f"asked {messages[-1]['content']}")

    def note(self, line: str) -> None:
        """Write into the log."""
        self.log.append(f"{self.loop.now:.6f} {line}")

    # ---- lives

    def _life(self, work: Coroutine[Any, Any, None]) -> None:
        """Run one process to its end or its death."""
        self.loop = loop = VirtualLoop(self.now, self._delay, self._look)
        self.verdict.born()
        self.lane.clear()
        self.clients.clear()
        self.died = self.serving = False
        with clock.replaced(monotonic=loop.time, wall=self._wall):
            task = loop.create_task(work, name="life")
            task.add_done_callback(lambda _: loop.stop())
            if self.crashes:
                loop.call_at(self.crashes[0], self._kill)
            try:
                loop.run_forever()
            except Stalled as error:
                self.verdict.stuck.append(str(error))
            self.now = loop.now
            self._bury(task)

    def _look(self) -> bool:
        """Let the process die with the power; say whether it lives."""
        if self.disk.dead and not self.died:
            self._die("power cut")
        return not self.died

    def _kill(self) -> None:
        self.crashes.pop(0)
        self._die("killed")

    def _die(self, why: str) -> None:
        """Let the process end here."""
        self.note(why)
        self.verdict.died()
        self.died = True
        self.loop.stop()

    def _bury(self, task: asyncio.Task[None]) -> None:
        """Close what a process had open; after its death nothing that it still does reaches the disk."""
        if not self.died and task.done() and not task.cancelled() and (error := task.exception()) is not None:
            self.note(f"ended with {type(error).__name__}")
            if not isinstance(error, StoreError):
                self.verdict.stuck.append(f"{type(error).__name__}: {error}")
        if not self.died:
            self.verdict.problems += self.loop.problems
        power, claims = self.disk.dead, self.folder / "claims"
        left = claims.read_bytes() if claims.exists() else b""
        self.disk.freeze()
        self.loop.die()
        for database in self.databases:
            with suppress(Exception):
                database._readers.close()
            with suppress(Exception):
                database._writer._opened.close()
        self.databases.clear()
        if power:
            self.disk.power_on()
        else:
            self.disk.thaw()
        if left:
            claims.write_bytes(left)

    def _delay(self) -> float:
        return self.plan.random.expovariate(1 / self.plan.slow)

    def _wall(self) -> float:
        return BIRTH + self.loop.now + self.jumped

    async def _day(self) -> None:
        """Do what is due until the day is over or the process dies."""
        async with self._open() as engine:
            self.serving = True
            while self.acts:
                await asyncio.sleep(max(0.0, self.acts[0].at - self.loop.now))
                act = self.acts.pop(0)
                self.note(f"{act.kind} {getattr(act.detail, 'id', act.detail)}")
                getattr(self, f"_{act.kind}")(engine, act.detail)
            await asyncio.sleep(max(0.0, DAY - self.loop.now))
            await self._calm_hours(engine)
            self.serving = False
        await self._clients_end()

    async def _calm_hours(self, engine: Engine) -> None:
        """Let the engine go on by itself, with model, disk and platforms that are well again."""
        self.calm = True
        self.disk.heal()
        for _ in range(int(CALM / LOOK)):
            await asyncio.sleep(LOOK)
            left = await self._undone(engine)
            if not left:
                break
        else:
            self.verdict.left += left
        self.calmed = True

    async def _undone(self, engine: Engine) -> list[str]:
        """Return who waits, and the messages that are not finished or not sent where they may be sent again."""
        entries = await engine._journal.unfinished()
        for name in sorted(DEDUPLICATING):
            entries += await engine._journal.held(name, released=False)
        waiting = [f"client {task.get_name()}" for task in self.clients]
        return waiting + [f"{entry.message.id}: state {entry.state}" for entry in entries]

    async def _night(self) -> None:
        """Start once more, with a model and a disk that are well: what is finished stays so."""
        async with self._open() as engine:
            for _ in range(int(NIGHT / LOOK)):
                if not await engine._journal.unfinished():
                    break
                await asyncio.sleep(LOOK)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Engine]:
        self.note("born")
        kind = simulated_engine(self.disk, self._delay, self.databases)
        async with kind.open(self.settings, llm=self.model, embedder=EMBEDDERS[0]) as engine:
            for platform in self.platforms:
                platform.join(engine)
            yield engine

    async def _clients_end(self) -> None:
        """Wait for those who still wait for an answer: nobody may wait for ever."""
        if self.clients:
            _, left = await asyncio.wait(self.clients, timeout=60.0)
            self.verdict.stuck += [f"client {task.get_name()} waits for ever" for task in left]

    def _client(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self.loop.create_task(work, name=name)
        self.clients.add(task)
        task.add_done_callback(self.clients.discard)
        return task

    # ---- what happens

    def _respond(self, engine: Engine, message: Message) -> None:
        self._client(self._hear(engine, message), message.id)

    def _stream(self, engine: Engine, message: Message) -> None:
        self._client(self._hear(engine, message, streamed=True), message.id)

    def _abandon(self, engine: Engine, message: Message) -> None:
        task = self._client(self._hear(engine, message), message.id)
        self.loop.call_later(self.plan.random.expovariate(20.0), task.cancel)

    async def _hear(self, engine: Engine, message: Message, *, streamed: bool = False) -> None:
        """Send a message as a client does, and take down what comes of it."""
        verdict = self.verdict
        fresh = verdict.delivered(message)
        number = len(self.lane)
        self.lane.append(message.id)
        try:
            ticket = await engine.submit(message, streamed=streamed)
            verdict.accepted(message)
            self.note(f"accepted {message.id}")
            if message.platform in PLATFORMS:
                return  # the answer goes there by itself
            text = "".join([piece async for piece in ticket.pieces()]) if streamed else (await ticket.reply()).text
        except WhisperFastError as error:
            self.note(f"{message.id} {type(error).__name__}")
            if isinstance(error, Closed) and self.serving:
                verdict.stuck.append(f"{message.id} was left to the next start by an engine that runs")
            if isinstance(error, LLMRejected):
                verdict.told_refused(message)
            return
        self.note(f"answered {message.id} {text}")
        verdict.answered(message, text, number if fresh and not streamed else None)
        self._look_at(message.user, text)

    def shown(self, out: Outgoing) -> None:
        """Take down what a platform shows."""
        self.note(f"shown {out.message_id} {out.reply.text}")
        self.verdict.shown(out)
        self._look_at(out.user, out.reply.text)

    def _look_at(self, user: str, text: str) -> None:
        """Count a reply that holds somebody else's words."""
        self.verdict.leaks += not all(found in (word(int(user[1:])), *MARKS) for found in CANARY.findall(text))

    def _fault(self, _: Engine, fault: tuple[str, int, int, int | None]) -> None:
        method, code, nth, times = fault
        self.disk.fail(method, nth=nth, code=code, times=times)
        self.loop.call_later(self.plan.random.uniform(0.0, HEALING), self.disk.heal)

    def _cut(self, _: Engine, after: int) -> None:
        self.disk.cut_power(after=after)

    def _jump(self, _: Engine, seconds: float) -> None:
        self.jumped += seconds

    def _flag(self, engine: Engine, flag: tuple[str, bool]) -> None:
        setattr(engine.flags, *flag)

    def _hint(self, engine: Engine, user: str) -> None:
        engine.hint(user)

    def _forget(self, engine: Engine, user: str) -> None:
        self._client(self._forgotten(engine, user), f"forget {user}")

    async def _forgotten(self, engine: Engine, user: str) -> None:
        before = self.verdict.forgetting(user)
        try:
            await engine.forget(user)
        except WhisperFastError as error:
            self.note(f"forget {type(error).__name__}")
        else:
            self.note(f"forgot {user}")
            self.verdict.forgot(before)


def settings_of(folder: Path, policy: str) -> Settings:
    """Return the settings of a day; they are read once, for they cost more than the day's first messages."""
    if not SETTINGS:
        SETTINGS.append(Settings(process_pool_size=1, max_wait_seconds=3600.0))
    return SETTINGS[0].model_copy(update={"data_dir": folder, "when_busy": policy})
