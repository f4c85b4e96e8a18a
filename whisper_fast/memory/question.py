"""What a question says beside its words: which days it names, and which of the people who spoke."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from .terms import analysed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Asked", "ends_asking"]

CHARACTERS: Final = 64 << 10  # of a text are searched by words
SHORTEST_NAME: Final = 3  # letters
LONGEST_NAME: Final = 100
NAMES_KEPT: Final = 1024
WORD: Final = re.compile(r"[^\W\d_]+")
NAME: Final = re.compile(r"[^\W\d_]+(?:'s)?")
# "march" and "may" are also other words: they are months only with a capital.
MONTH: Final = re.compile(
    r"\b(?:(?i:(jan)(?:uary)?|(feb)(?:ruary)?|(apr)(?:il)?|(june?)|(july?)|(aug)(?:ust)?|(sept?)(?:ember)?|(oct)(?:ober)?"
    r"|(nov)(?:ember)?|(dec)(?:ember)?)|(Mar|March|MARCH)|(May|MAY))\b"
)
NUMBER_OF_GROUP: Final = (1, 2, 4, 6, 7, 8, 9, 10, 11, 12, 3, 5)
DAY: Final = re.compile(r"\b(3[01]|[12]?\d)(?:st|nd|rd|th)?\b")
ASKING: Final = ("?", "\uff1f", "\u061f", "\u037e")


class Asked(NamedTuple):
    """A question as the recall kernel takes it; see `pyx/_recall.pyx`."""

    terms: list[str]
    numbers: list[int]  # of the terms' words
    months: int  # bit n: that month is named
    days: int
    speaker: int  # the number of the one speaker whom it names, or -1

    @classmethod
    def of(cls, text: str, speakers: Mapping[str, int]) -> Asked:
        """Read a question to somebody whose memories were told by `speakers` (name -> number).

        Their names are no search terms: they stand in so many texts that they would drown what is asked.
        """
        text = text[:CHARACTERS]
        found = analysed(text, all_beginnings(tuple(speakers))) if speakers else analysed(text)
        months = bits(NUMBER_OF_GROUP[match.lastindex - 1] for match in MONTH.finditer(text) if match.lastindex)
        days = bits(int(day) for day in DAY.findall(text)) if months else 0
        terms, numbers = [stem for stem, _ in found], [word for _, word in found]
        return cls(terms, numbers, months, days, named(text, speakers))


def named(text: str, speakers: Mapping[str, int]) -> int:
    if not speakers:
        return -1
    said = {word.removesuffix("'s") for word in NAME.findall(text.lower())}
    meant = [number for name, number in speakers.items() if not said.isdisjoint(beginnings_of(name))]
    return meant[0] if len(meant) == 1 else -1


@lru_cache(NAMES_KEPT)
def beginnings_of(name: str) -> frozenset[str]:
    """Return every beginning, of three letters or more, of each word of a name."""
    parts = WORD.findall(name[:LONGEST_NAME].lower())
    return frozenset(part[:end] for part in parts for end in range(SHORTEST_NAME, len(part) + 1))


@lru_cache(NAMES_KEPT)
def all_beginnings(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset().union(*map(beginnings_of, names))


def ends_asking(text: str) -> bool:
    """Whether a text ends with a question mark of any script."""
    return text.rstrip().endswith(ASKING)


def bits(numbers: Iterable[int]) -> int:
    found = 0
    for number in numbers:
        found |= 1 << number
    return found
