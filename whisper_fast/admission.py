"""Who is let in: the wait that a message would have is predicted before any work is done for it.

    interval    mean seconds between two slots given back while somebody waits, over the last rounds of all slots
    wait        who waits ahead * interval; in a stall of s seconds the interval is at least s / slots.
                Behind b own messages: b times a turn's length, and the wait b + 1 times

One round is as many slots as there are; until the first is over nothing is known, and `UNMEASURED` may wait. What
would wait longer than `max_wait` is refused with the time after which it would not: the wait above the limit.
"""

from __future__ import annotations

from random import uniform

from . import clock
from .errors import Overloaded

__all__ = ["Admission", "back_in"]

ROUNDS = 4  # how many rounds of all slots the mean goes over
FEWEST = 64  # samples, and at least
UNMEASURED = 1000  # who may wait while nothing is known, and at least 20 for each slot
SHORTEST, LONGEST = 0.1, 60.0  # seconds to come back in


class Admission:
    """Measures how fast those who wait are served, and refuses who would wait longer than `max_wait` seconds."""

    def __init__(self, max_wait: float) -> None:
        self.max_wait = max_wait
        self.turn_seconds = 0.0  # mean length of a turn
        self._interval = 0.0
        self._samples = 0
        self._last: float | None = None  # when a slot was given back; None while nobody waits

    def served(self, waiting: int, slots: int) -> None:
        """Count a slot that was given back while `waiting` wait."""
        now = clock.monotonic()
        if self._last is not None:
            self._samples += 1
            window = max(FEWEST, ROUNDS * slots)
            self._interval += (now - self._last - self._interval) / min(self._samples, window)
        self._last = now if waiting else None

    def waits(self) -> None:
        """Note that somebody waits from now on."""
        if self._last is None:
            self._last = clock.monotonic()

    def lasted(self, seconds: float) -> None:
        """Count the length of a turn."""
        self.turn_seconds += (seconds - self.turn_seconds) / FEWEST if self.turn_seconds else seconds

    def predicted(self, ahead: int, slots: int) -> float | None:
        """Return the seconds that one waits who finds `ahead` waiting, None while nothing is known."""
        if self._samples < slots:
            return None
        stalled = 0.0 if self._last is None else (clock.monotonic() - self._last) / slots
        return ahead * max(self._interval, stalled)

    def check(self, ahead: int, slots: int, behind: int = 0) -> None:
        """Let one in who finds `ahead` waiting, and `behind` own messages; Overloaded says when to come back."""
        if not ahead:
            return
        wait = self.predicted(ahead, slots)
        if wait is None:
            if ahead >= max(UNMEASURED, 20 * slots):
                raise Overloaded(f"{ahead} turns wait already; come back a little later", retry_after=1.0)
            return
        wait = wait * (behind + 1) + self.turn_seconds * behind
        if wait > self.max_wait:
            text = f"a turn would wait {wait:.1f} s, and at most {self.max_wait:g} s are allowed; come back later"
            raise Overloaded(text, retry_after=back_in(wait - self.max_wait))

    def full(self, ahead: int, slots: int) -> float:
        """Return the seconds in which a tenth of those who wait are served: when to come back to a full queue."""
        wait = self.predicted(ahead, slots)
        return 1.0 if wait is None else back_in(wait / 10)


def back_in(seconds: float) -> float:
    """Return a time to come back: at least 0.1 s, at most 60, and not the same for all."""
    return min(LONGEST, max(SHORTEST, seconds) * uniform(1.0, 1.25))
