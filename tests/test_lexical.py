"""BM25 over postings against the formula in plain Python."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast._lexical import Postings

TERMS = st.lists(st.sampled_from([f"t{i}" for i in range(12)]), max_size=15)


def filled(texts, **parameters):
    postings = Postings(**parameters)
    for text in texts:
        postings.append(text)
    return postings


def scores(postings, question):
    out = np.zeros(len(postings), np.float32)
    postings.score(question, out)
    return out.tolist()


def bm25(texts, removed, question, k1, b):
    live = [i for i in range(len(texts)) if i not in removed]
    mean = sum(len(texts[i]) for i in live) / len(live) if live else 0
    out = [0.0] * len(texts)
    for term in set(question):
        df = sum(term in texts[i] for i in live)
        for i in live:
            f = Counter(texts[i])[term]
            if f:
                idf = math.log(1 + (len(live) - df + 0.5) / (df + 0.5))
                out[i] += idf * f / (f + k1 * (1 - b + b * len(texts[i]) / mean))
    return out


@settings(deadline=None)
@given(
    texts=st.lists(TERMS, max_size=30),
    question=TERMS,
    removed=st.sets(st.integers(0, 29)),
    k1=st.floats(0, 3),
    b=st.floats(0, 1),
)
def test_scores_are_bm25(texts, question, removed, k1, b):
    postings = filled(texts, k1=k1, b=b)
    removed = {i for i in removed if i < len(texts)}
    for row in removed:
        postings.remove(row)
    assert scores(postings, question) == pytest.approx(bm25(texts, removed, question, k1, b), rel=1e-5, abs=1e-6)
    assert (len(postings), postings.live) == (len(texts), len(texts) - len(removed))


def test_many_terms_and_rows():
    texts = [[f"w{i * j % 5003}" for j in range(1, 12)] for i in range(2000)]
    postings = filled(texts)
    question = ["w0", "w17", "w4000", "unknown"]
    assert scores(postings, question) == pytest.approx(bm25(texts, set(), question, 0.8, 0.2), rel=1e-5)


def test_scores_are_added_to_what_is_there():
    postings = filled([["a"], ["b"]])
    out = np.array([1, 2, 3], np.float32)
    postings.score(["a"], out)
    assert out[0] > 1
    assert out.tolist()[1:] == [2, 3]


def test_a_term_counts_once_in_a_question():
    postings = filled([["a", "b"], ["b"]])
    assert scores(postings, ["a", "a"]) == scores(postings, ["a"])


def test_a_removed_row_may_be_removed_again_and_its_terms_come_back():
    postings = filled([["a"], ["b"]])
    postings.remove(0)
    postings.remove(0)
    assert scores(postings, ["a"]) == [0, 0]
    assert postings.append(["a"]) == 2
    assert scores(postings, ["a"]) == pytest.approx(bm25([["a"], ["b"], ["a"]], {0}, ["a"], 0.8, 0.2))


def test_a_term_said_a_thousand_times():
    assert scores(filled([["a"] * 1000, ["b"] * 1000]), ["a"])[0] == pytest.approx(
        math.log(2) * 255 / (255 + 0.8), rel=1e-5
    )


def test_empty_things():
    assert scores(Postings(), ["a"]) == []
    assert scores(filled([[], ["a"]]), []) == [0, 0]


def test_what_does_not_fit_is_refused():
    postings = filled([["a"]])
    for wrong in (
        lambda: Postings(k1=-1),
        lambda: Postings(k1=float("nan")),
        lambda: Postings(b=1.5),
        lambda: postings.score(["a"], np.zeros(0, np.float32)),
        lambda: postings.score(["a"], np.zeros(1, np.float64)),
    ):
        with pytest.raises(ValueError, match=r"."):
            wrong()
    with pytest.raises(TypeError):
        postings.append([["not hashable"]])
    with pytest.raises(IndexError):
        postings.remove(1)
    assert len(postings) == 1


def test_bytes_are_few():
    postings = filled([[f"w{i * j % 2503}" for j in range(1, 12)] for i in range(1000)])
    assert 1000 * 11 * 4 < postings.nbytes < 250_000
