"""Simulated users: what they remember and what they say; the same seed gives the same."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from ..errors import SettingsError
from ..message import Message
from .locomo import conversations

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Talks", "memories", "message", "word"]

SUBJECTS = ("cat", "garden", "sister", "guitar", "exam", "bicycle", "grandmother", "novel", "allotment", "telescope")
VERBS = ("lost", "found", "painted", "sold", "repaired", "dreamt about", "argued about", "photographed")
PLACES = ("in Lisbon", "at the station", "near the lake", "on the roof", "at work", "in the old house")
MOODS = ("I am so happy about it", "it makes me sad", "I do not know what to think", "it was wonderful")


def word(user: int) -> str:
    """Return the word that only this user ever says, so that it betrays a leak wherever it appears."""
    return f"zq{user}qz"


def memories(user: int, count: int, seed: int = 0) -> list[str]:
    """Return `count` things that the user told before."""
    rng = np.random.default_rng((seed, user, 1))
    return [f"I {pick(rng, VERBS)} my {pick(rng, SUBJECTS)} {pick(rng, PLACES)} {word(user)}" for _ in range(count)]


def message(user: int, number: int, seed: int = 0, words: str | None = None) -> Message:
    """Return the user's `number`-th message: the same id and text whenever it is made again, never said before.

    It says `words` where there are some; the user's own word and the number follow, so that every text is unique.
    """
    text = f"{words or question(crc32(f'{seed} {user} {number}'.encode()))} {word(user)} {number}"
    return Message(user=f"user-{user}", text=text, id=f"{seed}-{user}-{number}", channel="lab", platform="lab")


def question(drawn: int) -> str:
    """Return one of the questions that a number may draw."""
    drawn, subject = divmod(drawn, len(SUBJECTS))
    drawn, place = divmod(drawn, len(PLACES))
    return f"Do you remember my {SUBJECTS[subject]} {PLACES[place]}? {MOODS[drawn % len(MOODS)]}"


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


class Talks:
    """What real people said to each other: each user leads one of the conversations of LoCoMo, turn by turn.

    Raises SettingsError for a folder without conversations.
    """

    def __init__(self, folder: Path) -> None:
        try:
            found = [[turn["text"] for turn in talk.turns if turn["text"].strip()] for talk in conversations(folder)]
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise SettingsError(
                f"{str(folder)!r:.200} holds a file that is no conversation: {error!r:.200}"
            ) from None
        self._talks = [talk for talk in found if talk]
        if not self._talks:
            raise SettingsError(f"there are no conversations (*.json) in {str(folder)!r:.200}")

    def __call__(self, user: int, number: int) -> str:
        """Return what the user says in the `number`-th message; from the start again at the end."""
        talk: list[str] = self._talks[user % len(self._talks)]
        return talk[(crc32(b"%d" % user) + number) % len(talk)]
