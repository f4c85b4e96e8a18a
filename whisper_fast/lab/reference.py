"""The bot's sequential way, to measure against: the same parts, one after the other, in a pool of three threads.

Everything is the engine's own: emotion, embedder, memory, conversation, prompt, journal, model. What differs is only
how they are driven: each call blocks its thread until it is done, each write is a commit of its own with its own
fsync, nothing is batched, and three threads are all there are. A turn here leaves the same rows as a turn there.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from ..conversation import Conversations
from ..journal import Entry, Journal, encoded
from ..memory import MemoryStore
from ..message import Reply, Turn
from ..models.embedder import StaticEmbedder
from ..models.emotion import VaderEmotion
from ..prompt import compose
from ..store.sqlite import Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from ..llm.completion import ChatProvider
    from ..message import Message
    from ..settings import Settings

__all__ = ["Sequential"]

T = TypeVar("T")

THREADS = 3


class Sequential:
    """Answers messages the way the bot did; open it with `Sequential.open`."""

    def __init__(self, settings: Settings, database: Database, llm: ChatProvider) -> None:
        self.settings = settings
        self.llm = llm
        self.database = database
        self.embedder = StaticEmbedder()
        self.emotion = VaderEmotion()
        self.memory = MemoryStore(database, self.embedder)
        self.journal = Journal(database)
        self.conversations = Conversations(
            database,
            max_bytes=settings.conversation_cache_bytes,
            ttl=settings.conversation_cache_timeout_minutes * 60,
            bootstrap=settings.conversation_cache_bootstrap_limit,
            longest=settings.conversation_cache_max_local,
            caching=lambda: True,
        )
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="sequential")
        self._one_commit = threading.Lock()

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, llm: ChatProvider) -> AsyncIterator[Sequential]:
        """Open the store and the three threads; close them at the end. Raises StoreError."""
        database = await Database.open(settings.data_dir)
        try:
            reference = cls(settings, database, llm)
            try:
                yield reference
            finally:
                await asyncio.to_thread(partial(reference._threads.shutdown, cancel_futures=True))
        finally:
            await database.close()

    async def respond(self, message: Message) -> Reply:
        """Answer a message as soon as one of the three threads is free."""
        return await self._loop.run_in_executor(self._threads, self.turn, message)

    def turn(self, message: Message) -> Reply:
        """Lead one message through everything, step by step, in this thread."""
        turn = Turn(message)
        entry = self.commit(self.accept(message))
        turn.values["emotion"] = self.emotion.analyse(message.text)
        vector = turn.values["embedding"] = self.embedder.embed([message.text])[0]
        turn.values["recall"] = self.wait(self.memory.recall(message.user, message.text, vector=vector))
        turn.values["conversation"] = self.wait(self.conversations.recent(message))
        turn.prompt = compose(turn, self.settings.context_tokens)
        since = perf_counter()
        completion = self.wait(self.llm.chat(turn.prompt))
        turn.timings["llm"] = perf_counter() - since
        reply = Reply(id=message.id, user=message.user, text=completion.text, timings=turn.timings)
        self.commit(self.journal.record(entry, reply))
        said = partial(self.conversations.insert, turn=entry.id, message=message, reply=reply.text)
        self.commit(self.database.write(said))
        told = {"text": message.text, "scope": message.scope, "at": message.at, "source": message.id}
        self.commit(self.memory.add_many(message.user, [told]))
        self.commit(self.journal.complete(entry, sent=lambda: True))
        return reply

    async def accept(self, message: Message) -> Entry:
        """Accept a message, on the loop that the store lives on."""
        return await self.journal.accept(message, encoded(message))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a part and block this thread until it has its value."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def commit(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a write alone, so that the store commits it by itself."""
        with self._one_commit:
            return self.wait(work)
