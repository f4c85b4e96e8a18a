"""One ordered lane for each user: one user's turns one after the other, different users side by side.

A place is taken before any work is done for a message, in the order of the calls; what finds no place is told so at
once. A user who is silent has no lane and costs nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from .errors import Closed, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Lanes", "Place"]

PER_USER = 256  # places of one user at most, so that one who floods leaves room for the others


class Place:
    """A message's place in its user's lane; either `start` it or `leave` it."""

    __slots__ = ("_ended", "_lanes", "_left", "name", "size", "task", "user", "work")

    def __init__(self, lanes: Lanes, user: str, size: int) -> None:
        self._lanes = lanes
        self._left = False
        self._ended: asyncio.Future[None] | None = None
        self.user = user
        self.size = size
        self.name = ""
        self.work: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.task: asyncio.Task[None] | None = None

    def start(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Run `work()` as a task called `name` as soon as every earlier place of this user is done."""
        self.work, self.name = work, name
        self._lanes._advance(self.user)

    async def ended(self) -> None:
        """Wait for the end of the work; raises what it raises, Closed if it never ran or was cancelled."""
        self._ended = asyncio.get_running_loop().create_future()
        if self._left:
            self._finish()
        await self._ended

    def leave(self) -> None:
        """Give the place back; a second call does nothing."""
        if not self._left:
            self._left = True
            self._lanes._leave(self)
            self._finish()

    def _finish(self) -> None:
        if self._ended is None or self._ended.done():
            return
        if self.task is None or self.task.cancelled():
            self._ended.set_exception(Closed("the engine stopped first"))
        elif error := self.task.exception():
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)


class Lanes:
    """All lanes; `max_waiting` places and `max_bytes` of text at most, over all users."""

    def __init__(self, max_waiting: int, max_bytes: int) -> None:
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._lanes: dict[str, deque[Place]] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self.closed = False
        self.places = 0
        self.bytes = 0
        self.shed = 0

    def enter(self, user: str, size: int, *, admitted: bool = False) -> Place:
        """Take the next place of `user` for `size` bytes. Raises Overloaded when there is none, Closed at the end.

        One that was `admitted` before a restart always finds a place.
        """
        if self.closed:
            raise Closed("the engine is stopping; send this again in a moment", retry_after=1.0)
        if admitted:
            return self._take(user, size)
        if len(self._lanes.get(user, ())) >= PER_USER:
            self.shed += 1
            raise Overloaded(f"{PER_USER} messages of this user are waiting; come back when some are answered")
        if self.places >= self._max_waiting or self.bytes + size > self._max_bytes:
            self.shed += 1
            raise Overloaded(f"{self.places} messages ({self.bytes} bytes) are waiting; come back a little later")
        return self._take(user, size)

    def _take(self, user: str, size: int) -> Place:
        place = Place(self, user, size)
        self.places += 1
        self.bytes += size
        self._empty.clear()
        self._lanes.setdefault(user, deque()).append(place)
        return place

    async def drain(self, seconds: float) -> bool:
        """Take nobody in any more and wait until every place is left; say whether that was so in time."""
        self.closed = True
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def abort(self) -> None:
        """Cancel every running turn and wait for its end; what waits behind never starts."""
        self.closed = True
        tasks = [place.task for lane in self._lanes.values() for place in lane if place.task is not None]
        idle = [place for lane in self._lanes.values() for place in lane if place.task is None]
        for place in idle:
            place.work = None
            place.leave()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _advance(self, user: str) -> None:
        place = self._lanes[user][0]
        if place.task is None and place.work is not None:
            place.task = asyncio.get_running_loop().create_task(place.work(), name=place.name)
            place.task.add_done_callback(lambda _: place.leave())

    def _leave(self, place: Place) -> None:
        lane = self._lanes[place.user]
        lane.remove(place)
        self.places -= 1
        self.bytes -= place.size
        if lane:
            self._advance(place.user)
        else:
            del self._lanes[place.user]
            if not self._lanes:
                self._empty.set()
