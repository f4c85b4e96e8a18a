"""What a user will need, loaded shortly before the user returns.

When that is, `pyx/_habit.pyx` foresees from the user's own visits. A load is on probation: it lasts until its window
closes, and whoever has not come by then is let go at once, before anybody who has.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from . import clock
from ._habit import Habits
from .errors import StoreError
from .flags import logged

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Preload"]

log = logging.getLogger(__name__)

LEAD = 30.0  # seconds before the window opens
LONGEST = 60.0  # seconds between two looks at the wall clock, which may jump

Window = tuple[int, int]


class Preload:
    """Calls `await load(user, seconds)` before a user returns, and `drop(user)` if the user did not.

    load      loads for so many seconds; returns whether `drop` has anything to do
    gap       seconds without a message after which a user's next one begins a visit, and is not warm by itself
    users     whose habits are kept, of those who wrote last, 64 bytes each; best a quarter more than write
    most      who may be loaded for at once; beyond it nobody is, until a window closes or a user comes
    enabled   whether to load; habits are learnt also while it says no
    failed    told what was raised here; who is loaded for loses nothing by it

    One load at a time: what users wait for goes before.
    """

    def __init__(
        self,
        load: Callable[[str, float], Awaitable[bool]],
        drop: Callable[[str], None],
        *,
        gap: float,
        enabled: Callable[[], bool],
        failed: Callable[[str, Exception], None] = logged,
        users: int = 1 << 17,
        most: int = 256,
    ) -> None:
        self._load = load
        self._drop = drop
        self._gap = gap
        self._enabled = enabled
        self._failed = failed
        self._most = most
        self._users = users
        self._habits = Habits(users, gap=gap)
        self._foreseen: dict[str, Window] = {}
        self._probation: dict[str, bool] = {}  # who is loaded for -> whether there is something to drop
        self._due: list[tuple[float, str, Window]] = []
        self._sooner = asyncio.Event()
        self.counts = dict.fromkeys(("visits", "loads", "right", "wrong", "denied"), 0)

    def seen(self, user: str) -> None:
        """Note that `user` has written just now."""
        try:
            self._seen(user)
        except Exception as error:  # noqa: BLE001 - a guess that fails is no reason to refuse what was accepted
            self._failed("preload", error)

    def _seen(self, user: str) -> None:
        now = clock.wall()
        window = self._habits.seen(user, now)
        if window is None:
            return
        self.counts["visits"] += 1
        if self._probation.pop(user, None) is not None:
            self.counts["right"] += 1
        self._foreseen.pop(user, None)
        if window[1] and len(self._due) < 2 * self._users:
            self._foreseen[user] = window
            self._plan(max(now, window[0] - LEAD), user, window)

    def forget(self, user: str) -> None:
        """Forget the habits of `user`."""
        self._habits.forget(user)
        self._foreseen.pop(user, None)
        self._probation.pop(user, None)

    def stats(self) -> dict[str, int]:
        """Return the counts of visits and loads, right, wrong and denied, and how many are on probation now."""
        return {**self.counts, "on_probation": len(self._probation), "bytes": self._habits.nbytes}

    async def run(self) -> None:
        """Load and let go at the right time, for ever."""
        while True:
            wait = min(LONGEST, self._due[0][0] - clock.wall()) if self._due else LONGEST
            self._sooner.clear()
            if wait > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._sooner.wait()
            try:
                await self.work()
            except Exception as error:  # noqa: BLE001 - as above
                self._failed("preload", error)

    async def work(self) -> None:
        """Do what is due by now."""
        while self._due and self._due[0][0] <= clock.wall():
            _, user, window = heappop(self._due)
            if self._foreseen.get(user) == window:  # else the user has come since
                await self._act(user, window)

    async def _act(self, user: str, window: Window) -> None:
        now = clock.wall()
        resident = self._habits.last(user) + self._gap
        if now >= window[1]:
            self._give_up(user)
        elif now < resident:  # what the last message left in memory is still there
            self._plan(min(resident, window[1]), user, window)
        elif self._enabled() and len(self._probation) < self._most:
            await self._try(user, window)
        else:
            self.counts["denied"] += 1
            del self._foreseen[user]

    async def _try(self, user: str, window: Window) -> None:
        self.counts["loads"] += 1
        self._probation[user] = False
        try:
            loaded = await self._load(user, window[1] - clock.wall())
        except StoreError as error:
            log.warning("preload: %s", error)
            loaded = False
        except Exception as error:  # noqa: BLE001 - as above
            self._failed("preload", error)
            loaded = False
        if user in self._probation:  # else the user has come while it was loaded
            self._probation[user] = loaded
            self._plan(window[1], user, window)

    def _give_up(self, user: str) -> None:
        del self._foreseen[user]
        loaded = self._probation.pop(user, None)
        if loaded is not None:
            self.counts["wrong"] += 1
        if loaded:
            self._drop(user)

    def _plan(self, at: float, user: str, window: Window) -> None:
        heappush(self._due, (at, user, window))
        if self._due[0][1] == user:
            self._sooner.set()
