"""What a day holds, all of it drawn from its seed before it begins."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import apsw

from ...message import Message
from ..prove.isolation import MARK_OF, SCOPES
from ..users import word

__all__ = ["DEDUPLICATING", "PLATFORMS", "Act", "Plan"]

DEDUPLICATING = frozenset(("discord",))  # platforms that show a nonce once
PLATFORMS = ("discord", "irc")  # that the bot sends to by itself; who writes in the lab waits for the answer
DAY = 60.0  # seconds in which everything begins
POLICIES = ("queue", "queue", "queue", "merge", "interrupt", "drop")
FAULTS = (
    ("xSync", apsw.SQLITE_IOERR_FSYNC),
    ("xWrite", apsw.SQLITE_FULL),
    ("xWrite", apsw.SQLITE_IOERR_WRITE),
    ("xRead", apsw.SQLITE_IOERR_READ),
    ("xOpen", apsw.SQLITE_CANTOPEN),
)
JUMPS = (-31_536_000.0, -3600.0, -1.0, 3600.0, 31_536_000.0)  # seconds that the wall clock jumps by
FLAGS = ("parallel", "batching", "caching", "preload", "hedging", "adaptive")


class Act(NamedTuple):
    """Something that happens `at` seconds after the start: `kind` says which method of the world does it."""

    at: float
    kind: str
    detail: Any


class Plan:
    """One day: `acts` in order of time, `crashes` at which the process dies, and how well the model is."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.users = random.randint(1, 4)
        self.policy = random.choice(POLICIES)
        self.slow = random.choice((0.001, 0.01, 0.2))  # mean seconds of a commit or a thread
        self.model_seconds = random.choice((0.05, 0.5, 3.0))
        self.model_fails = random.choice((0.0, 0.05, 0.3))
        self.hasty = random.choice((0.0, 0.1, 0.6))  # the share of messages that come together with the one before
        self.crashes = sorted(random.uniform(0.0, DAY) for _ in range(random.choice((0, 1, 1, 2, 3))))
        self.sender_fails = random.choice((0.0, 0.1, 0.5))
        self.sent = random.choice((0.0, 0.3, 0.8))  # the share of messages on a platform
        self._last = 0.0
        acts = [act for number in range(random.randint(5, 30)) for act in self._message(number)]
        acts += self._disturbances()
        self.acts = sorted(acts, key=lambda act: act.at)

    def _message(self, number: int) -> list[Act]:
        random = self.random
        user, scope = random.randrange(self.users), random.choice(SCOPES[:4])
        text = f"{user} {scope} {word(user)} {MARK_OF[scope]} {number}"
        platform = random.choice(PLATFORMS) if random.random() < self.sent else "lab"
        message = Message(
            user=f"u{user}", text=text, id=f"m{number}", channel="c", platform=platform, scope=scope, at=0.0
        )
        first = self._last if random.random() < self.hasty else random.uniform(0.0, DAY)
        self._last = first
        times = [first] + [first + random.expovariate(0.2) for _ in range(random.choice((0, 0, 0, 1, 2)))]
        return [Act(at, random.choice(("respond", "respond", "stream", "abandon")), message) for at in times]

    def _disturbances(self) -> list[Act]:
        random = self.random
        acts = []
        for kind, most, draw in (
            ("fault", 2, lambda: (*random.choice(FAULTS), random.randint(1, 30), random.choice((1, 3, None)))),
            ("cut", 1, lambda: random.randint(1, 60)),
            ("jump", 2, lambda: random.choice(JUMPS)),
            ("flag", 4, lambda: (random.choice(FLAGS), random.random() < 0.5)),
            ("forget", 1, lambda: f"u{random.randrange(self.users)}"),
            ("hint", 2, lambda: f"u{random.randrange(self.users)}"),
        ):
            acts += [Act(random.uniform(0.0, DAY), kind, draw()) for _ in range(random.randint(0, most))]
        return acts
