"""Time, read in one place: two clocks that everything here shares, so that a simulation can bring its own.

    monotonic()   seconds that never jump, the clock of asyncio's timers: deadlines, waiting, durations
    wall()        epoch seconds, which may jump: what is stored and shown

Read them as `clock.monotonic()`, never by `from .clock import monotonic`: a name that was taken along stays with the
system's clock. The interpreter specialises the two look-ups, so that a reading costs what it costs without this room.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["for_kernels", "monotonic", "replaced", "wall"]

monotonic: Callable[[], float] = time.monotonic
wall: Callable[[], float] = time.time


@contextmanager
def replaced(*, monotonic: Callable[[], float], wall: Callable[[], float]) -> Iterator[None]:
    """Let the whole process live on other clocks while the block lasts: for a simulation, in one thread."""
    names = globals()
    before = names["monotonic"], names["wall"]
    names["monotonic"], names["wall"] = monotonic, wall
    try:
        yield
    finally:
        names["monotonic"], names["wall"] = before


def for_kernels() -> Callable[[], float] | None:
    """Return the clock to hand to a compiled part; None where it may read the system's by itself, which is faster."""
    return None if monotonic is time.monotonic else monotonic
