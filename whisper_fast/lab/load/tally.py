"""The tally of a run: what became of each message, how long it took, and in which order the replies came."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING

from ..._metrics import Histogram
from ...journal import REPLIED
from .hdr import Hdr
from .target import refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..traffic import Arrival

__all__ = ["Interval", "Tally"]

PROMISED, ANSWERED, FAILED = 0, 1, 2


class Interval:
    """What came to its end since the last look."""

    def __init__(self) -> None:
        self.total, self.added = Histogram(), Histogram()
        self.answered = self.shed = self.errors = 0


class Tally:
    """Counts every message once.

    `total` is the time from when a message was due to its reply. `added` is that less the model's own time and less
    the wait for the same user's earlier reply, which is in that message's figures; it stays empty where the model's
    time is not known. Good is an answer within `objective` seconds added, or in all where there is no `added`.
    """

    def __init__(self, objective: float) -> None:
        self.objective = objective
        self.sent = self.answered = self.good = self.out_of_order = 0
        self.in_flight = self.in_flight_peak = self.unanswered = 0
        self.latest = 0.0  # when the last message came to its end, seconds after the start
        self.errors: Counter[str] = Counter()
        self.shed: Counter[str] = Counter()
        self.incomplete = 0  # answers that had to do without a component
        self.missing: Counter[str] = Counter()
        self.total, self.added = Hdr(), Hdr()
        self.interval = Interval()
        self._promised = (array("L"), array("L"), bytearray())  # of each promise: user, number, what became of it
        self._last = (array("l"), array("d"))  # of each user: the number that was answered last, and when

    @property
    def ended(self) -> int:
        """How many messages have come to an end."""
        return self.sent - self.in_flight

    def begin(self) -> None:
        """Count a message that is sent."""
        self.sent += 1
        self.in_flight += 1
        self.in_flight_peak = max(self.in_flight_peak, self.in_flight)

    def end(self, now: float) -> None:
        """Count that it has come to an end, whichever."""
        self.in_flight -= 1
        self.latest = now

    def promise(self, arrival: Arrival) -> int:
        """Take down that an answer was promised; returns the promise's index."""
        users, numbers, states = self._promised
        users.append(arrival.user)
        numbers.append(arrival.number)
        states.append(PROMISED)
        return len(states) - 1

    def answer(self, arrival: Arrival, promise: int, now: float, model: float | None) -> None:
        """Take down a reply that came `now` seconds after the start, `model` of them spent in the model."""
        self._promised[2][promise] = ANSWERED
        self.answered += 1
        self.interval.answered += 1
        behind = self._follow(arrival, now)
        self.good += self._took(now - arrival.at, behind, model) <= self.objective

    def fail(self, promise: int | None, error: BaseException) -> None:
        """Take down an error, by its kind."""
        if promise is not None:
            self._promised[2][promise] = FAILED
        if refused(error):
            self.shed[type(error).__name__] += 1
            self.interval.shed += 1
        else:
            self.errors[type(error).__name__] += 1
            self.interval.errors += 1

    def leave(self, arrival: Arrival, now: float, model: float | None) -> None:
        """Take down a message that was not answered when the run ended: it took at least so long."""
        self.unanswered += 1
        self._took(now - arrival.at, 0.0, model)

    def broken(self, seed: int, states: Mapping[str, int] | None, *, waiting: bool) -> int:
        """Count the promises that were broken.

        That is a message of which the journal's `states` know nothing or, although it was answered, no reply; and one
        without an answer although nobody works at it any more, unless there still is something to be `waiting` for.
        """
        lost = 0
        for user, number, state in zip(*self._promised, strict=True):
            if state == PROMISED and not waiting:
                lost += 1
            elif states is not None:
                found = states.get(f"{seed}-{user}-{number}")
                lost += found is None or (state == ANSWERED and found not in REPLIED)
        return lost

    def turn_over(self) -> Interval:
        """Return the interval that ends now, and begin the next."""
        ended, self.interval = self.interval, Interval()
        return ended

    def _took(self, seconds: float, behind: float, model: float | None) -> float:
        self.total.observe(seconds)
        self.interval.total.observe(max(0.0, seconds))
        if model is None:
            return seconds
        added = seconds - behind - model
        self.added.observe(added)
        self.interval.added.observe(max(0.0, added))
        return added

    def _follow(self, arrival: Arrival, now: float) -> float:
        """Return how long the message was behind its user's earlier reply, and count one that overtook it."""
        numbers, times = self._last
        if arrival.user >= len(numbers):
            missing = arrival.user + 1 - len(numbers)
            numbers.extend([-1] * missing)
            times.extend([0.0] * missing)
        behind = max(0.0, times[arrival.user] - arrival.at)
        self.out_of_order += arrival.number < numbers[arrival.user]
        numbers[arrival.user], times[arrival.user] = arrival.number, now
        return behind
