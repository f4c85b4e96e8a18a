"""Memories on a Chroma server, behind the same calls as `MemoryStore`: for those who have one and want to keep it.

It gives up what only a store of ours can promise: no order of ids, no words, no neighbours in the score, no
transaction that spans a message and its memories.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from ..errors import InvalidMessage, SettingsError, StoreError, StoreUnavailable
from ..message import Recalled, checked_user
from .embedding import Embedding
from .item import as_item, checked_question
from .scopes import visible_scopes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
    from datetime import datetime

    from ..models.embedder import Embedder
    from .item import Item

__all__ = ["ChromaMemory", "Connection"]

PARALLEL: Final = 8  # requests under way at once; a Chroma server answers from a few threads
ADDED: Final = 1000  # memories in one request
PAGE: Final = 500
EXTRA: Final = "pip install 'whisper-fast[chroma]'"


class Connection:
    """A Chroma client whose requests are bounded and whose errors are ours; open it with `Connection.open`."""

    def __init__(self, client: Any, address: str) -> None:
        self.client = client
        self.address = address
        self._slots = asyncio.Semaphore(PARALLEL)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Connection]:
        """Connect to `http://host:port`. Raises SettingsError, StoreUnavailable."""
        try:
            import chromadb
            from chromadb.config import Settings as ChromaSettings
        except ImportError:
            raise SettingsError(f"memory at {url!r:.80} needs the Chroma client: {EXTRA}") from None
        host, port, secure = address(url)
        options = ChromaSettings(anonymized_telemetry=False)
        with translated(f"{host}:{port}"):
            client: Any = await chromadb.AsyncHttpClient(host, port, ssl=secure, settings=options)
        try:
            yield cls(client, f"{host}:{port}")
        finally:
            await client._server.__aexit__(None, None, None)  # the client has no close of its own

    async def ask(self, request: Awaitable[Any]) -> Any:
        """Await a request of the client when there is room. Raises StoreUnavailable, StoreError."""
        async with self._slots:
            with translated(self.address):
                return await request


class translated:  # noqa: N801 - reads as the statement that it makes
    """Turns a Chroma client's errors into ours; nothing of their text is repeated, it may hold what was sent."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        import httpx
        from chromadb.errors import ChromaError

        name = type(error).__name__
        if isinstance(error, ChromaError) and error.code() < 500:
            raise StoreError(f"Chroma at {self._address} refused the request ({name})") from None
        if isinstance(error, ChromaError | httpx.HTTPError | OSError | ValueError):
            raise StoreUnavailable(f"Chroma at {self._address} does not answer ({name}); is it running?") from None


class ChromaMemory:
    """Memories in one collection per embedder, filtered by user and scope on the server; see `MemoryStore`.

    Ids are random, of a source they follow from the user and the source. A score is the cosine of question and
    memory. Every method raises InvalidMessage, StoreUnavailable, StoreError.
    """

    def __init__(self, connection: Connection, collection: Any, embedder: Embedder) -> None:
        self._connection = connection
        self._collection = collection
        self._embed = Embedding(embedder)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, embedder: Embedder) -> AsyncIterator[ChromaMemory]:
        """Open the memories at `http://host:port`. Raises SettingsError, StoreUnavailable."""
        async with Connection.open(url) as connection:
            made = connection.client.get_or_create_collection(
                f"whisper-fast-{digest(embedder.name)}-{embedder.dimension}",
                metadata={"embedder": embedder.name},
                embedding_function=None,
                configuration={"hnsw": {"space": "cosine"}},
            )
            yield cls(connection, await connection.ask(made), embedder)

    async def add(
        self,
        user: str,
        text: str,
        *,
        scope: str = "dm",
        at: datetime | float | None = None,
        speaker: str | None = None,
        session: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        source: str | None = None,
    ) -> int:
        """Remember a text; return its id when the server has it. What has the same `source` is stored once."""
        item = {"text": text, "scope": scope, "at": at, "speaker": speaker, "session": session}
        [number] = await self.add_many(user, [{**item, "metadata": metadata, "source": source}])
        return number

    async def add_many(self, user: str, items: Iterable[str | Mapping[str, Any]]) -> list[int]:
        """Remember texts, or mappings of `add`'s arguments; return their ids. Sent in batches, not all or none."""
        checked_user(user)
        checked = [as_item(item) for item in items]
        numbers = [number_of(user, item) for item in checked]
        vectors = await self._embed([item.text for item in checked])
        new = {number: i for i, number in reversed(list(enumerate(numbers)))}  # a batch names no id twice
        order = sorted(new.values())
        await together(
            self._add(user, [(numbers[i], checked[i], vectors[i]) for i in order[start : start + ADDED]])
            for start in range(0, len(order), ADDED)
        )
        return numbers

    async def recall(self, user: str, query: str, *, k: int = 10, scope: str = "dm") -> list[Recalled]:
        """Return at most `k` memories of `user` nearest to `query`, best first, of those that `scope` may see."""
        [found] = await self.recall_many([(user, query)], k=k, scope=scope)
        return found

    async def recall_many(
        self, questions: Iterable[tuple[str, str]], *, k: int = 10, scope: str = "dm"
    ) -> list[list[Recalled]]:
        """Answer many (user, query); those of one user go in one request."""
        asked = [(user, checked_question(user, query, k, scope)) for user, query in questions]
        if not k:
            return [[] for _ in asked]
        vectors = await self._embed.questions([query for _, query in asked])
        mine: dict[str, list[int]] = {}
        for i, (user, _) in enumerate(asked):
            mine.setdefault(user, []).append(i)
        answers: list[list[Recalled]] = [[] for _ in asked]

        async def answer(user: str, places: list[int]) -> None:
            for i, found in zip(places, await self._query(user, [vectors[i] for i in places], k, scope), strict=True):
                answers[i] = found

        await together(answer(user, places) for user, places in mine.items())
        return answers

    async def forget(self, user: str) -> None:
        """Delete all that is remembered of `user`."""
        await self._connection.ask(self._collection.delete(where={"user": checked_user(user)}))

    async def delete(self, user: str, number: int) -> bool:
        """Delete one memory by its id; return whether it was there."""
        checked_user(user)
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidMessage(f"id is {number!r:.80}; it must be what add returned")
        mine = {"ids": [str(number)], "where": {"user": user}}
        found = await self._connection.ask(self._collection.get(**mine, include=[]))
        if found["ids"]:
            await self._connection.ask(self._collection.delete(**mine))
        return bool(found["ids"])

    async def export(self, user: str) -> AsyncIterator[dict[str, Any]]:
        """Yield all memories of `user` as `add_many` takes them."""
        checked_user(user)
        offset = 0
        while True:
            asked = self._collection.get(where={"user": user}, limit=PAGE, offset=offset)
            found = await self._connection.ask(asked)
            for text, fields in zip(found["documents"], found["metadatas"], strict=True):
                yield exported(text, fields)
            offset += len(found["ids"])
            if len(found["ids"]) < PAGE:
                return

    async def stats(self) -> dict[str, Any]:
        """Return how many memories of all users the server holds."""
        return {"memories": await self._connection.ask(self._collection.count())}

    async def _add(self, user: str, memories: Sequence[tuple[int, Item, Any]]) -> None:
        request = self._collection.add(
            ids=[str(number) for number, _, _ in memories],
            documents=[item.text for _, item, _ in memories],
            embeddings=[vector for _, _, vector in memories],
            metadatas=[fields_of(user, item) for _, item, _ in memories],
        )
        await self._connection.ask(request)

    async def _query(self, user: str, vectors: list[Any], k: int, scope: str) -> list[list[Recalled]]:
        request = self._collection.query(query_embeddings=vectors, n_results=k, where=where(user, scope))
        found = await self._connection.ask(request)
        columns = (found["ids"], found["documents"], found["metadatas"], found["distances"])
        return [[recalled(*hit) for hit in zip(*row, strict=True)] for row in zip(*columns, strict=True)]


def address(url: str) -> tuple[str, int, bool]:
    """Return host, port and whether TLS is spoken. Raises SettingsError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(
            f"memory path is {url!r:.80}; it must be a folder, a file that ends in .db, or Chroma's http(s)://host:port"
        )
    secure = parts.scheme == "https"
    return parts.hostname, parts.port or (443 if secure else 8000), secure


def number_of(user: str, item: Item) -> int:
    """Return an id of 62 bits: of the user and the source where there is one, else random."""
    if item.source is None:
        return secrets.randbits(62)
    return int(digest(f"{user}\n{item.source}"), 16) >> 2


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fields_of(user: str, item: Item) -> dict[str, Any]:
    fields = {
        "user": user,
        "scope": item.scope,
        "public": item.scope.endswith("/public"),
        "at": item.at,
        "speaker": item.speaker,
        "session": item.session,
        "source": item.source,
        "metadata": None if item.metadata is None else item.metadata.decode(),
    }
    return {name: value for name, value in fields.items() if value is not None}


def where(user: str, scope: str) -> dict[str, Any]:
    """Return the filter for what `user` may be told in `scope`."""
    scopes, all_public = visible_scopes(scope)
    seen: dict[str, Any] = {"scope": {"$in": scopes}}
    if all_public:
        seen = {"$or": [seen, {"public": True}]}
    return {"$and": [{"user": user}, seen]}


def recalled(number: str, text: str, fields: Mapping[str, Any], distance: float) -> Recalled:
    packed = fields.get("metadata")
    metadata = None if packed is None else msgspec.json.decode(packed)
    return Recalled(int(number), text, 1.0 - distance, fields["at"], fields["scope"], metadata)


def exported(text: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: fields[name] for name in ("scope", "at", "speaker", "session", "source") if name in fields}
    if "metadata" in fields:
        kept["metadata"] = msgspec.json.decode(fields["metadata"])
    return {"text": text, **kept}


async def together(work: Iterable[Any]) -> None:
    """Run coroutines side by side; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one, name="chroma")
    except* StoreError as errors:
        raise errors.exceptions[0] from None
