"""One memory on its way in: what a caller may hand over, checked and brought to one form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from .. import clock
from ..errors import InvalidMessage
from ..message import checked_id, checked_scope, checked_user

__all__ = ["Item", "as_item", "checked_question"]

TEXT_BYTES: Final = 1 << 20
METADATA_BYTES: Final = 64 << 10
SURROGATE = re.compile(r"[\ud800-\udfff]")


class Item(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is stored of a memory beside its vector; `metadata` is JSON, `at` in epoch seconds."""

    text: str
    scope: str
    at: float
    speaker: str | None = None
    session: str | None = None
    metadata: bytes | None = None
    source: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what `as_item` makes this of, without what is None."""
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        if self.metadata is not None:
            given["metadata"] = msgspec.json.decode(self.metadata)
        return given


FIELDS: Final = frozenset(Item.__struct_fields__)


def as_item(given: str | Mapping[str, Any]) -> Item:
    """Return a text, or a mapping of `MemoryStore.add`'s arguments, as an Item. Raises InvalidMessage."""
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, Mapping):
        raise InvalidMessage(f"a memory is {type(given).__name__}; it must be a text or a mapping of add's arguments")
    if unknown := given.keys() - FIELDS:
        raise InvalidMessage(
            f"a memory has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(FIELDS))}"
        )
    return Item(
        text=checked_text(given.get("text")),
        scope=checked_scope(given.get("scope", "dm")),
        at=seconds(given.get("at")),
        speaker=optional_id("speaker", given.get("speaker")),
        session=optional_id("session", given.get("session")),
        metadata=as_json(given.get("metadata")),
        source=optional_id("source", given.get("source")),
    )


def checked_question(user: str, query: str, k: int, scope: str) -> str:
    """Return the query that a recall asks; raises InvalidMessage for arguments that cannot be."""
    checked_user(user)
    checked_scope(scope)
    if not isinstance(query, str):
        raise InvalidMessage(f"query is {type(query).__name__}; it must be a string")
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise InvalidMessage(f"k is {k!r:.80}; it must be a whole number from 0")
    return SURROGATE.sub("\ufffd", query)


def checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise InvalidMessage(f"a memory's text is {type(text).__name__}; it must be a string")
    if not text.strip():
        raise InvalidMessage("a memory's text is empty")
    if len(text) > TEXT_BYTES or len(text.encode(errors="replace")) > TEXT_BYTES:
        raise InvalidMessage(f"a memory's text has {len(text)} characters; at most {TEXT_BYTES} bytes are allowed")
    return SURROGATE.sub("\ufffd", text)


def optional_id(name: str, value: Any) -> str | None:
    return None if value is None else checked_id(name, value)


def seconds(at: Any) -> float:
    """Return a time in epoch seconds; None is now, a datetime without a zone is local time."""
    if at is None:
        return clock.wall()
    if isinstance(at, datetime):
        return at.timestamp()
    if isinstance(at, bool) or not isinstance(at, (int, float)) or not math.isfinite(at):
        raise InvalidMessage(f"at is {at!r:.80}; it must be a datetime or epoch seconds")
    return float(at)


def as_json(metadata: Any) -> bytes | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InvalidMessage(f"metadata is {type(metadata).__name__}; it must be a mapping")
    try:
        data = msgspec.json.encode(metadata)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidMessage(f"metadata cannot be written as JSON: {error}") from None
    if len(data) > METADATA_BYTES:
        raise InvalidMessage(f"metadata has {len(data)} bytes as JSON; at most {METADATA_BYTES} are allowed")
    return data
