"""Recall in plain Python and numpy, as the docstring of `pyx/_recall.pyx` says it: slow, and easy to read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from whisper_fast._lexical import Postings
from whisper_fast._recall import PARTS, Question, Words
from whisper_fast._vector import Rows

FALL = (1.0, 0.6, 0.4, 0.3)
NO_WORD = 65_535


@dataclass
class Turn:
    terms: list[tuple[str, int]]
    vector: np.ndarray
    scope: int = 0
    at: float = 0.0
    previous: int = -1
    speaker: int = 0
    asks: bool = False
    removed: bool = False


@dataclass
class Asking:
    terms: list[tuple[str, int]]
    vector: np.ndarray | None = None
    allowed: bytes = b"\1\1\1"
    how: dict = field(default_factory=dict)


def words_of(vectors):
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scale = (np.abs(vectors).max(axis=1) / 127).astype(np.float32)
    return Words(np.rint(vectors / scale[:, None]).astype(np.int8), scale), vectors


def segment_of(turns, dimension):
    rows, postings = Rows(dimension), Postings()
    for turn in turns:
        rows.append(turn.vector, turn.scope, turn.at, turn.previous, turn.speaker, turn.asks)
        postings.append([term for term, _ in turn.terms], [word for _, word in turn.terms])
    for row, turn in enumerate(turns):
        if turn.removed:
            rows.remove(row)
            postings.remove(row)
    return rows, postings


def question_of(segment, words, asking, k=10, **how):
    terms, numbers = [term for term, _ in asking.terms], [word for _, word in asking.terms]
    how = {**asking.how, **how}
    if how.get("only") is not None:
        how["only"] = np.array(how["only"], np.uint32)
    return Question(*segment, words, terms, numbers, asking.vector, k, asking.allowed, **how)


class Oracle:
    def __init__(self, turns, vectors, asking):
        self.turns, self.vectors, self.asking = turns, vectors, asking
        self.terms = dict(asking.terms)
        self.seen = [i for i, turn in enumerate(turns) if self.visible(turn)]
        self.before, self.session = {}, {}
        for i, turn in enumerate(turns):
            self.session[i] = i if turn.previous < 0 else self.session[turn.previous]
            up = turn.previous
            while up >= 0 and up not in self.seen:
                up = turns[up].previous
            self.before[i] = up
        self.after = {self.before[i]: i for i in self.seen}
        self.idf = {term: self.idf_of(term) for term in self.terms}
        self.total = sum(self.idf.values())

    def visible(self, turn):
        how, scopes = self.asking.how, self.asking.allowed
        told = turn.scope < len(scopes) and scopes[turn.scope] and not turn.removed
        return bool(told and how.get("since", -math.inf) <= turn.at <= how.get("until", math.inf))

    def held(self, i):
        return {term for term, _ in self.turns[i].terms}

    def idf_of(self, term):
        return idf(len(self.seen), sum(term in self.held(i) for i in self.seen))

    def matches(self, term, i):
        """The best match of a term among those of a turn."""
        best = 0.0
        for other, number in self.words_of_segment().items():
            if other not in self.held(i):
                continue
            if other == term:
                return 1.0
            if max(number, self.terms[term]) < len(self.vectors):
                cosine = float(self.vectors[number] @ self.vectors[self.terms[term]])
                best = max(best, min(1.0, (cosine - 0.3) / 0.7))
        return best

    def words_of_segment(self):
        """A term's word is the one it came with first."""
        return {term: number for turn in reversed(self.turns) for term, number in reversed(turn.terms)}

    def around(self, i):
        """The turns near by: (k, row)."""
        yield 0, i
        for chain in (self.before, self.after):
            near = i
            for k in range(1, len(FALL)):
                near = chain.get(near, -1)
                if near < 0:
                    break
                yield k, near

    def own(self, i):
        return sum(self.idf[t] * self.matches(t, i) for t in self.terms) / self.total if self.terms else 0.0

    def coverage(self, i):
        near = list(self.around(i))
        best = {t: max(FALL[k] * self.matches(t, j) for k, j in near) for t in self.terms}
        return sum(self.idf[t] * best[t] for t in self.terms) / self.total if self.terms else 0.0

    def sessions(self):
        texts = {}
        for i in self.seen:
            texts.setdefault(self.session[i], []).extend(term for term, _ in self.turns[i].terms)
        return {session: text for session, text in texts.items() if text}

    def session_score(self, i):
        texts = self.sessions()
        text = texts.get(self.session[i])
        if not text or not self.terms:
            return 0.0
        mean, score = sum(map(len, texts.values())) / len(texts), 0.0
        for term in self.terms:
            often = text.count(term)
            rarity = idf(len(texts), sum(term in other for other in texts.values()))
            score += rarity * often / (often + 1.2 * (0.5 + 0.5 * len(text) / mean))
        return score / self.total

    def from_mean(self, vector):
        live = [unit(turn.vector) for turn in self.turns if not turn.removed]
        return vector - np.mean(live, axis=0)

    def blurred(self):
        """Whether something lies so close to the mean that int8 decides what direction it has."""
        if not self.directed() or not self.seen:
            return False
        compared = [self.asking.vector, *(unit(self.turns[i].vector) for i in self.seen)]
        return any(0.05 < np.linalg.norm(self.from_mean(vector)) < 0.2 for vector in compared)

    def directed(self):
        return self.asking.vector is not None and self.asking.vector.any()

    def cosine(self, i):
        if not self.directed() or i not in self.asking.how.get("only", [i]):
            return 0.0
        row, asked = self.from_mean(unit(self.turns[i].vector)), self.from_mean(self.asking.vector)
        if not self.turns[i].vector.any() or min(np.linalg.norm(row), np.linalg.norm(asked)) < 0.1:
            return 0.0
        return float(row @ asked / np.linalg.norm(row) / np.linalg.norm(asked))

    def parts(self, i):
        turn, how, up = self.turns[i], self.asking.how, self.before[i]
        cosines = [(FALL[k], self.cosine(j)) for k, j in self.around(i) if k]
        age = max(0.0, how.get("now", 0.0) - turn.at)
        half_life, speaker = how.get("half_life", 0.0), how.get("speaker", -1)
        return {
            "coverage": self.coverage(i),
            "session": self.session_score(i),
            "cosine": self.cosine(i),
            "around": sum(fall * cosine for fall, cosine in cosines),
            "reply": self.own(up) if up >= 0 and self.turns[up].asks else 0.0,
            "date": named(how, turn.at),
            "speaker": 0.0 if speaker < 0 else 1.0 if turn.speaker == speaker else -1.0,
            "question": float(turn.asks),
            "recency": 2.0 ** -(age / half_life) if half_life else 0.0,
        }

    def table(self):
        """[parts, visible rows]"""
        return np.array([[self.parts(i)[part] for i in self.seen] for part in PARTS]).reshape(len(PARTS), -1)


def idf(all_of_them, holding):
    return math.log(1 + (all_of_them - holding + 0.5) / (holding + 0.5))


def unit(vector):
    """A vector as its row holds it: of unit length, in 127 steps."""
    vector = vector.astype(np.float64)
    largest = np.abs(vector).max()
    return np.rint(vector * (127 / largest)) * (largest / 127) / np.linalg.norm(vector) if largest else vector


def named(how, at):
    day = datetime.fromtimestamp(at, UTC)
    if not how.get("months", 0) >> day.month & 1:
        return 0.0
    return 3.0 if how.get("days", 0) >> day.day & 1 else 1.0
