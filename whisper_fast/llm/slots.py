"""How many calls an endpoint may have at once, and who is next when one ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from whisper_fast._fair import FairQueue
from whisper_fast.errors import Closed, DeadlineExceeded, Overloaded, WhisperFastError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .alarm import Alarm

__all__ = ["Caller", "Share", "Slots"]

FREE = 0.0  # a slot whose call nobody had to wait for and that is not charged
NONE = -1.0


class Waiter:
    """Who waits for a slot."""

    __slots__ = ("at", "handle", "slots", "tick", "timeout", "woken")

    def __init__(self, slots: Slots, at: float, timeout: float | None, woken: asyncio.Future[float]) -> None:
        self.slots, self.at, self.timeout, self.woken = slots, at, timeout, woken
        self.handle = self.tick = 0

    def ring(self) -> None:
        """Give up: the time in the queue is over."""
        if self.slots.leave(self) and not self.woken.done():
            slots = self.slots
            self.woken.set_exception(
                DeadlineExceeded(f"no slot of {slots.limit} became free within {self.timeout:g} s")
            )


class Share(NamedTuple):
    """The part (0 to 1) of a call's tokens that a user pays, among those of a priority."""

    user: str | None
    priority: int
    part: float


class Caller(msgspec.Struct, frozen=True, gc=False):
    """Whose call it is: who waits goes by priority, smaller first, then by fairness between users by `weight`.

    Where it is a call for several, `shares` says who pays for it once it was answered, instead of `user`.
    """

    user: str | None = None
    priority: int = 0
    weight: float = 1.0
    shares: tuple[Share, ...] = ()


class Slots:
    """At most `limit` slots are taken; who finds none waits in the order of `FairQueue`.

    A slot given back goes straight to the next waiter and is never free in between, so nobody can overtake and none
    is idle while anyone waits. A waiter that leaves (cancelled, or its queue time is over) loses its place at once;
    one that was handed a slot and is cancelled before it runs hands it on. Taking a slot returns the `since` with
    which `settle` corrects what it cost its user. Who is served is charged while more than half of the slots are
    taken, and all is forgiven once none is. While it is `shut` nobody gets a slot but the one that `admit_one` lets
    in.
    """

    __slots__ = ("_alarm", "_clock", "_closed", "_one", "_queue", "in_flight", "limit", "max_waiting", "shut")

    def __init__(self, limit: int, max_waiting: int, alarm: Alarm, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.max_waiting = max_waiting
        self.in_flight = 0
        self.shut = False
        self._one = False  # whether the next one gets a slot though it is shut
        self._queue = FairQueue()
        self._alarm = alarm
        self._clock = clock
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def by_priority(self) -> dict[int, int]:
        """Return how many wait, by priority."""
        return self._queue.waiting()

    @property
    def oldest(self) -> float:
        """Seconds that the longest of those who wait has waited."""
        waiter = cast("Waiter | None", self._queue.oldest)
        return 0.0 if waiter is None else self._clock() - waiter.at

    def take(self, caller: Caller, cost: float) -> float:
        """Take a slot if one is free and return its `since`, a negative number if none is."""
        taken = self.in_flight
        if self.shut or taken >= self.limit or self._closed:
            if not self._one or self._closed:
                return NONE
            self._one = False
        self.in_flight = taken + 1
        if 2 * taken + 2 < self.limit or self.shut:
            return FREE
        return self._queue.pass_by(caller.user, cost=cost, weight=caller.weight, priority=caller.priority)

    async def acquire(self, caller: Caller, cost: float, timeout: float | None = None) -> float:
        """Take a slot, waiting at most `timeout` seconds; return its `since`.

        Raises Overloaded when `max_waiting` already wait, DeadlineExceeded after `timeout`, Closed after `close`.
        """
        if self._closed:
            raise Closed("the pool is closed")
        since = self.take(caller, cost)
        if since >= 0:
            return since
        if len(self._queue) >= self.max_waiting:
            raise Overloaded(f"{len(self._queue)} calls wait for {self.limit} slots; try again later")
        return await self._wait(caller, cost, timeout)

    async def _wait(self, caller: Caller, cost: float, timeout: float | None) -> float:
        woken: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        waiter = Waiter(self, self._clock(), timeout, woken)
        if timeout is not None:
            waiter.tick = self._alarm.set(waiter.at + timeout, waiter)
        waiter.handle = self._queue.push(
            waiter, caller.user, cost=cost, weight=caller.weight, priority=caller.priority
        )
        try:
            return await woken
        except asyncio.CancelledError:
            if woken.cancelled():
                self.leave(waiter)
            elif woken.exception() is None:
                if self.shut:  # it was the one that was to go first
                    self.admit_one()
                self.release()
            raise
        finally:
            if waiter.tick:
                self._alarm.cancel(waiter.tick, waiter)

    def leave(self, waiter: Waiter) -> bool:
        """Take a waiter out; say whether it was still waiting."""
        return self._queue.remove(waiter.handle) is not None

    def release(self) -> None:
        """Give a slot back: to the next waiter, or to be free."""
        left = self.in_flight = self.in_flight - 1
        if self._queue:
            self._hand_out()
        elif not left and self._queue.remembered:
            self._queue.clear()

    def settle(self, caller: Caller, difference: float, since: float) -> None:
        """Correct what a call cost its user by `difference`."""
        if since > FREE:
            self._queue.charge(caller.user, difference, weight=caller.weight, priority=caller.priority, since=since)

    def divide(self, caller: Caller, cost: float, tokens: int, since: float) -> None:
        """Give the caller back what the call cost, and charge its `tokens` to those who share it."""
        self.settle(caller, -cost, since)
        if since > FREE:
            for share in caller.shares:
                self._queue.charge(share.user, tokens * share.part, priority=share.priority)

    def resize(self, limit: int) -> None:
        """Change the limit; who waits gets what it adds, and nobody is interrupted for what it takes away."""
        self.limit = limit
        self._hand_out()

    def open(self) -> None:
        """Give out slots again."""
        self.shut = self._one = False
        self._hand_out()

    def admit_one(self) -> None:
        """Let the next one in, who waits or comes."""
        while len(self._queue):
            if self._hand_to(cast("Waiter", self._queue.pop())):
                return
        self._one = True

    def fail(self, error: WhisperFastError) -> None:
        """Send everyone who waits away with a copy of `error`."""
        for waiter in cast("list[Waiter]", self._queue.clear()):
            if not waiter.woken.done():
                waiter.woken.set_exception(error.copy())

    def close(self) -> None:
        """Wake all waiters with Closed; nobody gets a slot from now on."""
        self._closed = True
        self.fail(Closed("the pool was closed while this call waited for a slot"))

    def _hand_out(self) -> None:
        while self.in_flight < self.limit and not self.shut and len(self._queue):
            self._hand_to(cast("Waiter", self._queue.pop()))

    def _hand_to(self, waiter: Waiter) -> bool:
        if waiter.woken.done():
            return False
        self.in_flight += 1
        waiter.woken.set_result(self._queue.finish)
        return True
