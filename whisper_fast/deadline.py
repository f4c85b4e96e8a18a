"""A deadline is a point in time that is handed down: what one step uses, the next no longer has."""

from __future__ import annotations

from typing import Final

from . import clock
from .errors import DeadlineExceeded

__all__ = ["NEVER", "Deadline"]


class Deadline:
    """A point on the monotonic clock, in seconds; the clock is the one that asyncio's loops use.

    >>> turn = Deadline.after(30.0)
    >>> emotion = turn.sooner(0.2)      # 0.2 s from now, or the turn's end if that is earlier
    """

    __slots__ = ("at",)

    def __init__(self, at: float) -> None:
        self.at: Final = at

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the deadline `seconds` from now; None means never."""
        return NEVER if seconds is None else cls(clock.monotonic() + seconds)

    def sooner(self, seconds: float | None) -> Deadline:
        """Return the earlier of this deadline and `seconds` from now."""
        if seconds is None:
            return self
        at = clock.monotonic() + seconds
        return self if self.at <= at else Deadline(at)

    def remaining(self) -> float:
        """Return the seconds left, negative when it has passed, infinite for `NEVER`."""
        return self.at - clock.monotonic()

    def check(self, what: str) -> None:
        """Raise `DeadlineExceeded` naming `what` if the deadline has passed."""
        late = -self.remaining()
        if late >= 0:
            raise DeadlineExceeded(f"{what}: its time was used up {late:.3f} s ago")

    def __repr__(self) -> str:
        return f"Deadline({self.remaining():+.3f} s)"


NEVER: Final = Deadline(float("inf"))
