"""Every optimisation that can be switched off while the engine runs; a change counts from the next message on.

Whoever uses an optimisation has a plain way beside it, takes that when the optimisation raises, and tells `failed`:

    rest    after FAILURES failures within SPAN seconds the flag goes off by itself, for REST seconds
    trial   then it is on again. A failure within the next SPAN seconds, or within as many as it has rested, puts it
            off for twice as long, at most LONGEST

Whoever sets a flag decides: it stays so until it is set again, whether it was resting or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from . import clock
from .errors import BatchMismatch, LoadCycle, SettingsError, WhisperFastError, described

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .settings import Settings

__all__ = ["DOES", "Change", "Flags", "either", "logged"]

log = logging.getLogger(__name__)

T = TypeVar("T")

FAILURES: Final = 3
SPAN: Final = 60.0  # seconds
REST: Final = 30.0
LONGEST: Final = 3600.0
KEPT: Final = 100  # changes that are kept

OURS: Final = (BatchMismatch, LoadCycle)  # what only an optimisation raises

DOES: Final = {
    "adaptive": "the limit of each language model follows what it bears",
    "ann": "users with very many memories are searched through hnswlib",
    "batching": "texts of many users are embedded together, equal requests asked once",
    "budget": "caches give way when memory is short (with adaptive)",
    "caching": "memories and conversations are kept in memory",
    "hedging": "a slow language model is asked a second time",
    "linger": "the wait of a batch's items follows what it brings (with adaptive)",
    "parallel": "components run together",
    "preload": "what a user needs is loaded before the user returns (with caching)",
    "processes": "the number of worker processes follows what it brings (with adaptive)",
    "threads": "the number of threads follows what it brings (with adaptive)",
}


class Change(NamedTuple):
    """One move of a flag; `at` in epoch seconds."""

    at: float
    flag: str
    on: bool
    reason: str


class Health:
    """How one flag fares: when it failed lately, and how long it rests or is on trial."""

    __slots__ = ("pause", "timer", "times", "trial")

    def __init__(self) -> None:
        self.times: deque[float] = deque(maxlen=FAILURES)
        self.pause = 0.0
        self.trial = 0.0  # until then one failure is enough
        self.timer: asyncio.TimerHandle | None = None


class Flags:
    """The flags of one engine, as attributes; with all of them off it still answers, sequentially.

    `DOES` says what each is for. `failures` and `changes` count by flag, `history` holds the latest changes.
    """

    __slots__ = (*DOES, "_health", "changes", "failures", "history")

    adaptive: bool
    ann: bool
    batching: bool
    budget: bool
    caching: bool
    hedging: bool
    linger: bool
    parallel: bool
    preload: bool
    processes: bool
    threads: bool

    def __init__(self, settings: Settings) -> None:
        put = object.__setattr__
        put(self, "failures", Counter[str]())
        put(self, "changes", Counter[str]())
        put(self, "history", deque[Change](maxlen=KEPT))
        put(self, "_health", {name: Health() for name in DOES})
        for name in DOES:
            put(self, name, getattr(settings, f"feature_{name}"))

    failures: Counter[str]
    changes: Counter[str]
    history: deque[Change]
    _health: dict[str, Health]

    def __setattr__(self, name: str, value: object) -> None:
        """Switch a flag, as `switch` does."""
        self.switch(name, value, "the program has set it")

    def switch(self, name: str, on: object, reason: str) -> None:
        """Switch a flag and say why. Raises SettingsError for an unknown one or a value that is not a bool."""
        if name not in DOES:
            raise SettingsError(f"there is no flag {name!r:.80}; there are {', '.join(DOES)}")
        if not isinstance(on, bool):
            raise SettingsError(f"flag {name} is {on!r:.80}; True or False is allowed")
        self._settle(name)
        self._move(name, on, reason)

    def failed(self, name: str, error: Exception) -> None:
        """Say, on the loop, that an optimisation raised and the plain way was taken; it may go off for it."""
        self.failures[name] += 1
        health, now = self._health[name], clock.monotonic()
        if not health.times or now - health.times[-1] > SPAN:
            log.warning("%s failed, its message took the plain way: %s", name, described(error))
        health.times.append(now)
        if not getattr(self, name):
            return
        if now < health.trial:
            self._rest(name, min(LONGEST, 2 * health.pause), error)
        elif len(health.times) == FAILURES and now - health.times[0] <= SPAN:
            self._rest(name, REST, error)

    def close(self) -> None:
        """Let every flag be as it is now."""
        for name in DOES:
            self._settle(name)

    def as_dict(self) -> dict[str, bool]:
        """Return all flags with their present values."""
        return {name: getattr(self, name) for name in DOES}

    def stats(self) -> dict[str, dict[str, int]]:
        """Return by flag whether it is on, and how often it was changed and has failed."""
        return {
            "on": {name: int(on) for name, on in self.as_dict().items()},
            "changes": {name: self.changes[name] for name in DOES},
            "failures": {name: self.failures[name] for name in DOES},
        }

    def described(self) -> dict[str, list[dict[str, Any]]]:
        """Return `flags`, each with what it does and whether it rests by itself, and the latest `changes`."""
        flags = [
            {
                "name": name,
                "on": getattr(self, name),
                "does": does,
                "changes": self.changes[name],
                "failures": self.failures[name],
                "resting": self._health[name].timer is not None,
            }
            for name, does in DOES.items()
        ]
        return {"flags": flags, "changes": [change._asdict() for change in reversed(self.history)]}

    def _rest(self, name: str, seconds: float, error: Exception) -> None:
        self._settle(name)
        health = self._health[name]
        health.pause = seconds
        health.timer = asyncio.get_running_loop().call_later(seconds, self._try_again, name)
        often, last = self.failures[name], type(error).__name__
        self._move(name, False, f"it failed {often} times, lately with {last}; tried again in {seconds:.0f} s")

    def _try_again(self, name: str) -> None:
        health = self._health[name]
        health.timer = None
        health.trial = clock.monotonic() + max(SPAN, health.pause)
        self._move(name, True, f"it is tried again after {health.pause:.0f} s")

    def _settle(self, name: str) -> None:
        """Forget what failed; nothing is tried again by itself."""
        health = self._health[name]
        if health.timer is not None:
            health.timer.cancel()
        self._health[name] = Health()

    def _move(self, name: str, on: bool, reason: str) -> None:
        if getattr(self, name) is on:
            return
        object.__setattr__(self, name, on)
        self.changes[name] += 1
        self.history.append(Change(clock.wall(), name, on, reason))
        log.warning("flag %s is %s now: %s", name, "on" if on else "off", reason)


async def either(
    name: str,
    fast: Callable[[], Awaitable[T]],
    plain: Callable[[], Awaitable[T]],
    failed: Callable[[str, Exception], None],
) -> T:
    """Return what `fast()` brings, or, where that raises, what `plain()` does: then the flag `name` has `failed`.

    One of our own errors says what was wrong with the request or with a server, which no other way would mend: it is
    raised as it is. So is what `plain` raises, and then the optimisation is not to blame.
    """
    try:
        return await fast()
    except Exception as error:
        if isinstance(error, WhisperFastError) and not isinstance(error, OURS):
            raise
        fault = error
    found = await plain()
    failed(name, fault)
    return found


def logged(name: str, error: Exception) -> None:
    """Say that an optimisation raised; for a part that works without an engine, and so without flags."""
    log.warning("%s failed, the plain way was taken: %s", name, described(error))
