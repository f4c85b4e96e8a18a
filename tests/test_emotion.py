"""The lexicon's reading of a text: its values, and that no text costs it much."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from vaderSentiment.vaderSentiment import BOOSTER_DICT, NEGATE, SPECIAL_CASES, SentimentIntensityAnalyzer

from whisper_fast.models.emotion import EmotionModel, VaderEmotion


@pytest.fixture(scope="module")
def emotion():
    return VaderEmotion()


def named(scores):
    return {
        "valence": scores["compound"],
        "positive": scores["pos"],
        "negative": scores["neg"],
        "neutral": scores["neu"],
    }


def test_good_and_bad(emotion):
    assert isinstance(emotion, EmotionModel)
    assert emotion.analyse("I love this, it is wonderful!")["valence"] > 0.8
    assert emotion.analyse("I hate this, it is terrible.")["valence"] < -0.7
    assert emotion.analyse("the table has four legs") == named({"compound": 0, "pos": 0, "neg": 0, "neu": 1})


@pytest.mark.parametrize("text", ["", "\x00", "\ud800", " \n", "😀🎉", "😭" * 3, "x" * (64 << 10), "word " * 13_000])
def test_any_text_has_values_in_range(emotion, text):
    values = emotion.analyse(text)
    assert set(values) == {"valence", "positive", "negative", "neutral"}
    assert -1 <= values.pop("valence") <= 1
    assert all(type(value) is float and 0 <= value <= 1 for value in values.values())


def test_emoji_alone_are_read(emotion):
    assert emotion.analyse("😀🎉")["valence"] > 0
    assert emotion.analyse("😭😭")["valence"] < 0


def test_the_beginning_counts(emotion):
    filler = "table " * 400
    assert emotion.analyse(filler + "wonderful")["valence"] == 0
    assert emotion.analyse("wonderful " + filler)["valence"] > 0
    assert emotion.analyse("but " + "😀" * 2000) == emotion.analyse("but " + "😀" * 64)


def test_values_are_those_of_the_library(emotion):
    library = SentimentIntensityAnalyzer()
    shuffled = random.Random(7)
    phrases = [
        *SPECIAL_CASES,
        *BOOSTER_DICT,
        *NEGATE,
        "but",
        "least",
        "at least",
        "no",
        "GOOD!",
        "?",
        "the",
        "so",
        "this",
        "doubt",
    ]
    words = list(library.lexicon)
    for _ in range(1500):
        picked = [shuffled.choice(shuffled.choice((phrases, words))) for _ in range(shuffled.randrange(10))]
        text = " ".join(picked)
        assert emotion.analyse(text) == named(library.polarity_scores(text)), text


def test_threads_get_the_same(emotion):
    text = "I was so happy, but now it's really terrible :( 😭"
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(emotion.analyse, [text] * 200))
    assert results == [results[0]] * 200
