"""Who was forgotten lately, and has still to be forgotten where engines share: digests, which name nobody."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from .. import clock

if TYPE_CHECKING:
    from collections.abc import Iterable

    import apsw

__all__ = ["digest", "note", "tell", "untold"]

KEEP = 7 * 86_400.0  # seconds after which nothing shared is left of anybody


def digest(name: object) -> str:
    """Return a name's 128-bit digest: no separator in it can make two names one, and no id of a person shows."""
    return blake2b(msgspec.msgpack.encode(name), digest_size=16).hexdigest()


def note(connection: apsw.Connection, user: str) -> None:
    """Note that a user was forgotten; call it in the write job that deletes the rows."""
    now = clock.wall()
    connection.execute("DELETE FROM forgotten WHERE at NOT BETWEEN ? AND ?", (now - KEEP, now + KEEP))
    connection.execute("INSERT OR REPLACE INTO forgotten VALUES (?, ?)", (digest(user), now))


def untold(connection: apsw.Connection) -> list[str]:
    """Return the digests of who was forgotten and is not known to be forgotten elsewhere."""
    return [name for (name,) in connection.execute("SELECT digest FROM forgotten ORDER BY at")]


def tell(connection: apsw.Connection, digests: Iterable[str]) -> None:
    """Note that these are forgotten elsewhere too; call it inside a write job."""
    connection.executemany("DELETE FROM forgotten WHERE digest = ?", [(name,) for name in digests])
