"""How many calls an endpoint may have at once, and who is next when one ends."""

from __future__ import annotations

import asyncio
from heapq import heapify, heappop, heappush

from whisper_fast.errors import Closed, DeadlineExceeded, Overloaded

__all__ = ["Slots"]

Waiter = tuple[int, int, "asyncio.Future[None]"]  # priority, arrival, woken with the slot


class Slots:
    """At most `limit` slots are taken; who finds none waits in order of priority (smaller first), then arrival.

    A slot given back goes straight to the next waiter and is never free in between, so nobody can overtake. A
    waiter that leaves (cancelled, or its queue time is over) loses its place at once; one that was handed a
    slot and is cancelled before it runs hands it on.
    """

    def __init__(self, limit: int, max_waiting: int) -> None:
        self.limit = limit
        self.max_waiting = max_waiting
        self.in_flight = 0
        self.waiting = 0
        self._heap: list[Waiter] = []
        self._arrival = 0
        self._closed = False

    def take(self) -> bool:
        """Take a slot if one is free, and say whether it was; nobody waits while one is."""
        if self.in_flight >= self.limit or self._closed:
            return False
        self.in_flight += 1
        return True

    async def acquire(self, priority: int = 0, timeout: float | None = None) -> None:
        """Take a slot, waiting at most `timeout` seconds.

        Raises Overloaded when `max_waiting` already wait, DeadlineExceeded after `timeout`, Closed after
        `close`.
        """
        if self._closed:
            raise Closed("the pool is closed")
        if self.take():
            return
        if self.waiting >= self.max_waiting:
            raise Overloaded(f"{self.waiting} calls wait for {self.limit} slots; try again later")
        await self._wait(priority, timeout)

    async def _wait(self, priority: int, timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, self._expire, woken, timeout)
        self._arrival += 1
        heappush(self._heap, (priority, self._arrival, woken))
        self.waiting += 1
        try:
            await woken
        except asyncio.CancelledError:
            if woken.cancelled():
                self._leave()
            elif woken.exception() is None:
                self.release()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def release(self) -> None:
        """Give a slot back: to the next waiter, or to be free."""
        while self._heap and self.in_flight <= self.limit:
            woken = heappop(self._heap)[2]
            if not woken.done():
                self.waiting -= 1
                woken.set_result(None)
                return
        self.in_flight -= 1

    def close(self) -> None:
        """Wake all waiters with Closed; nobody gets a slot from now on."""
        self._closed = True
        heap, self._heap, self.waiting = self._heap, [], 0
        for _, _, woken in heap:
            if not woken.done():
                woken.set_exception(Closed("the pool was closed while this call waited for a slot"))

    def _expire(self, woken: asyncio.Future[None], timeout: float) -> None:
        if not woken.done():
            woken.set_exception(DeadlineExceeded(f"no slot of {self.limit} became free within {timeout:g} s"))
            self._leave()

    def _leave(self) -> None:
        """Count a waiter out whose future is done; the heap is swept when most of it has left."""
        if self._closed:
            return
        self.waiting -= 1
        if len(self._heap) > 64 and len(self._heap) > 2 * self.waiting:
            self._heap = [waiter for waiter in self._heap if not waiter[2].done()]
            heapify(self._heap)
