"""Counters and histograms: what they say of values, of names, of other processes' bytes."""

from __future__ import annotations

import math
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_fast._metrics import OTHER, Counter, Counters, Histogram, Histograms

values = st.floats(min_value=2.0**-30, max_value=2.0**33)
shares = st.floats(min_value=0, max_value=1)


def histogram(seen):
    made = Histogram()
    for value in seen:
        made.observe(value)
    return made


def state(histogram):
    return histogram.dump(), histogram.count, histogram.sum, histogram.largest


@given(st.lists(values, min_size=1, max_size=300), shares)
def test_every_quantile_is_within_two_percent(seen, share):
    exact = sorted(seen)[max(1, math.ceil(share * len(seen))) - 1]
    made = histogram(seen)
    assert made.quantile(share) == pytest.approx(exact, rel=1 / 64)
    assert made.count == len(seen)
    assert made.sum == pytest.approx(math.fsum(seen))
    assert made.largest == max(seen)
    assert made.quantile(1.0) <= made.largest


def test_a_tail_of_one_in_ten_thousand_is_found():
    made = histogram([0.001] * 99_990 + [0.7] * 10)
    assert made.quantile(0.99) == pytest.approx(0.001, rel=1 / 64)
    assert made.quantile(0.99995) == pytest.approx(0.7, rel=1 / 64)


@given(st.lists(st.floats(min_value=0, max_value=1e12), max_size=200))
def test_values_below_powers_of_two_are_counted_exactly(seen):
    bounds = [2.0**power for power in range(-10, 34, 3)]
    assert histogram(seen).below(bounds) == [sum(value < bound for value in seen) for bound in bounds]


def test_nothing_seen_is_no_error():
    made = Histogram()
    assert (made.count, made.sum, made.largest, made.quantile(0.99)) == (0, 0.0, 0.0, 0.0)
    assert made.below([1.0, 2.0]) == [0, 0]


@pytest.mark.parametrize("value", [0.0, 1e-300, 5e-324, 1e300, 2.0**34, 2.0**-30])
def test_the_edges_of_what_a_float_can_be(value):
    made = histogram([value])
    assert made.count == 1
    assert made.quantile(0.5) <= made.largest == value


@pytest.mark.parametrize("value", [-1.0, -1e-300, math.inf, -math.inf, math.nan])
def test_what_is_no_duration_is_refused(value):
    made, named = Histogram(), Histograms()
    for observe in (
        made.observe,
        lambda value: named.observe("a", value),
        lambda value: named.observe_all({"a": value}),
    ):
        with pytest.raises(ValueError, match="finite values of at least 0"):
            observe(value)
    assert made.count == named["a"].count == 0


@given(st.lists(values, max_size=60), st.lists(values, max_size=60))
def test_merged_is_what_one_would_have_seen(mine, theirs):
    merged, both = histogram(mine), histogram(mine + theirs)
    merged.merge(Histogram.load(histogram(theirs).dump()))
    assert merged.dump()[24:] == both.dump()[24:]  # the buckets; a sum's last bits depend on its order
    assert merged.sum == pytest.approx(both.sum)
    assert merged.largest == both.largest


@given(st.lists(values, max_size=60), st.lists(values, max_size=60))
def test_since_is_what_came_later(before, after):
    made = histogram(before)
    then = made.copy()
    for value in after:
        made.observe(value)
    later = made.since(then)
    assert later.dump()[24:] == histogram(after).dump()[24:]
    assert later.sum == pytest.approx(math.fsum(after), rel=1e-9, abs=1e-3)
    with pytest.raises(ValueError, match="never saw"):
        Histogram().since(histogram([1.0]))


def test_a_copy_stands_still():
    made = histogram([1.0, 2.0])
    copy = made.copy()
    made.observe(3.0)
    assert state(copy) == state(histogram([1.0, 2.0]))


@given(st.binary(max_size=200) | st.lists(values, max_size=20).map(lambda seen: histogram(seen).dump()), st.data())
def test_damaged_bytes_are_refused_or_a_histogram(dumped, data):
    damaged = bytearray(dumped)
    if damaged and data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        loaded = Histogram.load(bytes(damaged))
    except ValueError:
        return
    assert 0 <= loaded.quantile(0.5) < math.inf
    assert 0 <= loaded.sum < math.inf


def test_a_bucket_that_there_is_not_is_refused():
    whole = histogram([1.0]).dump()
    with pytest.raises(ValueError, match="no histogram"):
        Histogram.load(whole[:24] + struct.pack("QQ", 1 << 40, 1))


def test_a_counter_only_grows():
    counter = Counter()
    counter.inc()
    counter.inc(2.5)
    for wrong in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="only grows"):
            counter.inc(wrong)
    assert counter.value == 3.5


def test_names_are_bounded_and_the_rest_is_counted_together():
    errors = Counters(most=3)
    for number in range(100_000):
        errors.inc(f'component {number % 1000}\n"quoted"')
    assert len(errors) == 4
    assert sum(counter.value for _, counter in errors.items()) == 100_000
    assert errors[OTHER].value == 100_000 - 300
    with pytest.raises(ValueError, match="at least 1"):
        Counters(most=0)


def test_a_whole_turns_timings_in_one_call():
    stages = Histograms()
    stages.observe_all({"recall": 0.002, "llm": 1.5})
    stages.observe_all({"llm": 2.5})
    assert {name: made.count for name, made in stages.items()} == {"recall": 1, "llm": 2}
    assert stages["llm"].sum == 4.0
    for wrong in ({"llm": "1"}, {"llm": None}, {7: 1.0}):
        with pytest.raises(TypeError):
            stages.observe_all(wrong)


def test_a_name_with_a_hostile_hash_breaks_nothing():
    stages, timings = Histograms(), {"llm": 1.0}

    class Name(str):
        def __hash__(self):
            timings.clear()
            return 7

        def __eq__(self, other):
            timings["more"] = 1.0
            return False

    timings[Name("mine")] = 2.0
    timings["llm"] = 1.0
    stages.observe_all(timings)
    assert stages["llm"].count <= 1


def test_many_threads_lose_nothing():
    counters, stages = Counters(), Histograms()

    def work():
        for _ in range(20_000):
            counters.inc("a")
            stages.observe_all({"a": 0.5, "b": 0.25})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters["a"].value == 80_000
    assert stages["a"].count == stages["b"].count == 80_000
    assert stages["a"].sum == 40_000.0
