"""A histogram for figures: HdrHistogram's layout with three digits, so that its tools read what is measured here.

The kernel's histogram (`_metrics`) has buckets of 3 %, enough for a gauge; a figure wants the third digit. Values are
whole microseconds up to an hour. Below 2048 each has a bucket of its own, from there on each power of two has 1024 of
equal width: no value is told wrong by more than a thousandth (Tene, HdrHistogram; the encoding is its V2).
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from array import array
from typing import Final

__all__ = ["Hdr"]

DIGITS: Final = 3
HALF_BITS: Final = 10
MICROSECONDS: Final = 1_000_000
LARGEST: Final = 3600 * MICROSECONDS
COOKIE, COMPRESSED_COOKIE = 0x1C849303 | 0x10, 0x1C849304 | 0x10


def bucket_of(value: int) -> int:
    octave = max(0, value.bit_length() - HALF_BITS - 1)
    return (octave << HALF_BITS) + (value >> octave)


def highest_in(bucket: int) -> int:
    """Return the largest value that is counted in a bucket."""
    octave = max(0, (bucket >> HALF_BITS) - 1)
    return ((bucket - (octave << HALF_BITS) + 1) << octave) - 1


BUCKETS: Final = bucket_of(LARGEST) + 1


class Hdr:
    """How often which durations were seen, in seconds; 190 kB, whatever it is told."""

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * BUCKETS))
        self.count = 0
        self.sum = 0.0
        self.largest = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration; a negative one counts as 0, one beyond an hour as an hour."""
        value = min(max(0, round(seconds * MICROSECONDS)), LARGEST)
        self._counts[bucket_of(value)] += 1
        self.count += 1
        self.sum += seconds
        self.largest = max(self.largest, seconds)

    def quantile(self, share: float) -> float:
        """Return the seconds that `share` (0 to 1) of all do not exceed, within a thousandth; 0 without any."""
        rank, seen = max(1, math.ceil(share * self.count - 1e-9)), 0
        for bucket, count in self._seen():
            seen += count
            if seen >= rank:
                return min(highest_in(bucket) / MICROSECONDS, max(self.largest, 0.0))
        return 0.0

    def curve(self) -> list[tuple[float, float]]:
        """Return (share, seconds) for every bucket that holds something: the share of all up to there."""
        points, seen = [], 0
        for bucket, count in self._seen():
            seen += count
            points.append((seen / self.count, highest_in(bucket) / MICROSECONDS))
        return points

    def encoded(self) -> str:
        """Return it as HdrHistogram's tools take it: V2, compressed, base64; in microseconds."""
        body = b"".join(map(leb128, self._runs()))
        head = struct.pack(">iiiiqqd", COOKIE, len(body), 0, DIGITS, 1, LARGEST, 1.0)
        packed = zlib.compress(head + body)
        return base64.b64encode(struct.pack(">ii", COMPRESSED_COOKIE, len(packed)) + packed).decode()

    def _seen(self) -> list[tuple[int, int]]:
        return [(bucket, count) for bucket, count in enumerate(self._counts) if count]

    def _runs(self) -> list[int]:
        """Return the counts, each run of n empty buckets as -n."""
        runs, last = [], -1
        for bucket, count in self._seen():
            if bucket > last + 1:
                runs.append(last + 1 - bucket)
            runs.append(count)
            last = bucket
        return runs


def leb128(value: int) -> bytes:
    """Return a number in zigzag form, seven bits a byte, the lowest first."""
    value = value << 1 if value >= 0 else (-value << 1) - 1
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
