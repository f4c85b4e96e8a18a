"""What a counter and a histogram cost, beside those of prometheus_client in the same run."""

import prometheus_client
import pytest

from whisper_fast._metrics import Counter, Counters, Histogram, Histograms

TURN = {f"component_{n}": 0.001 * n for n in range(10)}  # seconds of each stage of a turn, as in `Turn.timings`


def their_counter():
    return prometheus_client.Counter("theirs", "A counter.", ["name"], registry=None).labels("a")


def their_histogram():
    return prometheus_client.Histogram("theirs", "A histogram.", ["name"], registry=None).labels("a")


@pytest.mark.parametrize("who", ["ours", "prometheus_client"])
def test_counter(benchmark, who):
    counter = Counter() if who == "ours" else their_counter()
    benchmark(counter.inc)


@pytest.mark.parametrize("who", ["ours", "prometheus_client"])
def test_histogram(benchmark, who):
    histogram = Histogram() if who == "ours" else their_histogram()
    benchmark(histogram.observe, 0.0123)


def test_counter_by_name(benchmark):
    benchmark(Counters().inc, "recall")


def test_histogram_by_name(benchmark):
    benchmark(Histograms().observe, "recall", 0.0123)


@pytest.mark.parametrize("who", ["ours", "prometheus_client"])
def test_ten_stages_of_a_turn(benchmark, who):
    if who == "ours":
        benchmark(Histograms().observe_all, TURN)
        return
    family = prometheus_client.Histogram("turn", "Stages.", ["name"], registry=None)

    def observe():
        for name, seconds in TURN.items():
            family.labels(name).observe(seconds)

    benchmark(observe)
