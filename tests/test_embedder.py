"""The static embedder and its tokeniser: exact tokens, unit rows, one answer whatever the batch."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_fast._embed import TokenSums
from whisper_fast.errors import StoreCorrupt
from whisper_fast.models import wordpiece
from whisper_fast.models.embedder import Embedder, StaticEmbedder
from whisper_fast.models.table import TokenTable
from whisper_fast.models.wordpiece import WordPiece

# [text, ids] as the tokenizers library gives them for the model's own tokenizer.json, without special tokens.
GOLDEN = json.loads((Path(__file__).parent / "wordpiece_golden.json").read_text())
TEXTS = st.lists(st.text(max_size=60) | st.sampled_from([text for text, _ in GOLDEN]), max_size=8)


@pytest.fixture(scope="module")
def embedder():
    return StaticEmbedder()


@pytest.fixture(scope="module")
def table():
    return TokenTable.shipped()


@pytest.fixture(scope="module")
def tokens(table):
    return WordPiece(table.vocabulary, table.vocabulary.index("[UNK]"))


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_tokens_are_those_of_the_tokenizers_library(tokens, text, ids):
    assert tokens.ids(text) == ids
    assert tokens.ids(text) == ids, "remembered words give the same"


def test_control_tokens_in_a_text_are_text(tokens, table):
    pieces = [table.vocabulary[i] for i in tokens.ids("[CLS]")]
    assert pieces == ["[", "cl", "##s", "]"]


def test_a_lone_surrogate_is_removed(tokens):
    assert tokens.ids("he\ud800llo") == tokens.ids("hello")


def test_what_is_remembered_is_bounded(table, monkeypatch):
    monkeypatch.setattr(wordpiece, "REMEMBERED", 10)
    tokens = WordPiece(table.vocabulary, 100)
    first = [tokens.ids(f"word{i}") for i in range(100)]
    assert first == [tokens.ids(f"word{i}") for i in range(100)]
    tokens.ids("long" * 20)
    assert len(tokens._seen) <= 10


def test_it_is_an_embedder(embedder):
    assert isinstance(embedder, Embedder)
    assert embedder.name.startswith(f"minilm-l6-static-{embedder.dimension}-")
    assert StaticEmbedder().name == embedder.name


@given(TEXTS)
def test_rows_are_unit_and_the_batch_changes_no_bit(embedder, texts):
    rows = embedder.embed(texts)
    assert rows.shape == (len(texts), embedder.dimension)
    assert rows.dtype == np.float32
    for text, row in zip(texts, rows, strict=True):
        assert np.array_equal(embedder.embed([text])[0], row)
        assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5) or not row.any()


@pytest.mark.parametrize("text", ["", " \n", "\x00", "\ud800", "🦄🦄", "x" * 101])
def test_a_text_that_says_nothing_has_a_zero_row(embedder, text):
    assert not embedder.embed([text, "hello"])[0].any()


def test_a_row_is_the_weighted_sum_of_its_tokens(embedder, tokens, table):
    text = "We adopted a puppy, she is unaffable!"
    ids = tokens.ids(text)
    expected = sum(float(table.weight[i] * table.scale[i]) * table.row[i].astype(np.float64) for i in ids)
    assert embedder.embed([text])[0] == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("near", "word", "far"),
    [("puppy", "dog", "tax"), ("happy", "glad", "concrete"), ("guitar", "violin", "passport")],
)
def test_neighbours_make_sense(embedder, near, word, far):
    a, b, c = embedder.embed([near, word, far])
    assert a @ b > a @ c + 0.2
    a, b, c = embedder.embed(
        [f"I bought a {near} today", f"They talk about the {word}", f"They talk about the {far}"]
    )
    assert a @ b > a @ c


def test_frequent_words_say_little(embedder):
    bare, full = embedder.embed(["hiking mountains", "the hiking of the mountains, and a"])
    assert bare @ full > 0.9


def test_a_long_text_counts_by_its_beginning(embedder):
    beginning = ("garden " * 2000)[:4096]
    whole, cut = embedder.embed([beginning + "tax " * 20_000, beginning])
    assert np.array_equal(whole, cut)


@given(st.data())
def test_sums_are_those_of_numpy(data):
    n, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = random.integers(-127, 128, (n, d), np.int8)
    factors = random.integers(-8, 9, n).astype(np.float32) / 8  # so that no sum is rounded
    texts = data.draw(st.lists(st.lists(st.integers(0, n - 1), max_size=2000), max_size=5))
    out = np.full((len(texts), d), np.nan, np.float32)
    TokenSums(rows, factors).sum_into(out, texts)
    for row, ids in zip(out, texts, strict=True):
        expected = np.zeros(d, np.float32)
        for i in ids:
            expected += factors[i] * rows[i].astype(np.float32)
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize(
    ("error", "out", "texts"),
    [
        (IndexError, (1, 3), [[2]]),
        (IndexError, (1, 3), [[-1]]),
        (ValueError, (2, 3), [[0]]),
        (ValueError, (1, 4), [[0]]),
        (TypeError, (1, 3), ["ab"]),
        (TypeError, (1, 3), [["a"]]),
        (OverflowError, (1, 3), [[1 << 40]]),
    ],
)
def test_sums_refuse_what_is_not_there(error, out, texts):
    sums = TokenSums(np.ones((2, 3), np.int8), np.ones(2, np.float32))
    with pytest.raises(error):
        sums.sum_into(np.zeros(out, np.float32), texts)


def test_sums_refuse_factors_that_do_not_fit():
    with pytest.raises(ValueError, match=r"3 factors do not fit rows of shape \(2, 3\)"):
        TokenSums(np.ones((2, 3), np.int8), np.ones(3, np.float32))


def test_threads_get_the_same_rows(table):
    embedder = StaticEmbedder(table)
    texts = [text for text, _ in GOLDEN]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: embedder.embed(texts), range(64)))
    assert all(np.array_equal(results[0], other) for other in results)


def test_the_shipped_file_is_whole_and_small(table):
    raw = (files("whisper_fast.models") / "data" / "tokens.bin").read_bytes()
    assert len(raw) <= 8 << 20
    assert table.to_bytes() == raw
    assert len(table.vocabulary) == len(table.row) == len(table.scale) == len(table.weight) == 30522


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-1], "damaged"),
        (lambda raw: raw[:5000] + b"!!!!" + raw[5004:], "damaged"),
        (lambda raw: raw[:20], "damaged"),
        (lambda raw: b"", "no token table"),
        (lambda raw: b"PK\x03\x04" + raw, "no token table"),
    ],
)
def test_a_damaged_table_is_refused(table, damage, words):
    with pytest.raises(StoreCorrupt, match=f"some file is {words}"):
        TokenTable.parse(damage(table.to_bytes()), "some file")
