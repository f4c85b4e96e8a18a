"""How much more than its calls a pool may send: a share of what goes well."""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """A token bucket that each success fills by `share` and each extra request empties by 1.

    It holds at most `burst`, which it starts with. Where nothing succeeds any more it is soon empty: an outage is not
    answered with more requests.
    """

    __slots__ = ("burst", "denied", "left", "share", "spent")

    def __init__(self, share: float, burst: float) -> None:
        self.share = share
        self.burst = burst
        self.left = burst
        self.spent = 0
        self.denied = 0

    def earn(self) -> None:
        """Count a success."""
        self.left = min(self.burst, self.left + self.share)

    def spend(self) -> bool:
        """Take what one extra request costs; say whether it was there."""
        if self.left < 1:
            self.denied += 1
            return False
        self.left -= 1
        self.spent += 1
        return True
