"""What the policy hits on traces of contrary kinds, against floors half a point below what it hits today."""

import numpy as np
import pytest
from cache_traces import ours, splice


def zipf(count=120_000, keys=20_000):
    """Keys of fixed popularity, the n-th asked for as 1 / n ** 0.9."""
    weights = 1 / np.arange(1, keys + 1) ** 0.9
    return np.random.default_rng(3).choice(keys, count, p=weights / weights.sum())


def loop(count=60_000, keys=1500):
    return np.arange(count) % keys


def web(count=120_000):
    """Popular pages that come and go, and as many again that are asked for once."""
    random = np.random.default_rng(4)
    popular = np.arange(count) // 6000 * 400 + np.minimum(random.zipf(1.3, count), 4000)
    once = 10**7 + np.arange(count)
    return np.where(random.random(count) < 0.6, popular, once)


@pytest.mark.parametrize(
    ("trace", "size", "floor"),
    [
        (splice, 512, 48.8), (splice, 1000, 64.4), (zipf, 200, 39.5), (zipf, 2000, 63.0),
        (loop, 500, 31.6), (loop, 1200, 76.6), (web, 200, 47.6), (web, 2000, 51.0),
    ],
)  # fmt: skip
def test_no_kind_of_traffic_is_hit_less_than_today(trace, size, floor):
    assert 100 * ours(trace(), size) >= floor
