"""The engine: builds every part from the settings, leads each message through them, and stops them in order.

The way of a message, top to bottom: `submit` takes a place in the user's lane and accepts the message durably;
`_turn` gathers what is known, asks the model, records the reply, hands it out, and remembers.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import components
from .batcher import MicroBatcher
from .conversation import Conversations
from .errors import Closed, InvalidMessage, LLMRejected, SettingsError, StoreError, WhisperFastError
from .executor import Executor
from .flags import Flags
from .journal import Entry, Journal, encoded, last
from .lanes import Lanes
from .llm import LLMPool
from .llm.completion import Completion, merged
from .llm.discovery import discover
from .memory import MemoryStore
from .message import Message, Reply, Turn, Usage, checked_user
from .models.embedder import StaticEmbedder
from .models.emotion import VaderEmotion
from .pipeline import Pipeline
from .prompt import compose
from .store.backup import backup
from .store.schema import forget_user
from .store.sqlite import Database
from .ticket import ReplyStream, Ticket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from .lanes import Place
    from .llm import Endpoint
    from .llm.completion import ChatProvider
    from .models.embedder import Embedder
    from .settings import Settings

__all__ = ["Engine"]

log = logging.getLogger(__name__)

RECALLED = 10
REMEMBER_SECONDS = 10.0
PERSONA = "You are a warm, attentive companion. You know this person from earlier conversations; be brief and kind."


class Engine:
    """The runtime under a companion bot; open it with `Engine.open`, it is closed when the block ends."""

    def __init__(self, settings: Settings, database: Database, llm: LLMPool, embedder: Embedder) -> None:
        self.settings = settings
        self.flags = Flags(settings)
        self.llm = llm
        self.llm_description = ""
        self.embedder = embedder
        self._database = database
        self._journal = Journal(database)
        self._lanes = Lanes(settings.max_waiting, settings.max_waiting_bytes)
        self._executor = Executor(settings.thread_pool_size, settings.process_pool_size)
        self._batcher: MicroBatcher[str, Any] = MicroBatcher(
            embedder.embed,
            max_batch=settings.batch_size,
            max_wait=settings.batch_timeout_ms / 1000,
            executor=self._executor,
            enabled=lambda: self.flags.batching,
        )
        self.memory = MemoryStore(
            database,
            embedder,
            embed=self._batcher.submit_many,
            cache_bytes=settings.memory_cache_bytes,
            caching=lambda: self.flags.caching,
        )
        self._conversations = Conversations(
            database,
            max_bytes=settings.conversation_cache_bytes,
            ttl=settings.conversation_cache_timeout_minutes * 60,
            bootstrap=settings.conversation_cache_bootstrap_limit,
            longest=settings.conversation_cache_max_local,
            caching=lambda: self.flags.caching,
        )
        self._pipeline = Pipeline(self._executor, parallel=lambda: self.flags.parallel)
        self._register(settings)
        self._in_flight: dict[tuple[str, str, str, str], Ticket] = {}
        self._preloads: set[asyncio.Task[None]] = set()
        self._counts = dict.fromkeys(("accepted", "answered", "failed", "duplicates", "partial"), 0)
        database.on_foreign_change(self._forget_caches)

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
            database = await Database.open(settings.data_dir)
            stack.push_async_callback(database.close)
            pool, description = await pool_for(llm, settings)
            if pool is not llm:  # a pool that was handed in belongs to whoever made it
                stack.push_async_callback(pool.close)
            engine = cls(
                settings,
                database,
                pool,
                embedder if embedder is not None else await asyncio.to_thread(StaticEmbedder),
            )
            engine.llm_description = description
            log.info("%s", description)
            stack.push_async_callback(engine._stop)
            await engine._recover()
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

        Raises InvalidMessage, Overloaded, Closed, StoreError; then nothing was accepted.
        """
        message = message.checked(self.settings.max_text_bytes)
        turn, body = Turn(message), encoded(message)
        place = self._lanes.enter(message.user, len(body))
        try:
            accepting = self._journal.accept(message, body)
            entry = await asyncio.shield(accepting)
        except asyncio.CancelledError:  # the caller is gone, the message is not: it goes its way in its turn
            accepting.add_done_callback(partial(self._claim_alone, turn=turn, place=place))
            raise
        except BaseException:
            place.leave()
            raise
        turn.lap("journal")
        return self._claim(entry, turn, place, streamed)

    def hint(self, user: str) -> None:
        """Say that `user` is about to write (a typing indicator): bring the user's memories into memory."""
        if self.flags.preload and self.flags.caching:
            task = asyncio.get_running_loop().create_task(self._preload(checked_user(user)), name="preload")
            self._preloads.add(task)
            task.add_done_callback(self._preloads.discard)

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
        problem = self._database.problem
        return {"ready": problem is None and not self._lanes.closed, "store": str(problem or "ok")}

    def stats(self) -> dict[str, Any]:
        """Return counters since start: messages, places, writes, and those of each part."""
        return {
            **self._counts,
            "in_flight": self._lanes.places,
            "shed": self._lanes.shed,
            "commits": self._database.commits,
            "writes": self._database.writes,
            "llm": self.llm.stats(),
            "memory": self.memory.stats(),
        }

    async def forget(self, user: str) -> None:
        """Delete everything of `user`: memories, conversations, journal; after the user's running turn."""
        place = self._lanes.enter(checked_user(user), 0)
        try:
            upto = await self._database.write(last)
        except BaseException:
            place.leave()
            raise
        place.start(partial(self._forget, user, upto), "forget")
        await place.ended()

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the memories of `user`, all turns so far included, as dicts that `memory.add_many` takes again."""
        place = self._lanes.enter(checked_user(user), 0)
        place.start(partial(asyncio.sleep, 0), "export")
        await place.ended()
        async for memory in self.memory.export(user):
            yield memory

    async def backup(self, target: Path) -> dict[str, object]:
        """Write a verified copy of the database to `target` while messages go on. Raises StoreError."""
        return await asyncio.to_thread(backup, self.settings.data_dir, target)

    async def embed(self, texts: list[str]) -> list[Any]:
        """Return a float32 vector for each text, batched with those of all users."""
        return await self._batcher.submit_many(texts)

    def _register(self, settings: Settings) -> None:
        seconds = settings.component_deadline
        analyse = partial(self._executor.run, VaderEmotion().analyse)
        self._pipeline.add(components.emotion(analyse, seconds))
        self._pipeline.add(components.embedding(self._embed_one, seconds))
        self._pipeline.add(components.recall(self.memory, RECALLED, seconds))
        self._pipeline.add(components.conversation(self._conversations, seconds))
        self._pipeline.add(
            components.persona(persona_text(settings.persona_file), always=settings.persona_file is not None)
        )

    async def _embed_one(self, text: str, user: str) -> Any:
        return await self._batcher.submit(text, user=user)

    def _claim(self, entry: Entry, turn: Turn, place: Place, streamed: bool) -> Ticket:
        """Return the ticket of an accepted message, a new one unless the message is known."""
        known = Ticket.answered(entry.reply) if entry.reply is not None else self._in_flight.get(key(entry.message))
        if known is not None:
            self._counts["duplicates"] += 1
            place.leave()
            return known
        self._counts["accepted"] += not entry.known
        ticket = self._in_flight[key(entry.message)] = Ticket(entry.message.id)
        if streamed:
            ticket.stream()
        turn.message = entry.message
        place.start(partial(self._turn, entry, turn, ticket), f"turn:{entry.message.id}")
        return ticket

    def _claim_alone(self, accepting: asyncio.Future[Entry], turn: Turn, place: Place) -> None:
        """Go on with a message whose caller went away while it was being accepted."""
        if accepting.cancelled() or accepting.exception():
            place.leave()
        else:
            self._claim(accepting.result(), turn, place, streamed=False)

    async def _turn(self, entry: Entry, turn: Turn, ticket: Ticket) -> None:
        """Lead one accepted message from its lane to its memory."""
        try:
            turn.lap("lane")
            await self._pipeline.run(turn)
            turn.prompt = compose(turn, self.settings.context_tokens)
            turn.lap("gather")
            completion = await self._ask(turn, ticket)
            turn.lap("llm")
            reply = self._reply(turn, completion)
            await self._journal.record(entry, reply)
            ticket.deliver(reply)
            self._counts["answered"] += 1
            await self._remember(entry, turn.get("embedding"), reply)
        except Exception as error:  # noqa: BLE001 - the message stays open in the journal: asked again or restarted, it goes on
            await self._failed(entry, ticket, error)
        except asyncio.CancelledError:
            ticket.fail(stopped())
            raise
        finally:
            self._in_flight.pop(key(entry.message), None)

    async def _ask(self, turn: Turn, ticket: Ticket) -> Completion:
        """Ask the model; pieces go to whoever streams."""
        message, timeout = turn.message, self.settings.llm_request_timeout
        options = {**message.parameters, "user": message.user, "priority": message.priority, "timeout": timeout}
        if ticket.streamed:
            return await self._ask_in_pieces(turn, ticket, options)
        return await self.llm.chat(turn.prompt, **options)

    async def _ask_in_pieces(self, turn: Turn, ticket: Ticket, options: dict[str, Any]) -> Completion:
        since, last, usage = perf_counter(), "stop", Usage()
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        async with aclosing(self.llm.stream(turn.prompt, **options)) as pieces:
            async for piece in pieces:
                if not texts:
                    turn.timings["first_token"] = perf_counter() - since
                texts.append(piece)
                calls.extend(piece.tool_calls)
                last, usage = piece.finish_reason or last, piece.usage or usage
                ticket.push(piece)
        return Completion(text="".join(texts), finish_reason=last, tool_calls=merged(calls), usage=usage)

    def _reply(self, turn: Turn, completion: Completion) -> Reply:
        turn.timings["total"] = perf_counter() - turn.started
        self._counts["partial"] += bool(turn.partial)
        return Reply(
            id=turn.message.id,
            user=turn.message.user,
            text=completion.text,
            emotion=turn.get("emotion"),
            memories=turn.get("recall") or (),
            partial=tuple(turn.partial),
            timings=turn.timings,
            finish_reason=completion.finish_reason,
            tool_calls=completion.tool_calls,
            usage=completion.usage,
            model=completion.model,
        )

    async def _remember(self, entry: Entry, vector: Any, reply: Reply) -> None:
        """Store conversation and memories and close the entry, all or nothing, then show them to the next turn."""
        message = entry.message
        if not message.remember or reply.finish_reason == "tool_calls":  # the round with the results is remembered
            await self._journal.complete(entry)
            return
        memory = {"text": message.text, "scope": message.scope, "at": message.at, "source": f"turn:{entry.id}"}
        vectors = None if vector is None else [vector]
        async with asyncio.timeout(REMEMBER_SECONDS):  # a hanging embedder must not hold the user's lane
            pending = await self.memory.prepare(message.user, [memory], vectors=vectors)
        said = partial(self._conversations.insert, turn=entry.id, message=message, reply=reply.text)
        if await self._journal.complete(entry, said, pending.insert):
            self.memory.publish(pending)
            self._conversations.publish(entry.id, message, reply.text)

    async def _failed(self, entry: Entry, ticket: Ticket, error: Exception) -> None:
        """Tell the caller; an error that asking again cannot cure closes the entry, any other leaves it open."""
        self._counts["failed"] += 1
        ours = isinstance(error, WhisperFastError)
        log.error(
            "message %s: %s: %s", entry.message.id, type(error).__name__, error, exc_info=None if ours else error
        )
        if isinstance(error, InvalidMessage | LLMRejected):
            await self._journal.fail(entry)
        ticket.fail(error)

    async def _recover(self) -> None:
        """Go on with every message that was accepted and not finished, from its last durable step."""
        entries = await self._journal.unfinished()
        for entry in entries:
            place = self._lanes.enter(entry.message.user, len(entry.message.text), admitted=True)
            if entry.reply is None:
                self._claim(entry, Turn(entry.message), place, streamed=False)
            else:
                place.start(partial(self._finish, entry, entry.reply), f"finish:{entry.message.id}")
        if entries:
            log.warning("%d messages were accepted and not finished; they go on now", len(entries))

    async def _finish(self, entry: Entry, reply: Reply) -> None:
        try:
            await self._remember(entry, None, reply)
        except (StoreError, TimeoutError) as error:
            log.error("message %s is answered and not yet remembered: %s", entry.message.id, error)

    async def _forget(self, user: str, upto: int) -> None:
        await self._database.write(partial(forget_user, user=user, upto=upto))
        await self.memory.forget(user)
        self._conversations.forget(user)

    async def _preload(self, user: str) -> None:
        try:
            await self.memory.warm(user)
        except StoreError as error:
            log.warning("preload: %s", error)

    def _forget_caches(self) -> None:
        self.memory.clear_cache()
        self._conversations.clear()

    async def _stop(self) -> None:
        """Finish the turns that run, or leave them open in the journal; then stop every part."""
        if not await self._lanes.drain(self.settings.drain_seconds):
            log.warning("%d messages are left open in the journal; the next start goes on", self._lanes.places)
        await self._lanes.abort()
        for ticket in self._in_flight.values():
            ticket.fail(stopped())
        for task in tuple(self._preloads):
            task.cancel()
        await asyncio.gather(*self._preloads, return_exceptions=True)
        await self._pipeline.close()
        await self._batcher.close()
        await self._executor.close()


def key(message: Message) -> tuple[str, str, str, str]:
    return message.platform, message.channel, message.user, message.id


def persona_text(path: Path | None) -> str:
    """Return the text of a persona file, or the default one. Raises SettingsError for a file that cannot be read."""
    if path is None:
        return PERSONA
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"WHISPER_FAST_PERSONA_FILE is {str(path)!r}: it cannot be read ({error})") from None


def stopped() -> Closed:
    return Closed("the engine stopped first; the message is kept and is answered after the next start")


async def pool_for(llm: LLMPool | ChatProvider | Endpoint | None, settings: Settings) -> tuple[LLMPool, str]:
    """Return the pool for what was given, and a sentence that says which model answers."""
    if isinstance(llm, LLMPool):
        return llm, "the pool that was handed in"
    if llm is None:
        llm, description = await discover(settings)
    else:
        description = f"{llm!r}"
    limit, timeout = settings.max_concurrent_requests, settings.llm_request_timeout
    return LLMPool([llm], max_concurrent=limit, timeout=timeout), description
