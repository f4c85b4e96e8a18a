"""How many calls a server gets at once: a limit that follows what the server shows."""

from __future__ import annotations

from math import inf, sqrt

__all__ = ["AdaptiveLimit"]

SMALLEST_WINDOW = 20  # answers
FADE = 0.9  # what a window leaves of the weight of those before, for the slope
LOWER, UPPER = 0.03, 0.06  # of the limit: the queue at the server below which it grows, above which it is cut
BREATH = 24  # windows between two experiments that nothing called for
SHALLOW, DEEP = 0.9, 0.75  # what an experiment leaves of the limit: with a known baseline, and without
REFUSED, LATE = 0.9, 0.75  # what a refusal, and a window with late answers, leave of the limit
HELPED, HELPED_AT_ALL = 1 / 2, 1 / 3  # of the expected fall: with a known baseline, and without
TOO_LATE = 0.1  # of a window's answers
FASTEST = 0.25  # of the limit, at most, that one step of growth adds
HOLD = 16  # windows before a limit that was refused is tried again


class Line:
    """Seconds that one kind of call takes on an unloaded server: `seconds + slope * (work - pivot)`."""

    __slots__ = ("n", "pivot", "seconds", "slope", "sxx", "sxy", "x", "xx", "xy", "y", "yy")

    def __init__(self) -> None:
        self.pivot = self.seconds = self.slope = self.sxx = self.sxy = 0.0
        self.begin()

    def begin(self) -> None:
        self.n = 0
        self.x = self.y = self.xx = self.xy = self.yy = 0.0

    def close(self, known: float | None) -> tuple[float, float]:
        """Learn the slope from the window; return the sum of excess seconds, and of their squared deviations.

        A line without a past is put where its mean excess is that of the others, `known`, or else 0.
        """
        n, x, y = self.n, self.x / self.n, self.y / self.n
        sxx, sxy = max(0.0, self.xx - n * x * x), self.xy - n * x * y
        syy = max(0.0, self.yy - n * y * y)
        if not self.sxx and not self.seconds:
            self.pivot, self.seconds = x, y - (known or 0.0)
        self.sxx, self.sxy = FADE * self.sxx + sxx, FADE * self.sxy + sxy
        self.slope = max(0.0, self.sxy / self.sxx) if self.sxx > 1e-9 else 0.0
        excess = y - self.seconds - self.slope * (x - self.pivot)
        deviations = max(0.0, syy - 2 * self.slope * sxy + self.slope * self.slope * sxx)
        return n * excess, deviations


class AdaptiveLimit:
    """The number of calls that a server works on without queueing them, found from outside.

    A window is `max(value, 20)` answers to calls that began after the limit moved last and ended among at least half
    of `value`. A call's excess is its
    seconds beyond those that its work takes on the unloaded server, along a line with the slope that the windows
    themselves show (so that long answers are no sign of load): whole answers by their tokens, first tokens of
    streams by the prompt's size. By Little's law the server then queues

        queue = answers/second * mean excess

    calls of ours, the signal of TCP Vegas and of Netflix' VegasLimit. With the mean excess of a window's standard
    error `se`, and at a limit that was reached by most calls of the window:

        queue < max(0.5, 3 % value)                         grow by 1, 2, 4 ..., at most 25 % of value
        queue > max(1.5, 6 % value) + 2 answers/second * se cut to value - queue + max(0.5, 3 % value)

    and in between it stays. Every cut is an experiment. If the queue was ours, the excess falls by
    (value - cut) / (answers/second). When it falls by less than half of that (a third, while no baseline is known),
    the server is slower for another reason: its present latency becomes the baseline and the limit returns. So
    neither a slow server nor others' load makes the limit collapse. A baseline that was itself measured under
    overload does not make it grow: every 24 windows a cut to 90 % is tried although nothing called for it, and where
    a cut brings the latency below the baseline, or none is known yet, cuts to 75 % follow until one does not help.

    states   steady     as above
             measuring  one more window from now on before a cut, since the last one may have been half and half
             cut        waits for the window that tells whether the cut helped
    events   refused    429, 503 or 529: value = 0.9 * calls in flight, or what it was before it grew to that, once
                        for the calls of one limit; that number is not tried again for 16 windows
             late       a window with more than 10 % of answers that ran out of time is cut to 75 % and never grows

    Faults of its models that are avoided: Gradient's long average that takes overload for normal and grows on
    timeouts; Vegas' minimum that never forgets; growth while the limit is not even reached.

    The floor is a tenth of `start` and at least 2 (unless `start` is 1), so that one call that hangs never has the
    only slot. It is pure: times are seconds of the caller's clock. `why` says what moved it last. Told not to
    `follow`, it stands at `start`.
    """

    __slots__ = (
        "_began",
        "_ceiling",
        "_cut",
        "_full",
        "_good",
        "_held",
        "_hold",
        "_known",
        "_late",
        "_lines",
        "_n",
        "_occupied",
        "_quiet",
        "_state",
        "_step",
        "adaptive",
        "floor",
        "most",
        "moves",
        "start",
        "value",
        "why",
        "windows",
    )

    def __init__(self, start: int, *, floor: int | None = None, most: int = 10_000) -> None:
        self.start = start
        self.floor = max(min(start, 2), start // 10) if floor is None else floor
        self.most = max(most, start)
        self.adaptive = True  # whether it follows the server
        self._begin()

    def _begin(self) -> None:
        self.value = self.start
        self.why = "where it starts"
        self.moves = 0
        self._lines: dict[str, Line] = {}
        self._known = False  # whether the baseline was confirmed by an experiment
        self._state = "steady"
        self._cut = (0, 0.0, 0.0)  # limit, excess and rate before the cut
        self._step, self._quiet = 1, 0
        self._good = 0  # the limit before it grew, until the next window has shown that the server bears it
        self.windows = 0
        self._ceiling, self._hold = inf, 0
        self._open(-inf)

    def _open(self, now: float) -> None:
        """Begin a window of the calls that begin from `now` on."""
        self._began = now
        self._next()

    def _next(self) -> None:
        self._n = self._full = self._late = self._occupied = 0
        self._held = 0.0
        for line in self._lines.values():
            line.begin()

    def follow(self, on: bool) -> None:
        """Follow the server and learn anew, or stand at `start`."""
        if on != self.adaptive:
            self._begin()
            self.adaptive = on

    # ---- what the server shows

    def answered(
        self, now: float, begun: float, in_flight: int, work: float, seconds: float | None = None, kind: str = "whole"
    ) -> None:
        """Count an answer that ended `now` to a call that began at `begun`, one of `in_flight`.

        `seconds` is what it took of what grows with `work`, None for all of it; calls of one `kind` are compared.
        """
        if begun < self._began or 2 * in_flight < self.value or not self.adaptive:
            return
        held = now - begun
        y = held if seconds is None else seconds
        line = self._lines.get(kind)
        if line is None:
            line = self._lines[kind] = Line()
        line.n += 1
        line.x += work
        line.y += y
        line.xx += work * work
        line.xy += work * y
        line.yy += y * y
        self._held += held
        self._occupied += in_flight
        self._full += in_flight >= self.value
        self._n += 1
        if self._n >= self.value and self._n >= SMALLEST_WINDOW:
            self._close(now)

    def late(self, now: float, begun: float, in_flight: int) -> None:
        """Count a call that ran out of time after it had had enough of it for an answer."""
        if begun < self._began or not self.adaptive:
            return
        self._late += 1
        self._n += 1
        self._held += now - begun
        self._occupied += in_flight
        if self._n >= self.value and self._n >= SMALLEST_WINDOW:
            self._close(now)

    def refused(self, now: float, begun: float, in_flight: int) -> None:
        """Count a call that the server refused for its load, as one of `in_flight`, itself included."""
        if not self.adaptive or (begun < self._began and in_flight > self.value):
            return
        self._ceiling, self._hold = min(self._ceiling, in_flight), HOLD
        self._state, self._step = "steady", 1
        target = self._good if 0 < self._good < in_flight else int(REFUSED * in_flight)
        self._good = 0
        self._move(now, min(self.value, target), f"refused at {in_flight} in flight")

    # ---- what follows from a window

    def _close(self, now: float) -> None:
        self.windows += 1
        self._good = 0
        late = self._late > TOO_LATE * self._n
        full = 2 * self._full >= self._n - self._late
        lines = [line for line in self._lines.values() if line.n]
        if late:
            self._state, self._step = "steady", 1
            return self._move(now, int(LATE * self.value), f"{self._late} of {self._n} answers came too late")
        self._wait_out()
        if not self._known and self._state == "steady" and full:  # the first window still has the rush of a start
            self._state = "measuring"
            return self._open(now)
        excess, deviation = self._excess(lines)
        if self._state == "cut":
            self._judge(now, excess, deviation)
        elif not full:
            self._step = 1
            self._next()
        else:
            self._steer(now, excess, deviation)
        return None

    def _excess(self, lines: list[Line]) -> tuple[float, float]:
        """Return the mean excess of the window and its standard error, in seconds."""
        total = squares = 0.0
        n, known = 0, None
        for line in sorted(lines, key=lambda line: not line.seconds):  # those with a past first
            part, deviations = line.close(known)
            total, squares, n = total + part, squares + deviations, n + line.n
            known = total / n
        return total / n, sqrt(squares) / n

    def _wait_out(self) -> None:
        """Count the windows of a held limit down; at the end it may be tried again."""
        if self._hold:
            self._hold -= 1
            if not self._hold:
                self._ceiling = inf

    def _steer(self, now: float, excess: float, deviation: float) -> None:
        rate = self._occupied / self._held if self._held > 0 else 0.0
        queue, error = rate * excess, 2 * rate * deviation
        spare = max(0.5, LOWER * self.value)
        self._quiet += 1
        if excess < 0:
            self._shift(excess if -excess > 2 * deviation else excess / 4)
        queued = queue > max(1.5, UPPER * self.value) + error
        if queued and self._state != "measuring":
            self._state = "measuring"
            self._open(now)
        elif queued:
            self._try(now, self.value - queue + spare, excess, rate, f"{queue:.1f} calls waited at the server")
        elif not self._known or (self._quiet >= BREATH and self._step == 1):
            self._quiet = 0
            self._try(now, self.value, excess, rate, "to see what fewer do")
        elif queue < spare:
            self._grow(now, 1 - max(0.0, queue) / spare)
        else:
            self._state, self._step = "steady", 1
            self._next()

    def _grow(self, now: float, room: float) -> None:
        """Grow by the next step, or by its part that `room`, from 0 to 1, leaves."""
        step = int(min(max(1.0, room * min(self._step, FASTEST * self.value)), self._ceiling - 1 - self.value))
        if self.value < self._cut[0]:
            step = min(step, max(1, self._cut[0] - 1 - self.value))  # slowly where a queue was seen
        self._state = "steady"
        if step < 1 or self.value >= self.most:
            return self._next()
        self._step, self._good = min(2 * self._step, self.value), self.value
        return self._move(now, self.value + step, "the server has room")

    def _try(self, now: float, target: float, excess: float, rate: float, why: str) -> None:
        """Cut the limit as an experiment; at its floor there is none, and the baseline is what it is."""
        self._step = 1
        target = min(target, self.value * (DEEP if not self._known else SHALLOW), self.value - 1)
        target = max(self.floor, round(target))
        if target >= self.value:
            self._known, self._state = True, "steady"
            return self._next()
        self._cut = (self.value, excess, rate)
        self._state = "cut"
        return self._move(now, target, why)

    def _judge(self, now: float, excess: float, deviation: float) -> None:
        """Decide whether the queue that a cut was to take away was ours."""
        before, excess_before, rate = self._cut
        expected = (before - self.value) / rate if rate else 0.0
        self._state = "steady"
        if rate * (excess - excess_before - 2 * deviation) > max(1.5, UPPER * self.value):
            self._state = "measuring"  # it became slower meanwhile: nothing follows for the cut
            return self._open(now)
        if excess_before - excess >= expected * (HELPED if self._known else HELPED_AT_ALL):
            if rate * (excess + 2 * deviation) < -0.5 * (before - self.value):
                self._known = False  # what was taken for the baseline was a queue too
            if excess < 0 or not self._known:
                self._shift(excess)
            if not self._known:
                return self._try(now, self.value, 0.0, rate, self.why)
            return self._next()
        self._shift(excess)
        self._known, self._cut = True, (0, 0.0, 0.0)
        return self._move(now, before, "fewer calls were not faster")

    def _shift(self, seconds: float) -> None:
        """Take an excess of `seconds` for the baseline."""
        for line in self._lines.values():
            line.seconds += seconds

    def _move(self, now: float, value: int, why: str) -> None:
        value = max(self.floor, min(value, self.most))
        if value != self.value:
            self.value, self.why = value, why
            self.moves += 1
        self._open(now)
