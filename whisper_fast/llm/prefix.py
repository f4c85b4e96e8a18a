"""Requests that begin alike go to the same endpoint, whose prefix cache then serves them."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from whisper_fast.message import ChatMessage

__all__ = ["prefix", "ranked", "within"]

LONG = 1024  # characters; a shorter common beginning is not worth a detour
SPARE = 1.25  # of the mean load


def prefix(messages: Sequence[ChatMessage]) -> bytes | None:
    """Return what stands for the first 1,024 characters of `messages`; None when they are shorter."""
    found, size = blake2b(digest_size=16), 0
    for message in messages:
        text = message.get("content")
        if isinstance(text, str):
            part = text[: LONG - size]
            found.update(f"\0{message.get('role')}\0{part}".encode("utf-8", "replace"))
            size += len(part)
        if size >= LONG:
            return found.digest()
    return None


def ranked(key: bytes, names: Iterable[str]) -> list[int]:
    """Return the places of `names` in the order of their rendezvous with `key` (Thaler and Ravishankar, 1998).

    One more name takes over its share of the keys, and no key moves between the others.
    """
    scores = [blake2b(name.encode(), key=key, digest_size=8).digest() for name in names]
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


def within(load: int, total: int, endpoints: int) -> bool:
    """Whether an endpoint may take one more: at most 1.25 times the mean (Mirrokni et al., SODA 2018)."""
    return load + 1 <= SPARE * (total + 1) / endpoints + 1
