"""Whether the disk takes writes: what is wrong, when it is tried again, and one line in the log for each change."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from .. import clock
from ..errors import StoreCorrupt, StoreFull, StoreLocked, StoreNoMemory

if TYPE_CHECKING:
    from ..errors import StoreError

__all__ = ["Health"]

log = logging.getLogger(__name__)

SOONEST: Final = 0.005  # seconds between two tries while somebody asks
FIRST: Final = 0.05  # seconds until the second try while nobody asks; doubled each time
LONGEST: Final = 2.0  # seconds between two tries at most
CHECK_FIRST: Final = 1.0  # the same for a damaged file, where a try reads all of it
CHECK_LONGEST: Final = 60.0


class Health:
    """The state of one database: well while `problem` is None.

    While unwell it is probed: at once, then after 0.05 s, doubled up to 2 s, and whenever a write asks, at most every
    5 ms. Until a probe succeeds writes are refused unasked, but where only space or memory is short: what fits is
    stored. A damaged file is read from end to end by each probe: after 1 s, up to 60 s.
    `damage` is what a reader found: other users' rows may be sound, so it stops nobody.
    """

    def __init__(self) -> None:
        self.problem: StoreError | None = None
        self.damage: StoreError | None = None
        self._delay = 0.0
        self._tried = 0.0
        self._since = 0.0

    @property
    def damaged(self) -> bool:
        """Whether the file must be read through before it is trusted again."""
        return isinstance(self.problem, StoreCorrupt)

    @property
    def refuses(self) -> bool:
        """Whether a write is not even tried."""
        return self.problem is not None and not isinstance(self.problem, StoreFull | StoreNoMemory)

    @property
    def reopen(self) -> bool:
        """Whether the connection must be opened anew: not where only space, a lock or memory was missing."""
        return not isinstance(self.problem, StoreFull | StoreLocked | StoreNoMemory)

    def fell_ill(self, problem: StoreError) -> None:
        """Note that a write failed."""
        if self.problem is None:
            self._delay, self._since = 0.0, clock.monotonic()
            self._tried = self._since
        if type(self.problem) is not type(problem):
            log.error("messages are refused, nothing was stored: %s", problem)
        self.problem = problem

    def still(self, problem: StoreError) -> None:
        """Note that a probe failed."""
        self.fell_ill(problem)
        self._tried = clock.monotonic()
        first, longest = (CHECK_FIRST, CHECK_LONGEST) if self.damaged else (FIRST, LONGEST)
        self._delay = min(max(first, 2 * self._delay), longest)

    def recovered(self) -> None:
        """Note that a probe has reached the disk."""
        log.warning("messages are taken again after %.1f s", clock.monotonic() - self._since)
        self.problem = None

    def wait(self) -> float | None:
        """Return the seconds until the next probe, None while well."""
        return None if self.problem is None else max(0.0, self._tried + self._delay - clock.monotonic())

    def due(self, *, asked: bool) -> bool:
        """Say whether to probe now; `asked` when a write waits for it."""
        if asked and not self.damaged:
            return clock.monotonic() >= self._tried + min(self._delay, SOONEST)
        return not self.wait()

    def found_damage(self, damage: StoreError | None) -> None:
        """Note that a reader met a damaged page, or that the file is another one now."""
        if damage is not None and self.damage is None:
            log.error("what is asked for cannot be read, the rest can: %s", damage)
        self.damage = damage
