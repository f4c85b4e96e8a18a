"""Rates and percentiles look back over a span of time and no further."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count

import pytest

from whisper_fast import clock
from whisper_fast._metrics import Histograms
from whisper_fast.monitor.window import RATE_SPAN, SPAN, STEP, Percentiles, Rates


class Time:
    now = 1000.0

    @contextmanager
    def rules(self):
        with clock.replaced(monotonic=lambda: self.now, wall=lambda: self.now):
            yield self


@pytest.fixture
def time():
    with Time().rules() as time:
        yield time


def test_a_rate_before_there_is_an_earlier_look_goes_back_to_the_start(time):
    rates = Rates(("answered",))
    time.now += 10
    assert rates.look({"answered": 50}) == {"answered_per_s": 5.0, "over_s": 10.0}


def test_a_rate_at_the_very_start_is_none_at_all(time):
    assert Rates(("answered",)).look({"answered": 0}) == {"answered_per_s": 0.0, "over_s": 0.0}


def test_a_rate_forgets_what_is_longer_ago_than_its_span(time):
    rates, answered = Rates(("answered",)), count(step=100)
    for _ in range(20):
        rates.look({"answered": next(answered)})
        time.now += 1
    before = next(answered) - 100
    for _ in range(int(RATE_SPAN) + 1):
        found = rates.look({"answered": before})
        time.now += 1
    assert found == {"answered_per_s": 0.0, "over_s": RATE_SPAN}


def test_many_who_look_at_once_see_the_same_rate_and_keep_no_more(time):
    rates = Rates(("answered",))
    for second in range(100):
        seen = [rates.look({"answered": 7 * second}) for _ in range(50)]
        assert all(one == seen[0] for one in seen)
        time.now += 1
    assert seen[0]["answered_per_s"] == 7.0
    assert len(rates._marks) <= RATE_SPAN + 2


def test_percentiles_are_those_of_the_last_minute(time):
    family = Histograms()
    percentiles = Percentiles(family.items)
    for _ in range(1000):
        family.observe("llm", 9.0)
    assert percentiles.look()["llm"]["p50"] == pytest.approx(9.0, rel=0.02)
    time.now += STEP
    percentiles.look()
    for _ in range(int(SPAN / STEP) + 1):
        time.now += STEP
        family.observe("llm", 1.0)
        found = percentiles.look()
    assert found["llm"]["count"] == SPAN / STEP
    for name in ("p50", "p95", "p99"):
        assert found["llm"][name] == pytest.approx(1.0, rel=0.02)
    assert percentiles.seconds == SPAN


def test_what_was_told_nothing_lately_is_not_there(time):
    family = Histograms()
    percentiles = Percentiles(family.items)
    family.observe("emotion", 1.0)
    assert set(percentiles.look()) == {"emotion"}
    for _ in range(int(SPAN / STEP) + 2):
        time.now += STEP
        found = percentiles.look()
    assert found == {}


def test_a_page_that_is_open_for_a_day_keeps_a_few_marks(time):
    family = Histograms()
    family.observe("llm", 1.0)
    percentiles, rates = Percentiles(family.items), Rates(("answered",))
    for second in range(86_400):
        percentiles.look() if second % 10 == 0 else None
        rates.look({"answered": second})
        time.now += 1
    assert len(percentiles._marks) <= SPAN / STEP + 2
    assert len(rates._marks) <= RATE_SPAN + 2
