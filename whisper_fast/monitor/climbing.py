"""Hill climbing that tells its own effect from noise: a setting is moved only by a paired experiment.

What a setting does is hidden by what the load does meanwhile. So two values are tried in turn, A B B A A B ..., one
window each, and only windows beside each other are compared (blocks of two: what drifts, drifts for both).
Of k pairs with d = ln(score at the larger / score at the smaller):

    e       mean of d / ln(larger / smaller): the elasticity, 1 where twice the value brings twice the score
    error   t(k - 1) * standard deviation of d / sqrt(k) / ln(larger / smaller), t Student's at 95 %
    larger  wins when e - error > price, smaller when e + error < price; until then another pair, up to `MOST`; then
            a fine step is not taken, and of a coarse one the smaller wins unless the larger seems to bring 5 %: what
            cannot be told apart makes little difference

`price` is what a larger value must bring to be worth having: with 0.05, twice as many threads must bring 3.5 %.

states  up, down   it tries value * factor, or value / factor; what wins is the new value, and it goes on that way
        both lost  the factor becomes its square root, until the step is below `FINEST`; then it rests for `REST`
                   windows, twice as long each time up to `LONGEST`, or until the score is another one

Others' ways: .NET's thread pool moves its size along a wave and looks for the wave in the throughput (Hellerstein,
Morrison, Eilebrecht: "Optimizing concurrency levels in the .NET ThreadPool", FeBID 2008), which needs throughput to
follow at once, and a load whose own waves are of another length.
"""

from __future__ import annotations

from math import log, sqrt
from statistics import fmean, stdev
from typing import Final

__all__ = ["Climber"]

FIRST: Final = 2.0  # factor of the first experiment
FINEST: Final = 1.08
FEWEST, MOST = 3, 16  # pairs
COARSE: Final = 1.4  # factor
UNSURE: Final = 0.05  # of the score
CAUTION: Final = 1.5  # for a test that is looked at after every pair
REST, LONGEST = 8, 256  # windows
ANOTHER: Final = 1.5  # ratio of scores that shows another load


class Climber:
    """Looks for the best value between `least` and `most`, starting at `start`, and there with a larger one if `up`.

    `value` is what is to be set now; give the score of a window at it to `feed`. `best` is what has won so far, `why`
    says by what, and `moves` how often it moved. It is pure. A score is above 0; larger is better.
    """

    def __init__(
        self, start: float, *, least: float, most: float, price: float, whole: bool = True, up: bool = True
    ) -> None:
        if not 0 < least <= start <= most:
            raise ValueError(f"start is {start}; it must be from {least} to {most}, and that above 0")
        self.start, self.least, self.most = start, least, most
        self._price, self._whole, self._first_up = price, whole, up
        self.begin()

    def begin(self) -> None:
        """Forget everything: back to where it starts."""
        self.value = self.best = self.start
        self.why = "where it starts"
        self.moves = 0
        self._factor, self._up, self._lost = FIRST, self._first_up, 0
        self._rest, self._next_rest = 0, REST
        self._usual: float | None = None  # score at `best` when it came to rest
        self._other: float | None = None  # what is tried against `best`
        self._scores: list[tuple[float, float]] = []  # value and score of each window of an experiment

    @property
    def trying(self) -> float | None:
        """The value that is tried against `best`, None while nothing is."""
        return self._other

    def give_up(self) -> None:
        """End an experiment without a winner: the load for it has gone."""
        self._other, self._scores = None, []
        self.value = self.best

    def bound(self, most: float, why: str) -> None:
        """Look for nothing above `most` from now on; a best value above it comes down for the reason `why`."""
        self.most = max(self.least, most)
        if self.best > self.most:
            self.give_up()
            self.value = self.best = self.most
            self.why = why
            self.moves += 1

    def feed(self, score: float) -> None:
        """Take the score of a window at `value`."""
        if self._other is not None:
            self._scores.append((self.value, score))
            self._compare()
        elif self._rest and not self._changed(score):
            self._rest -= 1
        else:
            self._begin_experiment()

    def _changed(self, score: float) -> bool:
        """Say whether the load is another one than when it came to rest."""
        if self._usual is None:
            self._usual = score
        if max(score, self._usual) < ANOTHER * min(score, self._usual):
            return False
        self._factor, self._lost, self._next_rest = FIRST, 0, REST
        return True

    def _begin_experiment(self) -> None:
        other = self._candidate()
        if other is None:
            self._up, self._lost = not self._up, self._lost + 1
            other = self._candidate() if self._lost < 2 else None
        if other is None:
            self._finer()
            return
        self._other, self._scores = other, []
        self.value = self.best

    def _candidate(self) -> float | None:
        """Return the value to try, None where there is none that way."""
        wanted = self.best * self._factor if self._up else self.best / self._factor
        if self._whole:
            wanted = max(self.best + 1, round(wanted)) if self._up else min(self.best - 1, round(wanted))
        wanted = max(self.least, min(self.most, wanted))
        return wanted if wanted != self.best else None

    def _compare(self) -> None:
        assert self._other is not None  # noqa: S101 - an experiment is under way
        windows = len(self._scores)
        if windows % 2:
            self.value = self._other if self.value == self.best else self.best
            return
        winner = self._winner(windows // 2)
        if winner is not None:
            self._end(winner)

    def _winner(self, pairs: int) -> float | None:
        """Return the value that has won, None while it cannot be told."""
        assert self._other is not None  # noqa: S101 - an experiment is under way
        small, large = sorted((self.best, self._other))
        differences = []
        for (value, score), (_, other) in zip(self._scores[::2], self._scores[1::2], strict=True):
            d = log(other / score)
            differences.append(-d if value == large else d)
        if pairs < FEWEST:
            return None
        span = log(large / small)
        e = fmean(differences) / span
        error = CAUTION * student(pairs - 1) * stdev(differences) / sqrt(pairs) / span
        if e - error > self._price:
            return self._told(large, e)
        if e + error < self._price:
            return self._told(small, e)
        if pairs < MOST:
            return None
        if self._factor < COARSE:
            return self.best
        return self._told(large if e * span > UNSURE else small, e)

    def _told(self, winner: float, e: float) -> float:
        assert self._other is not None  # noqa: S101 - an experiment is under way
        if winner != self.best:
            self.why = f"{self._other:g} against {self.best:g} in {len(self._scores)} windows: elasticity {e:.2f}"
        return winner

    def _end(self, winner: float) -> None:
        self._other, self._scores = None, []
        if winner != self.best:
            self.best, self._lost = winner, 0
            self.moves += 1
        else:
            self._up, self._lost = not self._up, self._lost + 1
        self.value = self.best
        if self._lost >= 2:
            self._finer()

    def _finer(self) -> None:
        """Go on in smaller steps, or rest."""
        self._lost = 0
        self._factor = sqrt(self._factor)
        if self._factor < FINEST or (self._whole and self.best * (self._factor - 1) < 0.5):
            self._factor, self._usual = sqrt(FIRST), None
            self._rest, self._next_rest = self._next_rest, min(LONGEST, 2 * self._next_rest)


def student(freedom: int) -> float:
    """Return Student's t for 95 % on both sides, within 3 % from 2 degrees of freedom on."""
    return 1.96 + 2.37 / freedom + 2.82 / freedom**2 + 2.55 / freedom**3
