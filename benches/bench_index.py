"""Where hnswlib begins to win: real lines of chat, embedded, searched exactly and through the index, side by side.

Prints for each size the time of a bare search of both (ten nearest, and hnswlib's share of the exact ten, by score,
at the breadth that the package uses and at narrower ones), then the time of a whole recall, words and neighbours
included, exact and with the index, and the share of the exact ten that it keeps. `ANN_ROWS` of memory/store.py is set
by it.
"""

from __future__ import annotations

import gzip
import re
from itertools import pairwise
from statistics import median
from time import perf_counter

import numpy as np
import pytest

from whisper_fast._vector import Rows, simd
from whisper_fast.memory import index as rooms
from whisper_fast.memory.embedding import pack
from whisper_fast.memory.index import Content, Index
from whisper_fast.memory.item import as_item
from whisper_fast.memory.segment import Segment, item_terms
from whisper_fast.models.embedder import StaticEmbedder

SIZES = [50_000, 100_000, 200_000]
QUESTIONS, K = 200, 10
LINE = re.compile(r"^\[\d\d:\d\d\] <[^>]+> (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def said(data):
    """Lines of the channel and pairs of neighbouring ones, each once, in an order of chance, with their vectors."""
    pytest.importorskip("hnswlib", reason="hnswlib is not installed (pip install 'whisper-fast[hnsw]')")
    path = data / "irc" / "ubuntu_irc_days.txt.gz"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    lines = LINE.findall(gzip.decompress(path.read_bytes()).decode())
    texts = list(dict.fromkeys([*lines, *(f"{one} {two}" for one, two in pairwise(lines))]))
    np.random.default_rng(0).shuffle(texts)
    vectors = StaticEmbedder().embed(texts)
    pointing = np.flatnonzero(vectors.any(axis=1))[: max(SIZES) + QUESTIONS]
    return [texts[i] for i in pointing], vectors[pointing]


def microseconds(ask, questions):
    times = []
    for question in questions:
        since = perf_counter()
        ask(question)
        times.append(perf_counter() - since)
    return median(times) * 1e6


def content_of(vectors):
    packed = pack(vectors)
    values = np.frombuffer(b"".join(vector.packed for vector in packed), np.int8).reshape(vectors.shape)
    scale = np.array([vector.scale for vector in packed], np.float32)
    return packed, Content("bench", np.arange(1, len(packed) + 1), values, scale)


def share(rows, content, index, questions):
    """The share of hnswlib's ten whose exact score is at least that of the exact tenth: equal texts are equal."""
    kept = []
    for question in questions:
        tenth = rows.top_k(question, K)[-1][1]
        ids, _ = index.search(question, K)
        kept.append(np.mean(content.vectors(ids - 1) @ question >= tenth - 1e-3))
    return np.mean(kept)


@pytest.mark.parametrize("size", SIZES)
def test_crossing(benchmark, said, size):
    if not benchmark.enabled:
        pytest.skip("takes minutes: make bench ARGS=bench_index.py")
    texts, vectors = said
    packed, content = content_of(vectors[:size])
    rows, segment = Rows(vectors.shape[1]), Segment(vectors.shape[1])
    for number, (text, vector) in enumerate(zip(texts, packed, strict=False), 1):
        rows.append_packed(vector.packed, vector.scale, 0, 0.0)
        item = as_item({"text": text, "at": float(number), "session": str(number // 20)})
        segment.append(number, item, vector, item_terms(item))
    since = perf_counter()
    index = benchmark.pedantic(Index.built, (content,), rounds=1)
    print(f"\n{size} memories, {simd()}: index built in {perf_counter() - since:.0f} s, {index.nbytes >> 20} MiB")
    asked, words = vectors[-QUESTIONS:], texts[-QUESTIONS:]
    exact = microseconds(lambda question: rows.top_k(question, K), asked)
    for breadth in (50, 100, 200, rooms.BREADTH):
        index._graph.set_ef(breadth)
        through = microseconds(lambda question: index.search(question, K), asked)
        line(f"search, breadth {breadth:3}", exact, through, share(rows, content, index, asked))
    whole = list(zip(words, asked, strict=True))
    exact = microseconds(lambda question: segment.recall(*question, K, "dm"), whole)
    through = microseconds(lambda question: segment.recall_near(*question, K, "dm", index), whole)
    line("whole recall", exact, through, np.mean([agreement(segment, index, *question) for question in whole]))


def line(what, exact, through, found):
    print(f"  {what:19} exact {exact:6.0f} us  hnswlib {through:6.0f} us  x{exact / through:4.2f}  found {found:.3f}")


def agreement(segment, index, text, vector):
    exact = {found.id for found in segment.recall(text, vector, K, "dm")}
    return len(exact & {found.id for found in segment.recall_near(text, vector, K, "dm", index) or ()}) / K
