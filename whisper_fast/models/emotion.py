"""The emotion in a text: what an emotion model is, and the lexicon one that comes with the package."""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any, Protocol, runtime_checkable

__all__ = ["EmotionModel", "VaderEmotion"]

MAX_CHARACTERS = 2000
MAX_EMOJI = 64


@runtime_checkable
class EmotionModel(Protocol):
    """What reads the emotion of one text."""

    def analyse(self, text: str, /) -> dict[str, float]:
        """Return named values of the text's emotion, with "valence" from -1 (bad) to 1 (good) among them."""


@cache
def windowed_analyzer() -> Any:
    """Return VADER's analyzer, one for all, with two checks held to the words around: the same values in linear time.

    VADER looks at the words i-3 to i+2, but first lowers the case of the whole text, four times for a word it scores.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    class WindowedAnalyzer(SentimentIntensityAnalyzer):  # type: ignore[misc]  # the library has no types
        @staticmethod
        def _negation_check(valence: float, words: list[str], before: int, i: int) -> float:
            start = max(0, i - 3)
            window = words[start : i + 1]
            return float(SentimentIntensityAnalyzer._negation_check(valence, window, before, i - start))

        @staticmethod
        def _special_idioms_check(valence: float, words: list[str], i: int) -> float:
            start = max(0, i - 3)
            window = words[start : i + 3]
            return float(SentimentIntensityAnalyzer._special_idioms_check(valence, window, i - start))

    return WindowedAnalyzer()


class VaderEmotion:
    """VADER, a rule-based lexicon for short social texts (Hutto and Gilbert 2014), English only.

    It runs inline on the event loop, so its time is bounded: of a text the first 2,000 characters count, and of the
    emoji among them the first 64, because VADER spells each out in words and what follows "but" costs it time that
    grows with the square of the words. Calls may come from several threads.
    """

    def __init__(self) -> None:
        self._analyzer = windowed_analyzer()
        self._emoji = frozenset(self._analyzer.emojis)

    def analyse(self, text: str, /) -> dict[str, float]:
        """Return valence (-1 to 1) and the shares (0 to 1) of positive, negative and neutral words."""
        scores = self._analyzer.polarity_scores(self._bounded(text))
        return {
            "valence": scores["compound"],
            "positive": scores["pos"],
            "negative": scores["neg"],
            "neutral": scores["neu"],
        }

    def _bounded(self, text: str) -> str:
        text = text[:MAX_CHARACTERS]
        if text.isascii():
            return text
        met = count()
        return "".join(c for c in text if c not in self._emoji or next(met) < MAX_EMOJI)
