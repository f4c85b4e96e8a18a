"""The recall kernel against its formula in plain Python."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recall_oracle import NO_WORD, Asking, Oracle, Turn, question_of, segment_of, words_of

from whisper_fast._lexical import Postings
from whisper_fast._recall import PARTS, WEIGHTS, Question, Words, parts, recall
from whisper_fast._vector import Rows, paths

DIMENSION, WORDS = 16, 12
YEAR = 366 * 86_400.0
RNG = np.random.default_rng(7)
TOPICS = RNG.normal(size=(3, DIMENSION))
TABLE, VECTORS = words_of(TOPICS[np.arange(WORDS) % 3] + 0.8 * RNG.normal(size=(WORDS, DIMENSION)))
TERMS = st.sampled_from([(f"w{number}", number) for number in range(WORDS)] + [("x", NO_WORD), ("y", NO_WORD)])


def vectors(seed):
    vector = np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector) if seed % 11 else np.zeros(DIMENSION, np.float32)


@st.composite
def segments(draw):
    """Turns in several sessions at once, each session in a scope of its own."""
    turns, last = [], {}
    for row in range(draw(st.integers(0, 14))):
        session = draw(st.integers(0, 4))
        turns.append(
            Turn(
                terms=draw(st.lists(TERMS, max_size=5)),
                vector=vectors(draw(st.integers(0, 99))),
                scope=session % 3,
                at=draw(st.floats(0, YEAR)),
                previous=last.get(session, -1),
                speaker=draw(st.integers(0, 2)),
                asks=draw(st.booleans()),
                removed=draw(st.integers(0, 5)) == 0,
            )
        )
        last[session] = row
    return turns


HOW = st.fixed_dictionaries(
    {},
    optional={
        "since": st.floats(0, YEAR / 2),
        "until": st.floats(YEAR / 2, YEAR),
        "months": st.integers(0, (1 << 13) - 1),
        "days": st.integers(0, (1 << 32) - 1),
        "speaker": st.integers(-1, 2),
        "now": st.floats(0, YEAR),
        "half_life": st.sampled_from([0.0, 3600.0, 1e6]),
        "only": st.lists(st.integers(0, 20), max_size=6),
    },
)
ASKED = st.builds(
    Asking,
    terms=st.lists(TERMS, max_size=6),
    vector=st.one_of(st.none(), st.integers(0, 99).map(vectors)),
    allowed=st.lists(st.booleans(), max_size=3).map(bytes),
    how=HOW,
)


def table_of(segment, asking, path=None, words=TABLE):
    out = np.full((len(PARTS), len(segment[0])), np.nan, np.float32)
    parts(question_of(segment, words, asking, path=path), out)
    return out


@settings(deadline=None, max_examples=300)
@given(turns=segments(), asking=ASKED, k=st.integers(0, 20))
def test_parts_and_order_are_those_of_the_formula(turns, asking, k):
    segment, oracle = segment_of(turns, DIMENSION), Oracle(turns, VECTORS, asking)
    assume(not oracle.blurred())
    ours, expected = table_of(segment, asking)[:, oracle.seen], oracle.table()
    near = {"coverage": 0.01, "session": 1e-5, "cosine": 0.03, "around": 0.08, "reply": 0.01}  # what int8 takes
    for part, got, wanted in zip(PARTS, ours, expected, strict=True):
        assert got == pytest.approx(wanted, abs=near.get(part, 1e-6)), part
    weights = tuple(range(1, len(PARTS) + 1))
    scores = dict(zip(oracle.seen, np.array(weights, np.float32) @ ours, strict=True))
    [found] = recall([question_of(segment, TABLE, asking, k, weights=weights)])
    assert len(found) == min(k, len(oracle.seen))
    assert [score for _, score in found] == pytest.approx(sorted(scores.values(), reverse=True)[:k], abs=1e-4)
    assert all(score == pytest.approx(scores[row], abs=1e-4) for row, score in found)
    assert found == sorted(found, key=lambda hit: (-hit[1], hit[0]))


@pytest.mark.parametrize("path", paths())
@settings(deadline=None, max_examples=50)
@given(turns=segments(), asking=ASKED)
def test_every_path_gives_the_same_bits(path, turns, asking):
    segment = segment_of(turns, DIMENSION)
    assert (table_of(segment, asking, path) == table_of(segment, asking, "scalar")).all()


@settings(deadline=None, max_examples=100)
@given(turns=segments(), asking=ASKED, other=st.lists(TERMS, max_size=5))
def test_words_of_rows_that_may_not_be_seen_change_nothing(turns, asking, other):
    """Only the mean of the vectors is of all rows: what was said elsewhere in words has no influence."""
    seen = Oracle(turns, VECTORS, asking).seen
    others = [
        turn if row in seen else replace(turn, terms=other, speaker=1, asks=not turn.asks)
        for row, turn in enumerate(turns)
    ]
    before = table_of(segment_of(turns, DIMENSION), asking)[:, seen]
    after = table_of(segment_of(others, DIMENSION), asking)[:, seen]
    assert after == pytest.approx(before, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(turns=segments(), asking=ASKED)
def test_what_words_are_kindred_to_is_found_anew_or_remembered_with_the_same_bits(turns, asking):
    segment, fresh = segment_of(turns, DIMENSION), words_of(VECTORS)[0]
    tables = [table_of(segment, asking, words=fresh) for _ in range(5)]  # two words a question are looked up
    assert all((table == tables[0]).all() for table in tables)


def many(count, seed=0):
    """A segment of `count` rows in sessions of ten."""
    rng = np.random.default_rng(seed)
    rows, postings = Rows(DIMENSION), Postings()
    for i in range(count):
        append(rows, postings, rng, i)
    return rows, postings


def append(rows, postings, rng, i):
    rows.append(
        rng.normal(size=DIMENSION).astype(np.float32), i % 2, float(i), i - 1 if i % 10 else -1, 0, i % 3 == 0
    )
    numbers = rng.integers(0, WORDS, 6).tolist()
    postings.append([f"w{number}" for number in numbers], numbers)


def asked(seed):
    numbers = np.random.default_rng(seed).integers(0, WORDS, 4).tolist()
    return Asking([(f"w{number}", number) for number in numbers], vectors(seed), allowed=bytes([1, seed % 2]))


@pytest.mark.parametrize("threads", [-1, 0, 1, 2, 7, 1000])
def test_many_questions_on_several_threads_are_answered_as_one_by_one(threads):
    users = [many(count, count) for count in (0, 1, 30, 700, 3000)]
    questions = [question_of(users[i % 5], TABLE, asked(i), k=i % 13) for i in range(60)]
    expected = [recall([question])[0] for question in questions]
    assert recall(questions, threads=threads) == expected
    assert recall(questions * 3, threads=threads) == expected * 3
    assert recall([], threads=threads) == []


def test_one_question_is_answered_in_many_threads_at_once():
    question = question_of(many(5000), TABLE, asked(1))
    [expected] = recall([question])
    with ThreadPoolExecutor(4) as pool:
        assert all(found == [expected] for found in pool.map(recall, [[question]] * 50))


def test_rows_are_appended_and_removed_while_others_are_recalled():
    rows, postings = many(4000)
    over, failures = threading.Event(), []

    def ask(seed):
        while not over.is_set():
            live, before = len(postings), asked(seed | 1)
            [found] = recall([question_of((rows, postings), TABLE, before, k=50)], threads=2)
            if len(found) != 50 or len({row for row, _ in found}) != 50 or live < 4000:
                failures.append(found)

    askers = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for thread in askers:
        thread.start()
    rng = np.random.default_rng(3)
    for i in range(4000, 8000):
        append(rows, postings, rng, i)
        if i % 5 == 0:
            rows.remove(i - 4000)
            postings.remove(i - 4000)
    over.set()
    for thread in askers:
        thread.join()
    assert not failures


def test_a_question_is_answered_from_the_rows_that_there_were_when_it_was_made():
    segment = many(1500)
    question = question_of(segment, TABLE, asked(1), k=5000)
    rng = np.random.default_rng(1)
    for i in range(1500, 4000):
        append(*segment, rng, i)
    assert max(row for row, _ in recall([question])[0]) < 1500


def test_an_append_that_has_no_words_yet_is_not_seen():
    rows, postings = many(20)
    rows.append(vectors(1), 0, 0.0)
    out = np.empty((len(PARTS), 20), np.float32)
    question = question_of((rows, postings), TABLE, asked(1), k=100)
    parts(question, out)
    assert {row for row, _ in recall([question])[0]} == set(range(20))


def test_nothing_to_say_and_nothing_there():
    empty = Rows(DIMENSION), Postings()
    assert recall([question_of(empty, TABLE, asked(1))]) == [[]]
    parts(question_of(empty, TABLE, asked(1)), np.empty((len(PARTS), 0), np.float32))
    some = many(20)
    assert [row for row, _ in recall([question_of(some, TABLE, Asking([]), k=4, weights=[0] * 9)])[0]] == [0, 1, 2, 3]
    assert recall([question_of(some, TABLE, asked(1), k=0)]) == [[]]
    assert len(recall([question_of(some, TABLE, asked(1), k=1 << 62)])[0]) == 20
    assert recall([question_of(some, TABLE, Asking(asked(1).terms, allowed=b""))]) == [[]]
    assert len(recall([question_of(some, TABLE, Asking([(f"t{i}", i) for i in range(500)]))])[0]) == 10


@pytest.mark.parametrize(
    ("asking", "how", "says"),
    [
        (Asking([], np.full(DIMENSION, np.nan, np.float32)), {}, "not finite"),
        (Asking([], np.full(DIMENSION, np.inf, np.float32)), {}, "not finite"),
        (Asking([], np.zeros(DIMENSION + 1, np.float32)), {}, f"{DIMENSION + 1} dimensions"),
        (asked(1), {"weights": (1.0,)}, "1 weights"),
        (asked(1), {"weights": [float("nan")] * 9}, "weight of coverage is nan"),
        (asked(1), {"k": -1}, "k is -1"),
        (asked(1), {"half_life": -1.0}, "half_life"),
        (asked(1), {"half_life": float("nan")}, "half_life"),
        (asked(1), {"now": float("nan")}, "now is nan"),
        (asked(1), {"path": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_is_refused_and_says_why(asking, how, says):
    with pytest.raises(ValueError, match=says):
        question_of(many(3), TABLE, asking, **how)


def test_what_is_no_segment_is_refused():
    rows, postings = many(3)

    class Fake:
        kernel = Rows(3).kernel

    for given_ in ((Fake(), postings), (rows, Fake()), (postings, rows)):
        with pytest.raises(TypeError, match="are not Rows and Postings"):
            Question(*given_, TABLE, [], [], None, 1, b"\1")
    with pytest.raises(ValueError, match="2 words do not fit 1 terms"):
        Question(rows, postings, TABLE, ["a"], [1, 2], None, 1, b"\1")
    with pytest.raises(TypeError):
        recall([None])
    with pytest.raises(ValueError, match="out has shape"):
        parts(question_of((rows, postings), TABLE, asked(1)), np.empty((1, 3), np.float32))
    for shape in ((0, 4), (2, 0), (3, 4)):
        with pytest.raises(ValueError, match="do not fit rows"):
            Words(np.zeros(shape, np.int8), np.zeros(2, np.float32))


def test_there_is_a_weight_for_each_part():
    assert len(WEIGHTS) == len(PARTS)


def test_questions_give_back_what_they_took():
    segment, process = many(3000), psutil.Process()

    def ask():
        for seed in range(200):
            question = question_of(segment, TABLE, asked(seed), only=range(50))
            recall([question, question], threads=2)
            with pytest.raises(ValueError, match="finite"):
                question_of(segment, TABLE, Asking([], np.full(DIMENSION, np.nan, np.float32)))

    ask()
    before = process.memory_info().rss
    for _ in range(5):
        ask()
    assert process.memory_info().rss - before < 4 << 20
