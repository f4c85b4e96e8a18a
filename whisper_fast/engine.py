"""The engine: builds every part from the settings, leads each message through them, and stops them in order.

The way of a message is in `turns.py`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar

from . import components
from .conversation import Conversations
from .errors import StoreError
from .executor import Executor
from .flags import Flags
from .journal import Journal, last
from .lanes import Lanes
from .llm.chosen import chosen_pool
from .llm.packing import Classifier
from .memory import MemoryStore
from .message import Message, Turn, checked_id, checked_user
from .models.batched import Batched
from .models.chosen import chosen_embedder, close_embedder
from .models.classifiers import EMOTION, LLMEmotion
from .models.emotion import VaderEmotion
from .monitor import Adaptation, Budget, Finder, Gauge, Parts, Probe, Record, controls_of
from .outbox import Outbox
from .pipeline import Pipeline
from .preload import Preload
from .retention import Retention
from .store.backup import backup
from .store.claims import Claims
from .store.forgotten import tell, untold
from .store.schema import everyone, forget_user
from .store.sqlite import Database
from .ticket import ReplyStream, Ticket
from .turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
    from pathlib import Path

    from .llm import Endpoint, LLMPool
    from .llm.completion import ChatProvider
    from .message import Reply
    from .models.embedder import Embedder
    from .outbox import Outgoing
    from .settings import Settings
    from .store.redis import Shared

__all__ = ["Engine"]

log = logging.getLogger(__name__)

RECALLED = 10
LOOK = 5.0  # seconds between two looks for what other processes have decided


class Engine:
    """The runtime under a companion bot; open it with `Engine.open`, it is closed when the block ends.

    `database` and `executor` are where it meets disk and threads: a simulation has its own, and is not `watched`: the
    machine's time and memory are not its own.
    """

    database: ClassVar[type[Database]] = Database
    executor: ClassVar[type[Executor]] = Executor
    watched: ClassVar[bool] = True

    def __init__(
        self, settings: Settings, database: Database, llm: LLMPool, embedder: Embedder, flags: Flags
    ) -> None:
        self.settings = settings
        self.flags = flags
        self.llm = llm
        self.llm_description = ""
        self.embedder = embedder
        self._database = database
        self._judge: LLMEmotion | None = None
        self._shared: Shared | None = None
        self._aside: set[asyncio.Task[None]] = set()
        self._make_mechanisms(settings)
        self._make_knowledge(settings)
        self._make_budget(settings)
        self._make_way(settings)
        database.on_foreign_change(self._changed_by_others)

    def _make_mechanisms(self, settings: Settings) -> None:
        """Make what orders and runs work."""
        self._lanes = Lanes(
            settings.max_waiting,
            settings.max_waiting_bytes,
            slots=self._slots,
            max_wait=settings.max_wait_seconds,
        )
        self._executor = self.executor(settings.thread_pool_size, settings.process_pool_size)
        self._embedding = Batched(
            self.embedder,
            self._executor,
            max_batch=settings.batch_size,
            max_wait=settings.batch_timeout_ms / 1000,
            enabled=lambda: self.flags.batching,
            failed=self.flags.failed,
        )

    def _make_knowledge(self, settings: Settings) -> None:
        """Make what is known of users: memories, recent conversations, and when they will return."""
        self.memory = MemoryStore(
            self._database,
            self.embedder,
            embed=self._embedding.many,
            cache_bytes=settings.memory_cache_bytes,
            batching=lambda: self.flags.batching,
            caching=lambda: self.flags.caching,
            ann=lambda: self.flags.ann,
            ann_rows=settings.ann_rows,
            failed=self.flags.failed,
        )
        seconds = settings.conversation_cache_timeout_minutes * 60
        self._conversations = Conversations(
            self._database,
            max_bytes=settings.conversation_cache_bytes,
            ttl=seconds,
            bootstrap=settings.conversation_cache_bootstrap_limit,
            longest=settings.conversation_cache_max_local,
            caching=lambda: self.flags.caching,
            failed=self.flags.failed,
        )
        self._preload = Preload(
            self._warm,
            self.memory.cool,
            gap=seconds,
            enabled=lambda: self.flags.preload and self.flags.caching,
            failed=self.flags.failed,
        )

    def _make_budget(self, settings: Settings) -> None:
        """Make what holds the process within its memory, and what lets sizes follow what they bring."""
        self._budget = Budget(
            Gauge(),
            {**self.memory.caches(), "conversations": self._conversations.cache},
            size=settings.memory_budget,
            shed=lambda text: setattr(self._lanes, "refusal", text),
            enabled=lambda: self.flags.adaptive and self.flags.budget,
            failed=self.flags.failed,
        )
        controls = controls_of(self._executor, {"embedding": self._embedding.batcher}, self.flags)
        self._adaptation = Adaptation(controls, busy=lambda: self._lanes.places > 0, failed=self.flags.failed)

    def _make_way(self, settings: Settings) -> None:
        """Make what a message goes through: journal, pipeline, turns, outbox; and what is taken down of it."""
        self._journal = Journal(self._database)
        self._claims = Claims(settings.data_dir / "claims")
        self._outbox = Outbox(self._journal)
        self._retention = Retention(
            self._database,
            self._journal,
            max_age=settings.journal_max_age_hours * 3600,
            max_bytes=settings.journal_max_bytes,
        )
        self._pipeline = Pipeline(self._executor, parallel=lambda: self.flags.parallel, failed=self.flags.failed)
        self._register(settings)
        self.record = Record() if settings.performance_monitoring_enabled else None
        self._turns = Turns(
            settings,
            lanes=self._lanes,
            journal=self._journal,
            claims=self._claims,
            pipeline=self._pipeline,
            llm=self.llm,
            outbox=self._outbox,
            memory=self.memory,
            conversations=self._conversations,
            record=self.record,
        )
        found = self.record if settings.bottleneck_detection_enabled else None
        self._finder = None if found is None else Finder(self._parts(found), self._adaptation.lately)

    def _parts(self, record: Record) -> Parts:
        """Return what the bottleneck finder looks at."""
        return Parts(
            lanes=self._lanes,
            database=self._database,
            executor=self._executor,
            pipeline=self._pipeline,
            llm=self.llm,
            budget=self._budget,
            record=record,
            probe=Probe(record.loop),
            batchers={"embedding": self._embedding.batcher},
            caches={"recall": self.memory.caches()["segments"], "conversation": self._conversations.cache},
            retrying=lambda: len(self._turns.recovery),
            sending=lambda: self._outbox.sending,
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: Settings | None = None,
        *,
        llm: LLMPool | ChatProvider | Endpoint | None = None,
        embedder: Embedder | None = None,
    ) -> AsyncIterator[Engine]:
        """Open the engine on its data folder and go on with what a crash left; close it in order at the end.

        `llm` None uses `LLM_CHAT_API_URL`, a model found on this machine, or the simulated one, in that order.
        Raises SettingsError, StoreError.
        """
        if settings is None:
            from .settings import Settings  # pydantic takes a third of the engine's import time

            settings = Settings()
        async with AsyncExitStack() as stack:
            database = await cls.database.open(settings.data_dir)
            stack.push_async_callback(database.close)
            flags = Flags(settings)
            stack.callback(flags.close)
            pool, description = await chosen_pool(llm, settings, flags)
            if pool is not llm:  # a pool that was handed in belongs to whoever made it
                stack.push_async_callback(pool.close)
            if embedder is None:
                embedder = await chosen_embedder(settings)
                stack.push_async_callback(close_embedder, embedder)
            engine = cls(settings, database, pool, embedder, flags)
            engine.llm_description = description
            log.info("%s", description)
            stack.push_async_callback(engine._stop)
            if settings.use_redis_cache:
                await engine._share()
            await engine.memory.start()
            engine._beside(engine._retention.run(), "retention")
            engine._beside(engine._preload.run(), "preload")
            engine._beside(engine._look_around(), "look around")
            if engine.record is not None and engine.watched:
                engine.record.loop.start()
            if engine.watched:
                engine._beside(engine._budget.run(), "memory budget")
                engine._beside(engine._executor.warm_up(), "warm workers")
                engine._beside(engine._adaptation.run(), "adaptation")
            if engine._finder is not None and engine.watched:
                engine._beside(engine._finder.run(), "bottleneck")
            await engine._turns.recovery.start()  # last: its turns run with what the caller registers at once
            yield engine

    async def respond(self, message: Message) -> Reply:
        """Answer a message. What is accepted is answered and remembered even if the caller stops waiting.

        Raises InvalidMessage, Overloaded, StoreError, LLMError.
        """
        return await (await self.submit(message)).reply()

    def stream(self, message: Message) -> ReplyStream:
        """Answer a message piece by piece; raises what `respond` raises, at the first step."""
        return ReplyStream(self.submit(message, streamed=True))

    async def submit(self, message: Message, *, streamed: bool = False) -> Ticket:
        """Accept a message; when this returns it is on the disk and will be answered.

        Raises InvalidMessage (IdReused for a `strict` one), Overloaded (Busy where the channel drops), Quarantined,
        Closed, StoreError; then nothing was accepted.
        """
        if self.record is not None:
            self.record.loop.wake()
        ticket = await self._turns.submit(message, streamed=streamed)
        self._preload.seen(message.user)
        return ticket

    def hint(self, user: str) -> None:
        """Say that `user` is about to write (a typing indicator): load memories and recent conversation at once."""
        if self.flags.preload and self.flags.caching:
            self._beside(self._warm_now(checked_user(user)), "preload")

    def on_reply(
        self, send: Callable[[Outgoing], Awaitable[object]], *, platform: str, deduplicates: bool = False
    ) -> None:
        """Let `await send(outgoing)` send every reply to messages of `platform`, in the order of each user's lane.

        A reply counts as sent when `send` returns. What a crash left in doubt is sent again, with the same nonce,
        where the platform `deduplicates` by it (as Discord does); elsewhere it is held until somebody releases it.
        """
        self._outbox.register(checked_id("platform", platform), send, deduplicates=deduplicates)

    def component(
        self,
        name: str,
        fn: Callable[[Turn], Any],
        *,
        deadline: float | None = None,
        needs: tuple[str, ...] = (),
        fallback: Any = None,
    ) -> None:
        """Add `fn(turn) -> value`, sync or async, to every turn; its value goes into the prompt under `name`.

        One that blocks runs in a thread. `deadline` is in seconds. A name that
        exists is replaced. Raises SettingsError.
        """
        seconds = self.settings.component_deadline if deadline is None else deadline
        self._pipeline.add(components.user_component(name, fn, deadline=seconds, needs=needs, fallback=fallback))

    def ready(self) -> dict[str, object]:
        """Say whether messages are accepted, and what is wrong if not."""
        problem, damage = self._database.problem, self._database.damage
        state = {"ready": problem is None and not self._lanes.closed, "store": str(problem or "ok")}
        return state if damage is None else {**state, "damage": str(damage)}

    def stats(self) -> dict[str, Any]:
        """Return counters since start: messages, places, writes, and those of each part."""
        return {
            **self._turns.counts,
            **self._journal.counts,
            **self._lanes.stats(),
            "retrying": len(self._turns.recovery),
            "commits": self._database.commits,
            "writes": self._database.writes,
            "llm": self.llm.stats(),
            "batchers": {"embedding": self._embedding.stats()},
            "memory": self.memory.stats(),
            "conversation": self._conversations.stats(),
            "preload": self._preload.stats(),
            "budget": self._budget.stats(),
            "flags": self.flags.stats(),
            "adaptation": self._adaptation.stats(),
            **({"loop": self.record.loop.stats()} if self.record is not None else {}),
            **({"bottleneck": self._finder.stats()} if self._finder is not None else {}),
            **({"redis": self._shared.stats()} if self._shared is not None else {}),
            **({"emotion": self._judge.stats()} if self._judge is not None else {}),
        }

    async def forget(self, user: str) -> None:
        """Delete everything of `user`: memories, conversations, journal; after the user's running turn.

        When this returns nothing of it can be read any more, also after a power cut. Its traces in the files are
        wiped by a compaction that follows by itself; backups that were made before keep what they hold.
        """
        place = self._lanes.enter(checked_user(user), admitted=True)
        try:
            upto = await self._database.write(last)
        except BaseException:
            place.leave()
            raise
        place.start(partial(self._forget, user, upto), "forget", slot=False)
        await place.ended()

    async def forget_everyone(self) -> None:
        """Delete everything of all users, of one after the other, as `forget` does it."""
        for user in await self._database.read(everyone):
            await self.forget(user)

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the memories of `user`, all turns so far included, as dicts that `memory.add_many` takes again."""
        place = self._lanes.enter(checked_user(user), admitted=True)
        place.start(partial(asyncio.sleep, 0), "export", slot=False)
        await place.ended()
        async for memory in self.memory.export(user):
            yield memory

    async def backup(self, target: Path) -> dict[str, object]:
        """Write a verified copy of the database to `target` while messages go on. Raises StoreError."""
        return await asyncio.to_thread(backup, self.settings.data_dir, target)

    async def embed(self, texts: list[str]) -> list[Any]:
        """Return a float32 vector for each text, batched with those of all users."""
        return list(await self._embedding.many(texts))

    async def _share(self) -> None:
        """Share recent conversations with other engines. Raises StoreError."""
        from .store.redis import Shared, node_of  # the client takes longer to import than the engine

        settings, secret = self.settings, self.settings.redis_password
        self._shared = Shared(
            await asyncio.to_thread(node_of, settings.data_dir),
            host=settings.redis_host,
            port=settings.redis_port,
            password=None if secret is None else secret.get_secret_value(),
            namespace=settings.redis_namespace,
            longest=settings.conversation_cache_max_local,
            ttl=settings.conversation_cache_timeout_minutes * 60,
            source=self._conversations.stored,
            changed=self._conversations.changed,
            untold=partial(self._database.read, untold),
            tell=lambda digests: self._database.write(partial(tell, digests=digests)),
        )
        self._conversations.share(self._shared)
        self._shared.start()

    def _register(self, settings: Settings) -> None:
        seconds = settings.component_deadline
        self._pipeline.add(self._emotion(settings))
        self._pipeline.add(components.embedding(self._embed_one, seconds))
        self._pipeline.add(components.recall(self.memory, RECALLED, seconds))
        self._pipeline.add(components.conversation(self._conversations, seconds))
        who = components.persona_text(settings.persona_file)
        self._pipeline.add(components.persona(who, always=settings.persona_file is not None))

    def _slots(self) -> int:
        """Return how many turns may run at once: the model's limit, and a few more that gather meanwhile."""
        limit = self.llm.limit
        return limit + max(2, isqrt(limit))

    def _beside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run what belongs to no message; it ends with the engine."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    def _emotion(self, settings: Settings) -> components.Component:
        """Return the component that reads the emotion, with the lexicon or with the language model."""
        lexicon = VaderEmotion()
        if settings.emotion == "llm":
            seconds = settings.emotion_deadline
            judge = Classifier(
                self.llm,
                EMOTION,
                max_batch=settings.batch_size,
                max_wait=settings.batch_timeout_ms / 1000,
                timeout=seconds,
                enabled=lambda: self.flags.batching,
            )
            self._judge = LLMEmotion(judge, lexicon, seconds)
            return components.emotion(self._judge.analyse, seconds + settings.component_deadline)

        async def analyse(message: Message) -> dict[str, float]:
            return await self._executor.run(lexicon.analyse, message.text)

        return components.emotion(analyse, settings.component_deadline)

    async def _embed_one(self, message: Message) -> Any:
        return await self._embedding.one(message.text, user=message.user, priority=message.priority)

    async def _forget(self, user: str, upto: int) -> None:
        rows = self._database.write(partial(forget_user, user=user, upto=upto))
        await asyncio.gather(rows, self.memory.forget(user))  # one commit
        self._conversations.forget(user)
        self._preload.forget(user)

    async def _warm(self, user: str, seconds: float | None = None) -> bool:
        """Load what a turn of `user` needs, the conversation for `seconds`; say whether there were no memories."""
        memories = self.memory.warm(user, guess=seconds is not None)
        return (await asyncio.gather(memories, self._conversations.warm(user, seconds)))[0]

    async def _warm_now(self, user: str) -> None:
        try:
            await self._warm(user)
        except StoreError as error:
            log.warning("preload: %s", error)

    async def _look_around(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            with suppress(StoreError):  # whoever writes is told
                await self._database.look()

    def _changed_by_others(self) -> None:
        self.memory.clear_cache()
        self._conversations.changed(None)
        self._turns.recovery.look()
        self._outbox.look()

    async def drain(self, seconds: float) -> bool:
        """Take no message any more and finish those that were accepted; say whether all were within `seconds`.

        What is not finished stays in the journal for the next start. `hurry` ends this at once.
        """
        await self._turns.recovery.close()
        if await self._lanes.drain(seconds):
            return True
        log.warning("%d messages are left open in the journal; the next start goes on", self._lanes.places)
        return False

    def hurry(self) -> None:
        """Leave to the journal whatever is not finished: `drain` ends now."""
        self._lanes.hurry()

    async def _stop(self) -> None:
        """Finish the turns that run, or leave them open in the journal; then stop every part."""
        if not self._lanes.closed:
            await self.drain(self.settings.drain_seconds)
        await self._turns.recovery.close()
        await self._turns.stop()
        await self._outbox.close()
        for task in tuple(self._aside):
            task.cancel()
        await asyncio.gather(*self._aside, return_exceptions=True)
        await self._pipeline.close()
        if self._shared is not None:
            await self._shared.close()
        if self._judge is not None:
            await self._judge.close()
        await self.memory.close()
        await self._embedding.close()
        await self._executor.close()
        if self.record is not None:
            self.record.loop.stop()
        self._claims.close()
