"""Arrivals that really happened: a language model service's requests, or the lines of a public channel."""

from __future__ import annotations

import re
from random import Random
from typing import TYPE_CHECKING, Final

from ..errors import SettingsError
from .trace import opened, rows
from .traffic import Arrival, Length

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from .traffic import Traffic

__all__ = ["Replay", "channel", "recorded", "requests"]

LINE: Final = re.compile(r"\[(\d\d):(\d\d)\] <([^>]+)> ?(.*)")
DAY: Final = "### "
DAY_SECONDS: Final = 86_400


def recorded(path: Path, traffic: Traffic) -> list[Arrival]:
    """Return what a file holds, whichever of the two kinds it is. Raises SettingsError for neither."""
    with opened(path) as file:
        first = file.readline()
    return channel(path, traffic.seed) if first.startswith(DAY) else requests(path, traffic)


def requests(path: Path, traffic: Traffic) -> list[Arrival]:
    """Return the requests of a trace (see `trace.rows`), dealt to the traffic's users at random: it names none."""
    rng, numbers = Random(traffic.seed), [0] * traffic.users
    found = []
    for row in rows(path):
        user = rng.randrange(traffic.users)
        found.append(Arrival(row.at, user, numbers[user], length=Length(row.prompt, row.answer)))
        numbers[user] += 1
    return sorted(found, key=lambda arrival: arrival.at)


def channel(path: Path, seed: int = 0) -> list[Arrival]:
    """Return what was said in a channel: lines `[HH:MM] <nick> text` below lines `### DAY`, may be gzipped.

    A nick is a user. The days follow each other; what was said in one minute is spread over it at random, in order.
    Raises SettingsError for a file that cannot be read or holds nothing said.
    """
    users: dict[str, int] = {}
    numbers: list[int] = []
    found = []
    for at, nick, words in spread(said(path), Random(seed)):
        user = users.setdefault(nick, len(users))
        if user == len(numbers):
            numbers.append(0)
        found.append(Arrival(at, user, numbers[user], words))
        numbers[user] += 1
    if not found:
        raise SettingsError(f"{str(path)!r:.200} holds nothing said: lines '[HH:MM] <nick> text' are needed")
    first = found[0].at
    return [arrival._replace(at=arrival.at - first) for arrival in found]


def said(path: Path) -> Iterator[tuple[float, str, str]]:
    """Yield minute (in seconds since the first midnight), nick and text; a clock that goes back stands still."""
    day, latest = -1, 0.0
    with opened(path) as file:
        for line in file:
            if line.startswith(DAY):
                day += 1
            elif (found := LINE.match(line)) and found[4].strip():
                latest = max(latest, max(0, day) * DAY_SECONDS + int(found[1]) * 3600.0 + int(found[2]) * 60.0)
                yield latest, found[3], found[4].strip()


def spread(lines: Iterator[tuple[float, str, str]], rng: Random) -> Iterator[tuple[float, str, str]]:
    """Give the lines of each minute times within it, in their order."""
    minute: list[tuple[float, str, str]] = []
    for line in lines:
        if minute and minute[0][0] != line[0]:
            yield from within(minute, rng)
            minute = []
        minute.append(line)
    yield from within(minute, rng)


def within(minute: Sequence[tuple[float, str, str]], rng: Random) -> Iterator[tuple[float, str, str]]:
    offsets = sorted(60 * rng.random() for _ in minute)
    for offset, (at, nick, words) in zip(offsets, minute, strict=True):
        yield at + offset, nick, words


class Replay:
    """Recorded arrivals, `speed` times as fast as they were, for at most `seconds` seconds; in open loop."""

    def __init__(self, recorded: Sequence[Arrival], seconds: float, speed: float = 1.0) -> None:
        if not 0 < speed < float("inf"):
            raise SettingsError(f"speed is {speed}; more than 0 is needed, 1 is as fast as it was")
        self._recorded = recorded
        self._speed = speed
        self._end = min(seconds, recorded[-1].at / speed)
        self._index = 0
        self.people = 1 + max(arrival.user for arrival in recorded)

    @property
    def next(self) -> float:
        """When the next message is due, else the end."""
        if self._index == len(self._recorded):
            return self._end
        return min(self._recorded[self._index].at / self._speed, self._end)

    def take(self) -> Arrival | None:
        """Return the next message, None at the end."""
        if self._index == len(self._recorded) or self._recorded[self._index].at / self._speed > self._end:
            return None
        arrival = self._recorded[self._index]
        self._index += 1
        return arrival._replace(at=arrival.at / self._speed)

    def over(self, user: int, at: float) -> None:
        """Do nothing: it happened when it happened."""
