"""Fits the weights of recall on LoCoMo and prints the leave-one-out table beside its peers.

    cd benches && python fit_recall.py [folder with the conversations]

A question's likelihood is the softmax of its scores over the turns of the conversation, at the turns that hold its
answer; the weights that maximise it, with a small ridge, are found by Newton's method. Each conversation is scored
with weights that were fitted on all others. Recall is the share of a question's evidence among the ten turns found.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import numpy as np

from whisper_fast._lexical import Postings
from whisper_fast._recall import PARTS, WEIGHTS, parts
from whisper_fast.lab.locomo import conversations
from whisper_fast.memory.embedding import pack
from whisper_fast.memory.item import as_item
from whisper_fast.memory.segment import Segment, item_terms
from whisper_fast.memory.terms import terms
from whisper_fast.models.embedder import StaticEmbedder

K = 10
RIDGE = 1e-4
STEPS = 30
DATA = Path(__file__).parents[2] / "shared" / "data" / "locomo"


class Case(NamedTuple):
    """A question: its parts, [parts, turns], and the turns that hold the answer."""

    parts: np.ndarray
    evidence: np.ndarray


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    talks = conversations(folder)
    if not talks:
        sys.exit(f"there are no conversations in {folder}; give the folder that has them")
    embedder = StaticEmbedder()
    folds = [cases_of(talk, embedder) for talk in talks]
    report("BM25 alone", [by_words(talk) for talk in talks])
    report("vectors alone", [by_vectors(talk, embedder) for talk in talks])
    report("Chroma, the same embedder", [by_chroma(talk, embedder) for talk in talks] if chroma() else None)
    report("WEIGHTS as they stand", [[found(case, np.array(WEIGHTS)) for case in fold] for fold in folds])
    fitted = [fit([case for other in folds if other is not fold for case in other]) for fold in folds]
    report("left out", [[found(case, w) for case in fold] for fold, w in zip(folds, fitted, strict=True)])
    for part, mean, each in zip(PARTS, np.mean(fitted, 0), np.transpose(fitted), strict=True):
        print(f"  {part:9} {mean:7.2f}   each {np.round(each, 2).tolist()}")


def cases_of(talk, embedder):
    segment, place = segment_of(talk, embedder)
    vectors = embedder.embed([question.text for question in talk.questions])
    cases = []
    for question, vector in zip(talk.questions, vectors, strict=True):
        out = np.zeros((len(PARTS), segment.rows), np.float32)
        parts(segment.question(question.text, vector, K, "dm"), out)
        cases.append(Case(out.astype(np.float64), np.array(sorted(place[turn] for turn in question.evidence))))
    return cases


def segment_of(talk, embedder):
    segment, items = Segment(embedder.dimension), [as_item(turn) for turn in talk.turns]
    vectors = pack(embedder.embed([item.text for item in items]))
    for number, (item, vector) in enumerate(zip(items, vectors, strict=True), 1):
        segment.append(number, item, vector, item_terms(item))
    return segment, {turn["source"]: row for row, turn in enumerate(talk.turns)}


def fit(cases):
    """Return the weights of the greatest likelihood."""
    weights = np.zeros(len(PARTS))
    for _ in range(STEPS):
        slope, bend = -2 * RIDGE * weights, -2 * RIDGE * np.eye(len(PARTS))
        for case in cases:
            score = weights @ case.parts
            share = np.exp(score - score.max())
            share /= share.sum()
            mean = case.parts @ share
            slope += (case.parts[:, case.evidence].mean(axis=1) - mean) / len(cases)
            bend -= ((case.parts * share) @ case.parts.T - np.outer(mean, mean)) / len(cases)
        step = np.linalg.solve(bend, slope)
        weights -= step * min(1.0, 5.0 / np.abs(step).max())
        if np.abs(step).max() < 1e-6:
            break
    return weights


def found(case, weights):
    return share(case.evidence, best(weights @ case.parts))


def best(scores):
    return np.argsort(-scores, kind="stable")[:K]


def share(evidence, rows):
    return float(np.isin(evidence, rows).mean())


def shares(talk, ranked):
    place = {turn["source"]: row for row, turn in enumerate(talk.turns)}
    return [
        share([place[turn] for turn in question.evidence], rows)
        for question, rows in zip(talk.questions, ranked, strict=True)
    ]


def by_words(talk):
    postings, ranked = Postings(), []
    for turn in talk.turns:
        postings.append(terms(turn["text"]))
    for question in talk.questions:
        scores = np.zeros(len(postings), np.float32)
        postings.score(terms(question.text), scores)
        ranked.append(best(scores))
    return shares(talk, ranked)


def by_vectors(talk, embedder):
    held = embedder.embed([turn["text"] for turn in talk.turns])
    return shares(talk, [best(held @ vector) for vector in embedder.embed([q.text for q in talk.questions])])


def chroma():
    try:
        import chromadb
    except ImportError:
        print("chromadb is not installed: pip install 'whisper-fast[chroma]'")
        return None
    return chromadb


def by_chroma(talk, embedder):
    from chromadb.config import Settings

    client = chroma().PersistentClient(mkdtemp(), Settings(anonymized_telemetry=False))
    held = client.create_collection("turns", metadata={"hnsw:space": "cosine"})
    held.add(
        ids=[str(row) for row in range(len(talk.turns))],
        embeddings=embedder.embed([turn["text"] for turn in talk.turns]),
    )
    asked = embedder.embed([question.text for question in talk.questions])
    answers = held.query(query_embeddings=asked, n_results=K, include=["distances"])
    return shares(talk, [[int(row) for row in ids] for ids in answers["ids"]])


def report(name, each):
    if each is not None:
        overall = np.mean([value for fold in each for value in fold])
        print(f"{name:26} recall@{K} {overall:.4f}   each {[round(float(np.mean(fold)), 3) for fold in each]}")


if __name__ == "__main__":
    main()
