"""Words to terms: what two texts must share to be about the same thing.

Latin, Cyrillic, Greek, Arabic and Devanagari words are stemmed by Snowball; scripts that write no spaces between
words (Chinese, Japanese, Thai, ...) give their pairs of neighbouring characters; an emoji is a term of its own.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Final
from unicodedata import normalize

import Stemmer

from .stopwords import STOP_WORDS
from .words import NO_WORD, number_of

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Term", "Terms", "analysed", "terms"]

WORDS_KEPT: Final = 50_000  # stems in the dictionary: about 6 MB, more than the words that people use
LONGEST: Final = 64  # characters of a word that count

# Scripts without spaces: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han; Hangul writes spaces, but glues particles on.
UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
EMOJI = "\u2600-\u27bf\U0001f300-\U0001faff"
JOINED = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"  # marks that belong to the letter before them
WORD = re.compile(rf"[{UNSPACED}]+|[{EMOJI}]|[^\W_{UNSPACED}](?:[^\W_{UNSPACED}]|[{JOINED}]|['\u2019](?=[^\W\d_]))*")
LATIN_ACCENT = re.compile(r"(?<=[a-z])[\u0300-\u036f]+")
UNSPACED_RUN = re.compile(rf"[{UNSPACED}]")

LANGUAGES: Final = (("\u0370", "\u03ff", "greek"), ("\u0400", "\u04ff", "russian"), ("\u0600", "\u06ff", "arabic"))
"""First and last letter of a script, and the stemmer for it; all others are stemmed as English."""


Term = tuple[str, int]
"""A stem, and the number of the word that it was taken from."""


class Terms:
    """Turns texts into terms; keeps the stems of the `kept` words last seen first. Calls may come from any thread."""

    def __init__(self, kept: int = WORDS_KEPT) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._stemmers: dict[str, Stemmer.Stemmer] = {}
        self._stems: dict[str, Term] = {}  # word -> its term, with "" for the stem of a stop word
        self._older: dict[str, Term] = {}

    def __call__(self, text: str) -> list[str]:
        """Return the terms of `text` in their order, with repetitions, without stop words."""
        return [stem for stem, _ in self.analysed(text)]

    def analysed(self, text: str, without: Collection[str] = ()) -> list[Term]:
        """Return each term with the number of its word (see `memory.words`); words in `without` are left out."""
        text = text.lower()
        if not text.isascii():
            text = normalize("NFC", LATIN_ACCENT.sub("", normalize("NFKD", text)))
        found: list[Term] = []
        stems = self._stems
        for word in WORD.findall(text):
            term = stems.get(word)
            if term is None:
                if UNSPACED_RUN.match(word):
                    found += [(pair, NO_WORD) for pair in pairs(word)]
                    continue
                term = self._term(word)
            if term[0] and (not without or bare(word) not in without):
                found.append(term)
        return found

    def _term(self, word: str) -> Term:
        with self._lock:  # a stemmer works in its own buffer
            term = self._older.get(word)
            if term is None:
                plain = word.replace("\u2019", "'")[:LONGEST]
                term = self._stemmed(plain), number_of(plain)
            if len(self._stems) >= self._kept // 2:
                self._older, self._stems = self._stems, {}
            if len(word) <= LONGEST:
                self._stems[word] = term
            return term

    def _stemmed(self, word: str) -> str:
        if word in STOP_WORDS:
            return ""
        language = next((name for first, last, name in LANGUAGES if first <= word[0] <= last), "english")
        if language not in self._stemmers:
            self._stemmers[language] = Stemmer.Stemmer(language, 0)
        stem: str = self._stemmers[language].stemWord(word)
        return stem


def bare(word: str) -> str:
    """Return a word without its 's."""
    return word.replace("\u2019", "'").removesuffix("'s")


def pairs(run: str) -> list[str]:
    """Return a run's pairs of neighbouring characters, or its only character."""
    return [run[i : i + 2] for i in range(len(run) - 1)] or [run]


terms: Final = Terms()
"""The one dictionary of this process."""

analysed: Final = terms.analysed
"""The same with the words' numbers."""
