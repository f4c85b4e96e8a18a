"""Recall@10 of LoCoMo's evidence turns: by words alone, by vectors alone, fused; and what a fused recall costs.

Per question the share of its evidence among the ten recalled, averaged over all questions that have evidence.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from whisper_fast._lexical import Postings
from whisper_fast._vector import Rows, simd
from whisper_fast.lab.locomo import conversations
from whisper_fast.memory import MemoryStore
from whisper_fast.memory.terms import terms
from whisper_fast.models.embedder import StaticEmbedder

K = 10


@pytest.fixture(scope="module")
def talks(data):
    return conversations(data / "locomo") or pytest.skip(f"there are no conversations in {data / 'locomo'}")


@pytest.fixture(scope="module")
def embedder():
    return StaticEmbedder()


def by_words(talk, embedder):
    postings = Postings()
    for turn in talk.turns:
        postings.append(terms(turn["text"]))
    for question in talk.questions:
        scores = np.zeros(len(postings), np.float32)
        postings.score(terms(question.text), scores)
        yield question, np.argsort(-scores, kind="stable")[:K]


def by_vectors(talk, embedder):
    rows = Rows(embedder.dimension)
    for vector in embedder.embed([turn["text"] for turn in talk.turns]):
        rows.append(vector, 0, 0.0)
    for question, vector in zip(talk.questions, embedder.embed([q.text for q in talk.questions]), strict=True):
        yield question, [row for row, _ in rows.top_k(vector, K)]


def kernels(search):
    def measure(talks, embedder, folder):
        return [
            [q.recall(talk.turns[row]["source"] for row in found) for q, found in search(talk, embedder)]
            for talk in talks
        ]

    return measure


def through_the_store(talks, embedder, folder):
    async def measure():
        async with MemoryStore.open(folder, embedder) as memory:
            return [await of_one(memory, talk) for talk in talks]

    async def of_one(memory, talk):
        sources = dict(
            zip(await memory.add_many(talk.name, talk.turns), (t["source"] for t in talk.turns), strict=True)
        )
        found = await memory.recall_many([(talk.name, q.text) for q in talk.questions], k=K)
        return [q.recall(sources[m.id] for m in hits) for q, hits in zip(talk.questions, found, strict=True)]

    return asyncio.run(measure())


WAYS = {"BM25": kernels(by_words), "vectors": kernels(by_vectors), "fused": through_the_store}


@pytest.mark.parametrize("way", WAYS)
def test_locomo(benchmark, talks, embedder, tmp_path, way):
    shares = benchmark.pedantic(WAYS[way], (talks, embedder, tmp_path), rounds=1)
    each = [sum(share) / len(share) for share in shares]
    questions = sum(map(len, shares))
    overall = sum(map(sum, shares)) / questions
    benchmark.extra_info["recall@10"] = round(overall, 4)
    print(f"\n{way:8} recall@10 {overall:.3f} over {questions} questions; each {[round(e, 3) for e in each]}")
    if way == "fused":
        assert overall >= 0.60


def test_fused_recall_of_1000(benchmark, talks, tmp_path):
    """One question to 1,000 memories of one user through `MemoryStore.recall`, its embedding included."""
    turns = [turn for talk in talks for turn in talk.turns][:1000]
    questions = [question.text for talk in talks for question in talk.questions][:200]
    for number, turn in enumerate(turns):
        turn["source"] = str(number)

    async def ask(memory):
        for question in questions:
            await memory.recall("u", question, k=K)

    with asyncio.Runner() as runner:
        store = MemoryStore.open(tmp_path)
        memory = runner.run(store.__aenter__())
        runner.run(memory.add_many("u", turns))
        benchmark(lambda: runner.run(ask(memory)))
        runner.run(store.__aexit__(None, None, None))
    if benchmark.enabled:
        microseconds = benchmark.stats.stats.median / len(questions) * 1e6
        benchmark.extra_info["us_a_recall"] = round(microseconds, 2)
        print(f"\nfused recall over {len(turns)} memories, embedding included, {simd()}: {microseconds:.1f} us")
