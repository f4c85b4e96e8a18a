"""The token table: one int8 row for each piece of the vocabulary, and the file it is shipped in.

The file holds, little-endian and without gaps:
- bytes 0-7: "WFTABLE1"; bytes 8-23: BLAKE2b-128 of everything after them
- bytes 24-35: three u32, the number of pieces n, the dimension d, the vocabulary's length v
- float32 scale[n], float32 weight[n], int8 row[n, d], and the vocabulary: v bytes of zlib, one piece a line
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreCorrupt

__all__ = ["TokenTable"]

MAGIC = b"WFTABLE1"
SIZES = struct.Struct("<III")
BODY = len(MAGIC) + 16
FILE = "tokens.bin"


def digest(body: bytes | memoryview) -> bytes:
    """Return the checksum that stands in the file's head."""
    return hashlib.blake2b(body, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A piece's vector is `scale * row`; `weight` is what the piece counts in a text (0: nothing at all)."""

    vocabulary: list[str]
    row: NDArray[np.int8]  # [n, d]
    scale: NDArray[np.float32]  # [n]
    weight: NDArray[np.float32]  # [n]
    checksum: str  # hexadecimal

    @classmethod
    def quantised(cls, vocabulary: list[str], vectors: NDArray[Any], weight: NDArray[Any]) -> TokenTable:
        """Make a table of float vectors [n, d]: each row symmetric int8 with its own scale, max|x| / 127."""
        scale = (np.abs(vectors).max(axis=1) / 127).astype(np.float32)
        row = np.rint(vectors / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8)
        table = cls(vocabulary, row, scale, weight.astype(np.float32), "")
        return cls.parse(table.to_bytes(), "the table just made")

    @classmethod
    def shipped(cls) -> TokenTable:
        """Load the table that comes with the package; raises StoreCorrupt if it is not what was shipped."""
        path = Path(__file__).parent / "data" / FILE
        try:
            return cls.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise StoreCorrupt(f"{path} is missing: install whisper-fast again") from None

    @classmethod
    def parse(cls, raw: bytes, name: str) -> TokenTable:
        """Read a table from its file's bytes without copying rows; raises StoreCorrupt with `name` in the text."""
        if raw[: len(MAGIC)] != MAGIC:
            raise StoreCorrupt(f"{name} is no token table (it starts {raw[:8]!r}): install whisper-fast again")
        body = memoryview(raw)[BODY:]
        expected, found = raw[len(MAGIC) : BODY].hex(), digest(body).hex()
        if found != expected:
            raise StoreCorrupt(f"{name} is damaged (checksum {found}, not {expected}): install whisper-fast again")
        n, d, length = SIZES.unpack_from(body)
        at = BODY + SIZES.size
        scale = np.frombuffer(raw, "<f4", n, at)
        weight = np.frombuffer(raw, "<f4", n, at + 4 * n)
        row = np.frombuffer(raw, np.int8, n * d, at + 8 * n).reshape(n, d)
        vocabulary = zlib.decompress(raw[len(raw) - length :]).decode().split("\n")
        return cls(vocabulary, row, scale, weight, found)

    def to_bytes(self) -> bytes:
        """Return the file's bytes, the same ones for the same table."""
        vocabulary = zlib.compress("\n".join(self.vocabulary).encode(), 9)
        sizes = SIZES.pack(*self.row.shape, len(vocabulary))
        columns = (self.scale.astype("<f4"), self.weight.astype("<f4"), self.row)
        body = b"".join([sizes, *(column.tobytes() for column in columns), vocabulary])
        return MAGIC + digest(body) + body
