"""Worker processes: forked by a nursery, replaced within milliseconds when one dies, and gone when the parent is.

A worker has one call at a time and the others wait here, so the death of a worker costs exactly the call that it was
at, and a long call holds up nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter, deque
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, Any

from .arena import Inbox, Outbox, shared_file
from .errors import Closed, Overloaded, WorkerDied
from .link import Link
from .nursery import Nursery
from .worker import pickled, placed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Call", "Processes"]

log = logging.getLogger(__name__)

LARGE = 16 << 20  # bytes that are copied in a thread, not on the loop
LETHAL = 2  # workers that an item may kill before it is refused
REMEMBERED = 1024  # items that have killed
SAMPLE = 4096  # bytes of an array that tell one item from another


class Call:
    """One call on its way: what to run, and where its outcome goes."""

    __slots__ = ("arrays", "data", "deaths", "future", "idempotent", "link", "main", "number", "wall")

    def __init__(self, number: int, fn: Callable[..., Any], args: tuple[Any, ...], idempotent: bool) -> None:
        self.number = number
        self.data, self.arrays = pickled((fn, args))
        self.main = main_module() if b"__main__" in self.data else None
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.idempotent = idempotent
        self.deaths = 0
        self.link: Link | None = None  # to the worker that has it
        self.wall = 0.0  # seconds that it took in the worker

    @property
    def nbytes(self) -> int:
        """Bytes to be sent."""
        return len(self.data) + sum(array.nbytes for array in self.arrays)

    def digest(self) -> bytes:
        """Return what tells this item from others: its pickle, and a sample of each array."""
        known = blake2b(self.data, digest_size=16)
        for array in self.arrays:
            known.update(array.nbytes.to_bytes(8, "little") + array[:SAMPLE])
        return known.digest()

    def fail(self, error: BaseException) -> None:
        """End the call in an error."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # seen, even if its task is being cancelled at this moment


def main_module() -> dict[str, str]:
    """Return where the main module is, as multiprocessing tells its children; nothing for one without a file."""
    from multiprocessing.spawn import get_preparation_data

    return {name: value for name, value in get_preparation_data("").items() if name.startswith("init_main_from")}


class Processes:
    """At most `size` workers, started as they are needed or all by `warm`; belongs to one event loop.

    Functions, arguments and results must be picklable; arrays in them cost one copy in each direction. At most
    `max_waiting` calls wait for a worker. A worker that has held more than `memory` bytes is replaced after its call.
    """

    def __init__(self, size: int, *, memory: int, max_waiting: int) -> None:
        self.size = size
        self.deaths = 0  # workers that died on their own
        self.killed = 0  # workers that were killed at a call's timeout
        self.recycled = 0  # workers that had held too much memory
        self.done = 0  # calls that a worker has answered
        self._memory = memory
        self._max_waiting = max_waiting
        self._numbers = count(1)
        self._waiting: deque[Call] = deque()
        self._links: set[Link] = set()
        self._idle: list[Link] = []
        self._births: set[asyncio.Task[None]] = set()
        self._nursery: Nursery | None = None
        self._killers: Counter[bytes] = Counter()
        self._closed = False
        self._quiet: asyncio.Future[None] | None = None

    @property
    def started(self) -> int:
        """Workers that exist."""
        return len(self._links)

    @property
    def busy(self) -> int:
        """Workers that have a call."""
        return self._staying - len(self._idle)

    @property
    def _staying(self) -> int:
        """Workers that have not been told to end."""
        return sum(not link.closing for link in self._links)

    @property
    def waiting(self) -> int:
        """Calls that no worker has taken yet."""
        return len(self._waiting)

    @property
    def outstanding(self) -> int:
        """Calls that wait or run."""
        return self.waiting + self.busy

    @property
    def quarantined(self) -> int:
        """Items that are refused because each has killed two workers."""
        return sum(deaths >= LETHAL for deaths in self._killers.values())

    def submit(self, fn: Callable[..., Any], args: tuple[Any, ...], *, idempotent: bool = False) -> Call:
        """Hand a call to a worker; await its `future`.

        When the worker dies under it, it is done once more if `idempotent`, else WorkerDied is raised, as it is at
        once for an item that has killed two workers. Raises what pickle raises for something that cannot be sent;
        Closed, Overloaded.
        """
        if self._closed:
            raise Closed("the worker processes are closed")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} calls wait for {self.size} worker processes")
        call = Call(next(self._numbers), fn, args, idempotent)
        if self._killers and self._killers[call.digest()] >= LETHAL:
            raise WorkerDied(f"this call has killed {LETHAL} worker processes; it is not tried again")
        self._waiting.append(call)
        self._dispatch()
        return call

    def expire(self, call: Call) -> None:
        """End a call whose time is over: one that runs is killed with its worker, one that waits never starts."""
        call.future.cancel()
        if call.link is not None and call.link.call is call:
            self.killed += 1
            call.link.kill()

    def warm(self) -> None:
        """Start all workers now, without waiting for them."""
        self._bear(self.size - self._staying - len(self._births))

    def resize(self, size: int) -> None:
        """Have at most `size` workers from now on; those above it end with the call that they are at."""
        self.size = size
        while self._idle and self._staying > size:
            self._dismiss(self._idle.pop())
        self._dispatch()

    async def close(self, grace: float) -> None:
        """Fail what waits with Closed, give what runs `grace` seconds, then kill it; nothing is left afterwards."""
        self._closed = True
        for call in self._waiting:
            call.fail(Closed("the executor was closed before this call's turn came"))
        self._waiting.clear()
        await asyncio.gather(*self._births, return_exceptions=True)  # a fork under way cannot be called off
        while self._idle:
            self._dismiss(self._idle.pop())
        await self._quieten(grace)
        for link in self._links:
            link.kill()
        await self._quieten(None)
        if self._nursery is not None:
            await self._nursery.close()

    async def _quieten(self, seconds: float | None) -> None:
        """Wait until no worker is left, at most so long."""
        if self._links:
            self._quiet = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._quiet], timeout=seconds)

    # ---- births

    def _bear(self, number: int) -> None:
        for _ in range(number):
            birth = asyncio.get_running_loop().create_task(self._birth(), name="worker-birth")
            self._births.add(birth)
            birth.add_done_callback(self._born)

    async def _birth(self) -> None:
        if self._nursery is None:
            self._nursery = Nursery()
        ours, theirs = socket.socketpair()
        files = [shared_file(), shared_file()]
        try:
            with theirs:
                pid = await self._nursery.bear(theirs.fileno(), *files)
            link = Link(pid, Outbox(files[0]), Inbox(files[1]), self._answered, self._lost)
        except BaseException:
            ours.close()
            for file in files:
                os.close(file)
            raise
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        self._births.discard(asyncio.current_task())  # from here on it counts as a worker
        self._links.add(link)
        self._free(link)

    def _born(self, birth: asyncio.Task[None]) -> None:
        self._births.discard(birth)
        if birth.cancelled() or (error := birth.exception()) is None:
            return
        log.error("a worker process could not be started: %s", error)
        if not self._links and not self._births:
            for call in self._waiting:
                call.fail(WorkerDied(f"no worker process could be started: {error}"))
            self._waiting.clear()

    # ---- the way of a call

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            call = self._waiting.popleft()
            if not call.future.done():  # else its caller has gone before its turn came
                self._hand_over(call, self._idle.pop())
        wanted = min(len(self._waiting), self.size - self._staying) - len(self._births)
        if wanted > 0 and not self._closed:
            self._bear(wanted)

    def _hand_over(self, call: Call, link: Link) -> None:
        link.call, call.link = call, link
        if call.nbytes < LARGE:
            link.send(call.number, *placed(call.data, call.arrays, link.outbox), main=call.main)
            return
        copying = asyncio.get_running_loop().run_in_executor(None, placed, call.data, call.arrays, link.outbox)
        copying.add_done_callback(lambda done: self._copied(link, call, done))

    def _copied(self, link: Link, call: Call, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or link.call is not call:  # the worker died meanwhile
            return
        if error := done.exception():
            call.fail(Overloaded(f"the arguments of this call are too large: {error}"))
            self._free(link)
        else:
            link.send(call.number, *done.result(), main=call.main)

    def _answered(self, link: Link, good: bool, outcome: Any, peak: int, wall: float) -> None:
        call = link.call
        if call is not None:
            call.wall = wall
            self.done += 1
        if self._killers and call is not None:
            self._killers.pop(call.digest(), None)  # it can be done after all
        if call is not None and not call.future.done():
            if good:
                call.future.set_result(outcome)
            else:
                call.fail(outcome)
        if peak > self._memory:
            self.recycled += 1
            self._dismiss(link)
        else:
            self._free(link)

    def _free(self, link: Link) -> None:
        """Give a worker its next call, or let it go."""
        link.call = None
        if self._closed or self._staying > self.size:
            self._dismiss(link)
        else:
            self._idle.append(link)
        self._dispatch()

    # ---- deaths

    def _dismiss(self, link: Link) -> None:
        link.call = None
        link.close()

    def _lost(self, link: Link) -> None:
        """Go on without a worker that has ended, and with its call if that may be done again."""
        self._links.discard(link)
        if link in self._idle:
            self._idle.remove(link)
        call, link.call = link.call, None
        if call is not None or not link.closing:
            self.deaths += not link.killed
        if call is not None:
            self._bereaved(call, link.began(call.number))
        if not self._links and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)
        self._dispatch()

    def _bereaved(self, call: Call, began: bool) -> None:
        if call.future.done():
            return
        if self._closed:
            call.fail(Closed("the executor was closed, and the call did not end in time"))
            return
        if began:
            call.deaths += 1
            self._killers[call.digest()] += 1
            while len(self._killers) > REMEMBERED:
                del self._killers[next(iter(self._killers))]
        if not began or (call.idempotent and call.deaths < LETHAL):
            self._waiting.appendleft(call)
        else:
            call.fail(WorkerDied("a worker process ended while it had this call; another one has taken its place"))
