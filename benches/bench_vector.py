"""The ten nearest of one user's rows at 384 dimensions: ours on every path beside numpy, faiss and hnswlib."""

from __future__ import annotations

import numpy as np
import pytest

from whisper_fast._vector import Rows, paths

DIMENSION, K = 384, 10
SIZES = [1_000, 5_000, 20_000]


@pytest.fixture(scope="module", params=SIZES)
def data(request):
    rows = np.random.default_rng(0).normal(size=(request.param, DIMENSION)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def filled(data):
    rows = Rows(data.shape[1])
    for number, vector in enumerate(data):
        rows.append(vector, 0, float(number), number - 1)
    return rows


def report(benchmark, data):
    if benchmark.enabled:
        print(f"\n{benchmark.name}: {len(data)} rows, {benchmark.stats.stats.median * 1e6:.1f} us")


@pytest.mark.parametrize("path", paths())
def test_ours(benchmark, data, path):
    rows = filled(data)
    assert len(benchmark(rows.top_k, data[7], K, path=path)) == K
    report(benchmark, data)


def test_numpy(benchmark, data):
    def nearest(query):
        scores = data @ query
        best = np.argpartition(scores, -K)[-K:]
        return best[np.argsort(-scores[best])]

    assert benchmark(nearest, data[7])[0] == 7
    report(benchmark, data)


def test_faiss_flat(benchmark, data):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(data)
    assert benchmark(index.search, data[7:8], K)[1][0, 0] == 7
    report(benchmark, data)


def test_hnswlib(benchmark, data):
    hnswlib = pytest.importorskip("hnswlib")
    index = hnswlib.Index(space="cosine", dim=DIMENSION)
    index.init_index(max_elements=len(data))
    index.add_items(data)
    assert benchmark(index.knn_query, data[7:8], k=K)[0][0, 0] == 7
    report(benchmark, data)
