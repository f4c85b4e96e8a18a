"""One ordered lane for each user: one user's turns one after the other, different users side by side.

A place is taken before any work is done for a message, in the order of the calls; what finds no place is told so at
once. The first of each lane waits for one of the slots, as many as the language model can use; who is next is the
fair queue's choice: by priority, then users by their weight, whoever has more waiting gains nothing by it. A user who
is silent has no lane and costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, cast

from . import clock
from ._fair import FairQueue
from .admission import Admission, back_in
from .errors import Closed, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Lanes", "Place"]

log = logging.getLogger(__name__)

ABORT_SECONDS = 1.0  # that a cancelled turn has to end
REFUSED = 2.0  # seconds to come back in where messages are refused for another reason than those who wait
PER_USER = 256  # places of one user at most, so that one who floods leaves room for the others


class Place:
    """A message's place in its user's lane; either `start` it or `leave` it.

    `about` and `turn` are for whoever comes behind and wants to know: what it is about, and the work once there is.
    """

    __slots__ = (
        "_began", "_ended", "_handle", "_kept", "_lanes", "_left", "_slot",
        "about", "name", "priority", "size", "task", "turn", "user", "weight", "work",
    )  # fmt: skip

    def __init__(self, lanes: Lanes, user: str, size: int, priority: int, weight: float) -> None:
        self._lanes = lanes
        self._left = False
        self._kept = False  # whether it outlives the work that runs
        self._handle = 0  # in the fair queue
        self._slot = False  # whether it holds one
        self._began = 0.0  # to wait for a slot, and then to run
        self._ended: asyncio.Future[None] | None = None
        self.user = user
        self.size = size
        self.priority = priority
        self.weight = weight
        self.name = ""
        self.work: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.task: asyncio.Task[None] | None = None
        self.about: object = None
        self.turn: Any = None

    def start(self, work: Callable[[], Coroutine[Any, Any, None]], name: str, *, slot: bool = True) -> None:
        """Run `work()` as a task called `name` when every earlier place of this user is done, and a slot is free.

        Without `slot` it needs none: it asks no model.
        """
        self.work, self.name, self._slot = work, name, slot
        self._lanes._advance(self.user)

    @property
    def left(self) -> bool:
        """Whether it is given back; the engine does so itself when it stops."""
        return self._left

    def hold(self, size: int) -> None:
        """Take room for `size` bytes. Raises Overloaded; the place is then to be left."""
        self._lanes._hold(self, size)

    def rest(self) -> None:
        """Give the slot back before the end: what is left to do asks no model."""
        if self._slot and self.task is not None:
            self._slot = False
            self._lanes._release()

    def keep(self) -> None:
        """Stay in the lane when the work that runs has ended, until `start` or `leave`: the next ones wait."""
        self.rest()
        self._kept = True

    def before(self) -> Place | None:
        """Return the place just before this one in its lane, None at the head."""
        lane = self._lanes._lanes[self.user]
        at = lane.index(self)
        return lane[at - 1] if at else None

    async def ended(self) -> None:
        """Wait for the end of the work; raises what it raises, Closed if it never ran or was cancelled."""
        self._ended = asyncio.get_running_loop().create_future()
        if self._left:
            self._finish()
        await self._ended

    def leave(self, _: object = None) -> None:
        """Give the place back; a second call does nothing."""
        if not self._left:
            self._left = True
            self._lanes._leave(self)
            self._finish()

    def _over(self, _: object) -> None:
        kept, self._kept = self._kept, False
        if kept:
            self.task, self._handle = None, 0
        if kept and not self._lanes.closed:
            self._lanes._advance(self.user)  # it may have been started again already
        else:
            self.leave()

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
    """All lanes: at most `max_waiting` places and `max_bytes` of text over all users, `slots()` turns at once.

    A turn that would wait longer than `max_wait` seconds for its slot is refused, see `Admission`; one that has
    waited so long, because others who came later had a better claim, is next.
    """

    def __init__(
        self,
        max_waiting: int,
        max_bytes: int,
        *,
        slots: Callable[[], int] = lambda: 1 << 30,
        max_wait: float = float("inf"),
    ) -> None:
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._slots = slots
        self._admission = Admission(max_wait)
        self._lanes: dict[str, deque[Place]] = {}
        self._queue = FairQueue()
        self._longest: deque[Place] = deque()
        self._settled = asyncio.Event()
        self._settled.set()
        self.closed = False
        self.places = 0
        self.running = 0
        self.bytes = 0
        self.refused: Counter[str] = Counter()  # by reason: full, user, wait, memory
        self.refusal = ""  # why no new message is taken for now: a sentence, "" where they are

    @property
    def waiting(self) -> int:
        """How many users' turns wait for a slot."""
        return len(self._queue)

    @property
    def users(self) -> int:
        """How many users have a place."""
        return len(self._lanes)

    @property
    def longest(self) -> int:
        """How many places a user has who has the most, or nearly so: a lane is looked at when it grows."""
        return len(self._longest)

    @property
    def slots(self) -> int:
        """How many turns may run at once."""
        return self._slots()

    def enter(
        self,
        user: str,
        size: int = 0,
        *,
        priority: int = 0,
        weight: float = 1.0,
        admitted: bool = False,
        behind: Place | None = None,
    ) -> Place:
        """Take the last place of `user`, or the one `behind` another, for `size` bytes.

        Raises Overloaded when there is none, Closed at the end. One that was `admitted` before always finds a place.
        """
        if self.closed:
            raise Closed("the engine is stopping; send this again in a moment", retry_after=1.0)
        if not admitted:
            self._admit(user, size, priority)
        place = Place(self, user, size, priority, weight)
        self.places += 1
        self.bytes += size
        self._settled.clear()
        lane = self._lanes.setdefault(user, deque())
        lane.insert(len(lane) if behind is None else lane.index(behind) + 1, place)
        if len(lane) > len(self._longest):
            self._longest = lane
        return place

    @property
    def oldest(self) -> float:
        """Seconds that the longest of those who wait for a slot has waited."""
        place = cast("Place | None", self._queue.oldest)
        return 0.0 if place is None else clock.monotonic() - place._began

    def stats(self) -> dict[str, Any]:
        """Return who is here now and how many were refused, in all and by reason; `oldest_waiting` in seconds."""
        return {
            "in_flight": self.places,
            "in_flight_limit": self._max_waiting,
            "running": self.running,
            "slots": self._slots(),
            "waiting": self.waiting,
            "oldest_waiting": self.oldest,
            "shed": self.refused.total(),
            "refused": dict(self.refused),
        }

    def patience(self) -> float:
        """Return the seconds after which a user's running turn is probably over."""
        return back_in(self._admission.turn_seconds)

    def of(self, user: str) -> tuple[Place, ...]:
        """Return the places of a user, the first one first."""
        return tuple(self._lanes.get(user, ()))

    async def drain(self, seconds: float) -> bool:
        """Take nobody in any more and wait until every place is left; say whether that was so in time."""
        self.closed = True
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return False
        return not self._lanes

    def hurry(self) -> None:
        """End `drain` now, whatever still runs."""
        self.closed = True
        self._settled.set()

    def give_up(self, user: str) -> None:
        """Leave every place of a user whose work does not run; none of them starts."""
        for place in self.of(user):
            place._kept = False
        idle = [place for place in self.of(user) if place.task is None]
        for place in idle:
            place.work = None
        for place in idle:
            place.leave()

    async def abort(self) -> None:
        """Cancel every running turn and wait for its end, a second at most; what waits behind never starts."""
        self.closed = True
        tasks = [place.task for lane in self._lanes.values() for place in lane if place.task is not None]
        for user in tuple(self._lanes):
            self.give_up(user)
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=ABORT_SECONDS)
            for task in left:
                log.warning("%s ignores that it is cancelled; it is left behind", task.get_name())

    def _admit(self, user: str, size: int, priority: int) -> None:
        lane = self._lanes.get(user)
        if lane is not None and len(lane) >= PER_USER:
            self.refused["user"] += 1
            seconds = back_in(self._admission.turn_seconds * PER_USER / 4)
            raise Overloaded(f"{PER_USER} messages of this user wait; come back later", retry_after=seconds)
        if self.places >= self._max_waiting or self.bytes + size > self._max_bytes:
            raise self._full()
        if self._queue:
            ahead = sum(count for level, count in self._queue.waiting().items() if level <= priority)
            try:
                self._admission.check(ahead, self._slots(), len(lane) if lane else 0)
            except Overloaded:
                self.refused["wait"] += 1
                raise

    def _full(self) -> Overloaded:
        self.refused["full"] += 1
        seconds = self._admission.full(len(self._queue), self._slots())
        return Overloaded(f"{self.places} messages ({self.bytes} bytes) wait; come back later", retry_after=seconds)

    def _hold(self, place: Place, size: int) -> None:
        if self.refusal:
            self.refused["memory"] += 1
            raise Overloaded(self.refusal, retry_after=back_in(REFUSED))
        if self.bytes + size > self._max_bytes:
            raise self._full()
        place.size += size
        self.bytes += size

    def _advance(self, user: str) -> None:
        """Let the first place of a lane run, or wait for a slot, once it is started."""
        place = self._lanes[user][0]
        if place.task is not None or place.work is None or place._handle:
            return
        if not place._slot:
            self._run(place)
        elif self._queue or self.running >= self._slots():
            place._handle = self._queue.push(place, user, weight=place.weight, priority=place.priority)
            place._began = clock.monotonic()
            self._admission.waits()
            self._fill()
        else:
            self.running += 1
            self._run(place)

    def _fill(self) -> None:
        """Give the free slots to those who wait."""
        while self._queue and self.running < self._slots():
            place = self._next()
            self.running += 1
            self._run(place)

    def _run(self, place: Place) -> None:
        work, place.work = place.work, None
        assert work is not None  # noqa: S101 - only what was started runs
        place._began = clock.monotonic()
        place.task = asyncio.get_running_loop().create_task(work(), name=place.name)
        place.task.add_done_callback(place._over)

    def _next(self) -> Place:
        """Take out who is next: the fair queue's choice, but first whoever has waited as long as one may."""
        oldest = cast("Place", self._queue.oldest)
        if self.oldest < self._admission.max_wait:
            return cast("Place", self._queue.pop())
        self._queue.remove(oldest._handle)
        self._queue.charge(oldest.user, 1.0, weight=oldest.weight, priority=oldest.priority)
        return oldest

    def _release(self) -> None:
        self.running -= 1
        self._admission.served(len(self._queue), self._slots())
        if self._queue:
            self._fill()
        elif self._queue.remembered:
            self._queue.clear()  # nobody waits: nobody has anything to make up for

    def _leave(self, place: Place) -> None:
        lane = self._lanes[place.user]
        lane.remove(place)
        self.places -= 1
        self.bytes -= place.size
        if lane:
            self._advance(place.user)
        else:
            del self._lanes[place.user]
        if place.task is not None:
            self._admission.lasted(clock.monotonic() - place._began)
            place.rest()  # when the user's next one waits as well: weight counts
        elif place._handle:
            self._queue.remove(place._handle)
        if not self._lanes:
            self._settled.set()
