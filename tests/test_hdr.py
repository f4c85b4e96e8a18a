"""The histogram of figures, against HdrHistogram's own implementation."""

from __future__ import annotations

import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast.lab.load.hdr import LARGEST, Hdr

SHARES = [0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0]


def both(values):
    ours, theirs = Hdr(), HdrHistogram(1, LARGEST, 3)
    for value in values:
        ours.observe(value / 1e6)
        theirs.record_value(value)
    return ours, theirs


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, LARGEST), min_size=1, max_size=60))
def test_it_is_read_by_hdrhistograms_tools_as_it_was_written(values):
    ours, theirs = both(values)
    read = HdrHistogram.decode(ours.encoded())
    assert read.get_total_count() == theirs.get_total_count() == ours.count == len(values)
    for share in SHARES:
        assert read.get_value_at_percentile(100 * share) == theirs.get_value_at_percentile(100 * share)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, LARGEST), min_size=1, max_size=200))
def test_a_quantile_is_a_thousandth_from_the_true_one_at_most(values):
    ours, _ = both(values)
    ordered = sorted(values)
    for share in SHARES:
        rank = max(1, -(-round(share * 10_000) * len(values) // 10_000))
        true = ordered[rank - 1] / 1e6
        assert true <= ours.quantile(share) + 1e-12
        assert ours.quantile(share) <= true * 1.001 + 1e-12
    assert ours.largest == max(values) / 1e6


def test_what_is_out_of_range_is_counted_at_its_end():
    seen = Hdr()
    assert seen.quantile(0.5) == 0
    assert seen.curve() == []
    seen.observe(-0.001)  # a clock's last digit
    seen.observe(7200.0)
    assert seen.count == 2
    assert seen.quantile(0.5) == 0
    assert seen.quantile(1.0) == pytest.approx(3600, rel=0.001)
    assert seen.largest == 7200


def test_the_curve_is_that_of_the_shares():
    seen = Hdr()
    for value in (0.001, 0.001, 0.002, 0.003):
        seen.observe(value)
    assert seen.curve() == [(0.5, 0.001), (0.75, 0.002), (1.0, pytest.approx(0.003, rel=0.001))]
