"""The scan of int8 rows against numpy, every path against every other bit for bit."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast._vector import Rows, paths, simd

DIMENSIONS = [1, 3, 31, 64, 65, 128, 384]


def vectors(seed, count, dimension):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def filled(data, scopes=None, times=None, previous=None):
    rows = Rows(data.shape[1])
    for i, vector in enumerate(data):
        rows.append(
            vector,
            scopes[i] if scopes is not None else 0,
            times[i] if times is not None else float(i),
            previous[i] if previous is not None else -1,
        )
    return rows


def quantised(data):
    """Plain numpy: unit length, then symmetric int8."""
    data = data.astype(np.float64)
    largest = np.abs(data).max(axis=1, keepdims=True)
    safe = np.where(largest == 0, 1, largest)
    packed = np.rint(data * (127 / safe)).astype(np.int8)
    norms = np.sqrt((data**2).sum(axis=1, keepdims=True))
    scale = np.where(largest == 0, 0, safe / (127 * np.where(norms == 0, 1, norms)))
    return packed, scale[:, 0]


def cosines(data, query):
    packed, scale = quantised(data)
    q, q_scale = quantised(query[None])
    return (packed.astype(np.int64) @ q[0].astype(np.int64)) * scale * q_scale[0]


def best(scores, visible, k):
    order = sorted((i for i in range(len(scores)) if visible[i]), key=lambda i: (-np.float32(scores[i]), i))
    return order[:k]


def test_the_path_in_use_is_the_first_of_those_that_run():
    assert simd() == paths()[0]
    assert paths()[-1] == "scalar"
    assert set(paths()) <= {"avx512vnni", "avx2", "neon", "scalar"}


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_scores_are_those_of_numpy(dimension):
    data, query = vectors(1, 300, dimension), vectors(2, 1, dimension)[0]
    found = dict(filled(data).top_k(query, 300))
    assert [found[i] for i in range(300)] == pytest.approx(cosines(data, query).tolist(), abs=1e-6)
    true = (data @ query) / np.linalg.norm(data, axis=1) / np.linalg.norm(query)
    assert [found[i] for i in range(300)] == pytest.approx(true.tolist(), abs=0.02)


@pytest.mark.parametrize("path", paths())
@given(
    data=st.lists(st.lists(st.integers(-127, 127), min_size=70, max_size=70), min_size=1, max_size=9),
    query=st.lists(st.integers(-127, 127), min_size=70, max_size=70),
)
def test_every_path_gives_the_same_bits(path, data, query):
    rows = Rows(70)
    for values in data:
        rows.append_packed(np.array(values, np.int8).tobytes(), 0.5, 0, 0.0)
    q = np.array(query, np.float32)
    assert rows.top_k(q, 9, path=path) == rows.top_k(q, 9, path="scalar")


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values_do_not_overflow(path, sign):
    rows = Rows(65_536)
    rows.append_packed(bytes([127]) * 65_536, 1.0, 0, 0.0)
    query = np.full(65_536, sign, np.float32)
    [(_, score)] = rows.top_k(query, 1, path=path)
    assert score == pytest.approx(sign * 127 * 256, rel=1e-6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    count=st.integers(0, 600),
    k=st.integers(0, 700),
    span=st.tuples(st.integers(0, 600), st.integers(0, 600)),
    allowed=st.lists(st.booleans(), max_size=4),
)
def test_filters_come_before_the_top_k(seed, count, k, span, allowed):
    data, query = vectors(seed, count, 16), vectors(seed + 1, 1, 16)[0]
    scopes = np.random.default_rng(seed).integers(0, 4, count)
    rows = filled(data, scopes)
    for row in range(0, count, 7):
        rows.remove(row)
    visible = [
        i % 7 != 0 and scopes[i] < len(allowed) and allowed[scopes[i]] and span[0] <= i <= span[1]
        for i in range(count)
    ]
    found = rows.top_k(query, k, allowed=bytes(allowed), since=span[0], until=span[1])
    scores = dict(filled(data).top_k(query, count))
    assert [row for row, _ in found] == best([scores[i] for i in range(count)], visible, k)


def test_equal_scores_come_in_the_order_of_rows():
    rows = filled(np.ones((500, 8), np.float32))
    assert [row for row, _ in rows.top_k(np.ones(8, np.float32), 5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad):
    rows, vector = filled(vectors(0, 2, 8)), np.ones(8, np.float32)
    vector[5] = bad
    with pytest.raises(ValueError, match="not finite"):
        rows.append(vector, 0, 0.0)
    with pytest.raises(ValueError, match="not finite"):
        rows.top_k(vector, 1)
    assert len(rows) == 2


def test_zero_vectors_match_nothing_and_break_nothing():
    rows = filled(np.zeros((3, 8), np.float32))
    assert rows.top_k(np.ones(8, np.float32), 3) == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert filled(vectors(0, 3, 8)).top_k(np.zeros(8, np.float32), 1) == [(0, 0.0)]


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e38, 3.4e38])
def test_the_length_of_a_vector_does_not_matter(size):
    [(_, score)] = filled(np.full((1, 8), size, np.float32)).top_k(np.full(8, size, np.float32), 1)
    assert score == pytest.approx(1, abs=1e-6)


def test_what_does_not_fit_is_refused():
    rows = filled(vectors(0, 2, 8))
    good = np.ones(8, np.float32)
    for wrong in (
        lambda: Rows(0),
        lambda: Rows(65_537),
        lambda: rows.append(np.ones(9, np.float32), 0, 0.0),
        lambda: rows.append(np.ones(8, np.float64), 0, 0.0),
        lambda: rows.append(good, -1, 0.0),
        lambda: rows.append(good, 2**32 - 1, 0.0),
        lambda: rows.append(good, 0, float("nan")),
        lambda: rows.append(good, 0, 0.0, 2),
        lambda: rows.append(good, 0, 0.0, -2),
        lambda: rows.append_packed(b"\x80" + bytes(7), 1.0, 0, 0.0),
        lambda: rows.append_packed(bytes(7), 1.0, 0, 0.0),
        lambda: rows.append_packed(bytes(8), float("nan"), 0, 0.0),
        lambda: rows.top_k(good, -1),
        lambda: rows.top_k(good, 1, path="sse9"),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()
    for row in (-1, 2):
        with pytest.raises(IndexError):
            rows.remove(row)
        with pytest.raises(IndexError):
            rows.packed(row)
    assert len(rows) == rows.live == 2


def test_packed_rows_go_out_and_in_unchanged():
    data, query = vectors(3, 50, 33), vectors(4, 1, 33)[0]
    first, second = filled(data), Rows(33)
    for i in range(50):
        second.append_packed(*first.packed(i), 0, float(i))
    assert second.top_k(query, 50) == first.top_k(query, 50)
    packed, scale = quantised(data)
    assert [first.packed(i)[0] for i in range(50)] == [row.tobytes() for row in packed]
    assert [first.packed(i)[1] for i in range(50)] == pytest.approx(scale.tolist(), rel=1e-6)


def test_length_live_and_bytes():
    rows = Rows(128)
    empty = rows.nbytes
    assert (len(rows), rows.live, rows.dimension) == (0, 0, 128)
    assert rows.top_k(np.ones(128, np.float32), 5) == []
    for vector in vectors(0, 1000, 128):
        rows.append(vector, 0, 0.0)
    rows.remove(3)
    rows.remove(3)
    assert (len(rows), rows.live) == (1000, 999)
    assert 1000 * 128 < rows.nbytes - empty < 1.6 * 1000 * (128 + 20)


def test_questions_go_on_while_rows_are_appended():
    data = vectors(5, 12_000, 128)
    rows, query = filled(data[:9_000]), data[0]
    wrong, done = [], threading.Event()

    def ask():
        while not done.is_set():
            if rows.top_k(query, 1)[0][0] != 0:
                wrong.append(len(rows))

    thread = threading.Thread(target=ask)
    thread.start()
    for vector in data[9_000:]:
        rows.append(vector, 0, 0.0)
    done.set()
    thread.join()
    assert not wrong


LEAK = """
import psutil, numpy as np
from whisper_fast._vector import Rows
def use():
    rows = Rows(128)
    for i in range(300):
        rows.append(np.ones(128, np.float32), 0, 0.0)
        rows.top_k(np.ones(128, np.float32), 10)
        try:
            rows.top_k(np.full(128, np.nan, np.float32), 1)
        except ValueError:
            pass
for _ in range(20):
    use()
before = psutil.Process().memory_info().rss
for _ in range(200):
    use()
print(psutil.Process().memory_info().rss - before)
"""


def test_nothing_leaks():
    grown = int(subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True, check=True).stdout)
    assert grown < 2 << 20
