"""Simulated users: what they remember, what they say and when; the same seed gives the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..message import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Arrival", "arrivals", "memories", "message", "word"]

SUBJECTS = ("cat", "garden", "sister", "guitar", "exam", "bicycle", "grandmother", "novel", "allotment", "telescope")
VERBS = ("lost", "found", "painted", "sold", "repaired", "dreamt about", "argued about", "photographed")
PLACES = ("in Lisbon", "at the station", "near the lake", "on the roof", "at work", "in the old house")
MOODS = ("I am so happy about it", "it makes me sad", "I do not know what to think", "it was wonderful")


class Arrival(NamedTuple):
    """A message that is due `at` seconds after the start: the `number`-th of `user`, counted from 0."""

    at: float
    user: int
    number: int


def word(user: int) -> str:
    """Return the word that only this user ever says, so that it betrays a leak wherever it appears."""
    return f"zq{user}qz"


def memories(user: int, count: int, seed: int = 0) -> list[str]:
    """Return `count` things that the user told before."""
    rng = np.random.default_rng((seed, user, 1))
    return [f"I {pick(rng, VERBS)} my {pick(rng, SUBJECTS)} {pick(rng, PLACES)} {word(user)}" for _ in range(count)]


def message(user: int, number: int, seed: int = 0) -> Message:
    """Return the user's `number`-th message: the same id and text whenever it is made again, never said before."""
    rng = np.random.default_rng((seed, user, 2, number))
    text = f"Do you remember my {pick(rng, SUBJECTS)} {pick(rng, PLACES)}? {pick(rng, MOODS)} {word(user)} {number}"
    return Message(user=f"user-{user}", text=text, id=f"{seed}-{user}-{number}", channel="lab", platform="lab")


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def arrivals(users: int, period: float, seconds: float, seed: int = 0) -> Iterator[Arrival]:
    """Yield all arrivals of `seconds` seconds in order: each user writes every `period` seconds on average.

    Independent users make a Poisson process together: its gaps are exponential with the mean period / users, and
    each arrival belongs to any user with the same probability.
    """
    rng = np.random.default_rng((seed, 3))
    numbers: dict[int, int] = {}
    at = 0.0
    while (at := at + float(rng.exponential(period / users))) < seconds:
        user = int(rng.integers(users))
        number = numbers.get(user, 0)
        numbers[user] = number + 1
        yield Arrival(at, user, number)
