"""Memories from elsewhere: lines that `export` wrote, and the collections of a bot that kept them in Chroma.

What is taken in gets new ids, counted per user as always. A record without a `source` gets one made of its content
and its old id, so that taking the same in twice stores it once, and the same words told three times stay three.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..errors import InvalidMessage, StoreReadOnly
from .item import as_item

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    from .chroma import Connection
    from .store import MemoryStore

__all__ = ["COLLECTIONS", "from_chroma", "from_lines", "take_in"]

COLLECTIONS: Final = ("user_memories", "global_facts")
FACTS_USER: Final = "global_facts"
BATCH: Final = 500
FIELDS: Final = ("text", "scope", "at", "speaker", "session", "metadata", "source")
OPEN: Final = frozenset({"cross_context_safe", "public_channel", "private_channel", "private_dm"})

Record = tuple[str, dict[str, Any]]


async def take_in(
    store: MemoryStore,
    records: AsyncIterator[Record],
    *,
    dry_run: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, int]:
    """Store records of (user, memory); return the counts read, stored, known and invalid, and the number of users.

    `dry_run` checks and counts and stores nothing; `stored` is then what would be handed over. Raises StoreError.
    """
    counts = Counter({"read": 0, "stored": 0, "known": 0, "invalid": 0})
    users: set[str] = set()
    waiting: dict[str, list[dict[str, Any]]] = {}
    async for user, memory in records:
        counts["read"] += 1
        try:
            as_item(memory)
            waiting.setdefault(user, []).append(memory)
        except InvalidMessage:
            counts["invalid"] += 1
            continue
        users.add(user)
        if counts["read"] % BATCH == 0:
            await hand_over(store, waiting, counts, dry_run)
            progress(counts["read"])
    await hand_over(store, waiting, counts, dry_run)
    progress(counts["read"])
    return {**counts, "users": len(users)}


async def hand_over(
    store: MemoryStore, waiting: dict[str, list[dict[str, Any]]], counts: Counter[str], dry_run: bool
) -> None:
    while waiting:
        user, memories = waiting.popitem()
        if dry_run:
            counts["stored"] += len(memories)
            continue
        try:
            new = await store.add_new(user, memories)
        except InvalidMessage:
            counts["invalid"] += len(memories)
            continue
        counts["stored"] += new
        counts["known"] += len(memories) - new


async def from_lines(path: Path, user: str | None) -> AsyncIterator[Record]:
    """Yield the memories of a file that `export` wrote; `user`, if given, gets them all instead of who had them.

    Lines of another kind are passed over. Raises InvalidMessage that names the first line which is no record.
    """
    for number, line in lines(path):
        try:
            record = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise InvalidMessage(f"{path}, line {number}: it is not a JSON object") from None
        if record.get("kind", "memory") != "memory":
            continue
        owner = user or record.get("user")
        if not isinstance(owner, str):
            raise InvalidMessage(f"{path}, line {number}: it names no user; give one with --user")
        memory = {name: record[name] for name in FIELDS if record.get(name) is not None}
        memory.setdefault("source", f"line:{digest(line)}")
        yield owner, memory


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise StoreReadOnly(f"{path} cannot be read: {error.strerror}") from None


async def from_chroma(connection: Connection, collections: tuple[str, ...] = COLLECTIONS) -> AsyncIterator[Record]:
    """Yield what a bot kept in Chroma, by page. A collection that is not there holds nothing. Raises StoreError.

    Facts that belong to no user go to the user "global_facts".
    """
    there = {found.name for found in await connection.ask(connection.client.list_collections())}
    for name in collections:
        if name not in there:
            continue
        collection = await connection.ask(connection.client.get_collection(name, embedding_function=None))
        offset = 0
        while (page := await connection.ask(collection.get(limit=BATCH, offset=offset)))["ids"]:
            for key, text, fields in zip(page["ids"], page["documents"], page["metadatas"], strict=True):
                yield record(name, key, text, fields or {})
            offset += len(page["ids"])


def record(collection: str, key: str, text: str | None, fields: Mapping[str, Any]) -> Record:
    user = fields.get("user_id")
    memory = {
        "text": text,
        "scope": "global" if collection == "global_facts" else scope(fields),
        "at": at(fields.get("timestamp")),
        "metadata": {name: value for name, value in fields.items() if name != "user_id"},
        "source": f"chroma:{digest(f'{collection}/{key}'.encode())}",
    }
    return str(user) if user else FACTS_USER, memory


def scope(fields: Mapping[str, Any]) -> str:
    """Return where a bot's memory may be told: what it says of itself, and where that is unclear the closest circle.

    >>> scope({"context_type": "public_channel", "server_id": "7", "security_level": "public_channel"})
    'server:7/public'
    """
    level = fields.get("security_level")
    if level not in OPEN:
        level = fields.get("context_type")
    server = fields.get("server_id")
    if level == "cross_context_safe":
        return "global"
    if not server or level in ("dm", "private_dm"):
        return "dm"
    return f"server:{server}/{'public' if level == 'public_channel' else 'private'}"


def at(given: Any) -> float | None:
    """Return a bot's timestamp, ISO or epoch, in epoch seconds; None, which is now, for anything else."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    try:
        return datetime.fromisoformat(str(given)).timestamp()
    except (ValueError, OverflowError):
        return None


def digest(data: bytes) -> str:
    return hashlib.blake2b(data.strip(), digest_size=16).hexdigest()
