"""A circuit breaker: who keeps failing is left alone for a while, then asked once whether it is well again."""

from __future__ import annotations

from math import inf

__all__ = ["Breaker"]

CALL = 0  # the pass of a call through a closed breaker
REFUSED = -1


class Breaker:
    """Whether calls go to one server; a pure state machine, times are seconds of the caller's clock.

    closed     every call passes. `failures` in a row, or a failing share above one half of the latest calls
               (a mean that weighs each call 1 / 16), open it; the mean does so after 16 calls at the earliest
    open       no call passes for `cooldown` seconds, twice as long after each failed probe, at most `longest`
    half-open  one call passes as a probe. When it succeeds the breaker closes, when it fails it opens again. A probe
               that is not heard of within `lease` seconds, and one that is given up, leave its place to the next call

    A call is let in by `enter`, whose pass comes back with how it went: `succeeded`, `failed`, or `left` for what
    says nothing about the server (the caller went away, the request was wrong). Passes of another state, and probes
    whose lease is over, change nothing.
    """

    __slots__ = (
        "_cooldown",
        "_failing",
        "_probe",
        "_probes",
        "_row",
        "_seen",
        "_until",
        "cooldown",
        "failures",
        "lease",
        "longest",
        "opened",
        "state",
    )

    _row: int
    _seen: int
    _probe: int
    _failing: float
    _until: float
    _cooldown: float

    def __init__(
        self, *, failures: int = 5, cooldown: float = 1.0, longest: float = 30.0, lease: float = 120.0
    ) -> None:
        self.failures = failures
        self.cooldown = cooldown
        self.longest = longest
        self.lease = lease
        self.state = "closed"
        self.opened = 0  # how often
        self._probes = 0
        self._close()

    def enter(self, now: float) -> int:
        """Return the pass of a call, negative when it must not go."""
        return CALL if self.state == "closed" else self._enter(now)

    def _enter(self, now: float) -> int:
        if now < self._until:  # of the cooldown, or of the probe's lease
            return REFUSED
        self.state = "half-open"
        self._probes += 1
        self._probe = self._probes
        self._until = now + self.lease
        return self._probe

    def succeeded(self, pass_: int) -> None:
        """Count a call that was answered."""
        if pass_ == CALL:
            if self._failing and self.state == "closed":
                self._row = 0
                self._count(0.0)
        elif pass_ == self._probe:
            self._close()

    def failed(self, pass_: int, now: float, retry_after: float | None = None) -> None:
        """Count a call that the server failed; it is left alone for `retry_after` seconds at least."""
        if pass_ == CALL and self.state == "closed":
            self._row += 1
            self._count(1.0)
            if self._row >= self.failures or (self._seen >= 16 and self._failing > 0.5):
                self._open(now, retry_after)
        elif pass_ > CALL and pass_ == self._probe:
            self._cooldown = min(2 * self._cooldown, self.longest)
            self._open(now, retry_after)

    def left(self, pass_: int) -> None:
        """Take back a call that says nothing about the server; a probe's place is free at once."""
        if pass_ > CALL and pass_ == self._probe:
            self._probe, self._until = 0, -inf

    def wait(self, now: float) -> float:
        """Return the seconds until a call may pass again: 0 when one may now, and at most the lease of a probe."""
        return 0.0 if self.state == "closed" else max(0.0, self._until - now)

    def _count(self, failed: float) -> None:
        self._seen = min(self._seen + 1, 16)
        self._failing += (failed - self._failing) / 16
        if self._failing < 0.01:
            self._failing = 0.0

    def _open(self, now: float, retry_after: float | None) -> None:
        self.state = "open"
        self.opened += 1
        self._probe = 0
        self._until = now + max(self._cooldown, min(retry_after or 0.0, self.longest))

    def _close(self) -> None:
        self.state = "closed"
        self._row = self._seen = self._probe = 0
        self._failing, self._until = 0.0, -inf
        self._cooldown = self.cooldown
