"""A bounded cache: as fast as a dict to ask, weighed to the byte, and one load for all who miss the same key.

The table, its eviction policy and the counters are compiled: see `pyx/_cache.pyx`. This module adds the loading.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from contextvars import ContextVar
from inspect import Parameter, isawaitable, signature
from typing import Any, Final, TypeVar

import msgspec

from . import clock
from ._cache import Table, bounded
from .errors import Closed, LoadCycle, own_copy

__all__ = ["Cache", "CacheStats", "Resizing"]

K = TypeVar("K")
V = TypeVar("V")

MISSING: Final = object()
SLICE: Final = 0.0007  # seconds of evicting in one turn of the loop
POSITIONAL: Final = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class CacheStats(msgspec.Struct, frozen=True):
    """What a cache has counted, and what it holds.

    Always hits + misses = gets, and puts - evictions - expirations - removals = entries. A value that was replaced
    counts as removed; `refused` were heavier than the whole cache; `loads` are calls of a loader.
    """

    hits: int
    misses: int
    puts: int
    refused: int
    evictions: int
    expirations: int
    removals: int
    loads: int
    load_failures: int
    entries: int
    weight: float
    max_weight: float

    @property
    def gets(self) -> int:
        """How often a value was asked for."""
        return self.hits + self.misses


class Cache(Table[K, V]):
    """A map that holds at most `max_weight`; which entry goes, it learns from what is asked for.

    weigher   called with a value, or with key and value if it needs two arguments; returns what it weighs (0 or
              more, whole numbers add up exactly). Without one each entry weighs 1. Weights of 0 are not bounded.
    ttl       seconds that an entry lives after it was put, on a clock that never jumps; checked when it is read
    on_evict  called with key and value when the cache itself let an entry go (no room, or expired), after it has
              gone; it may use the cache
    clock     seconds as a float; for tests that must not wait
    refresh_ahead
              0: off; 1 is usual, more is earlier. A hit through `get_or_load` on an entry that will expire soon
              answers with what is held and loads it once again in the background, if
              now + took * refresh_ahead * -ln(u) >= expiry, where `took` is how long loads took lately and u is
              random in (0, 1]: rarely long before, surely at the end, so that no two callers meet an empty place
              (XFetch: Vattani, Chierichetti and Lowenstein, VLDB 2015). `close` ends such loads

    A put of something heavier than `max_weight` returns False and leaves nothing under its key. A value that changed
    in place is weighed again by `reweigh`. Raises ValueError for a weight or ttl that is negative or NaN, TypeError
    for an unhashable key. Safe under threads; `get_or_load` shares a load between the callers of one event loop.
    """

    __slots__ = ("_load_failures", "_loads", "_refreshes")

    def __init__(
        self,
        max_weight: float,
        *,
        weigher: Callable[..., float] | None = None,
        ttl: float | None = None,
        on_evict: Callable[[K, V], object] | None = None,
        clock: Callable[[], float] | None = None,
        refresh_ahead: float = 0.0,
    ) -> None:
        pairwise = weigher is not None and needed(weigher) == 2
        super().__init__(
            max_weight,
            weigher=weigher,
            pairwise=pairwise,
            ttl=ttl,
            on_evict=on_evict,
            clock=clock,
            ahead=refresh_ahead,
        )
        self._loads = 0
        self._load_failures = 0
        self._refreshes: set[Flight] = set()

    def resize(self, max_weight: float) -> Resizing:
        """Set a new bound; what is too much goes in slices of at most about a millisecond.

        Returns when it is done, or within an event loop after the first slice: the loop takes one in each turn, and
        until the last the bound is what is held. Await the result to see the end. Raises ValueError for a bound that
        is negative, NaN or infinite, and what `on_evict` raises.
        """
        self._resizing = resizing = Resizing(self, bounded(max_weight))
        resizing.begin()
        return resizing

    @property
    def loading(self) -> int:
        """How many loads are under way."""
        return len(self._loading)

    async def _load(self, key: K, loader: Callable[..., Awaitable[V] | V]) -> V:
        flight: Flight | None = self._loading.get(key)
        if flight is None and (found := self.peek(key, MISSING)) is not MISSING:
            return found  # type: ignore[return-value]
        if flight is None or not flight.can_take(asyncio.get_running_loop()):
            flight = self._loading[key] = Flight(self, key, loader)
            flight.start()
        flight._guess = False
        value: V = await flight.join()
        return value

    async def warm(
        self, key: K, loader: Callable[..., Awaitable[V] | V], *, guess: bool = True, ttl: float | None = None
    ) -> None:
        """Load what is missing before it is asked for, for `ttl` seconds; it counts neither as a hit nor as a miss.

        What is loaded is a `guess`, unless `guess` is False or somebody asks for it meanwhile. Raises what the loader
        raises.
        """
        if key in self:
            return
        flight: Flight | None = self._loading.get(key)
        if flight is None or not flight.can_take(asyncio.get_running_loop()):
            flight = self._loading[key] = Flight(self, key, loader, guess=guess, ttl=ttl)
            flight.start()
        await flight.join()

    async def close(self) -> None:
        """End the loads that nobody waits for; the cache goes on."""
        tasks = [flight._task for flight in self._refreshes if flight._task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _refresh(self, key: K, loader: Callable[..., Awaitable[V] | V]) -> None:
        if key in self._loading or running_loop() is None:
            return
        flight = self._loading[key] = Flight(self, key, loader)
        self._refreshes.add(flight)
        flight.start()

    def held(self) -> dict[str, float]:
        """Return the weight held now and its bound, the entries, and the bytes of the table itself."""
        return {"bytes": self.weight, "max_bytes": self.max_weight, "entries": len(self), "table_bytes": self.nbytes}

    def stats(self) -> CacheStats:
        """Return the counters and what is held now."""
        return CacheStats(
            hits=self.hits,
            misses=self.misses,
            puts=self.puts,
            refused=self.refused,
            evictions=self.evictions,
            expirations=self.expirations,
            removals=self.removals,
            loads=self._loads,
            load_failures=self._load_failures,
            entries=len(self),
            weight=self.weight,
            max_weight=self.max_weight,
        )


class Resizing:
    """A change of a cache's bound under way. Await it to wait for its end; a later one takes its place."""

    __slots__ = ("_bound", "_cache", "_done", "_error")

    def __init__(self, cache: Cache[Any, Any], bound: float) -> None:
        self._cache = cache
        self._bound = bound
        self._done = False
        self._error: Exception | None = None

    def begin(self) -> None:
        """Take the first slice, and leave the others to the running loop if there is one."""
        self._take_slice()
        if not self._done and (loop := running_loop()) is not None:
            loop.call_soon(self._go_on, loop)
            return
        while not self._done:
            time.sleep(0)  # other threads have their turn
            self._take_slice()
        if self._error is not None:
            raise self._error

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._take_slice()
        if not self._done:
            loop.call_soon(self._go_on, loop)

    def _take_slice(self) -> None:
        try:
            self._done = self._cache.shrink(self._bound, SLICE, self)
        except Exception as error:  # noqa: BLE001 - whatever on_evict raises is for who waits
            self._error = self._error or error

    def __await__(self) -> Generator[Any, Any, None]:
        while not self._done:
            yield from asyncio.sleep(0).__await__()
        if self._error is not None:
            raise self._error


class Flight:
    """One load of one key, owned by those who wait for it."""

    __slots__ = (
        "_cache", "_ended", "_error", "_guess", "_key", "_loader", "_loop", "_needs", "_task", "_ttl", "_value",
        "_waiters",
    )  # fmt: skip

    def __init__(
        self,
        cache: Cache[Any, Any],
        key: Any,
        loader: Callable[..., Any],
        *,
        guess: bool = False,
        ttl: float | None = None,
    ) -> None:
        self._guess = guess  # nobody has asked for it
        self._ttl = ttl
        self._ended = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._needs: list[Flight] = []  # what its loader waits for in turn
        self._cache = cache
        self._key = key
        self._loader = loader
        self._waiters: set[asyncio.Future[Any]] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin the load."""
        self._cache._loads += 1
        task = self._loop.create_task(self._run(), name="cache-load")
        if not self._ended:  # an eager task may have run to its end already
            self._task = task

    def can_take(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether a caller on `loop` may still join."""
        return self._task is not None and self._loop is loop

    async def join(self) -> Any:
        """Wait for the value. Raises LoadCycle if it can only come after whoever asks now."""
        within = LOADING.get()
        if within is None:
            return await self._wait()
        if self.leads_to(within):
            raise LoadCycle("a loader asked for a value that waits for this loader; load it from what it depends on")
        within._needs.append(self)
        try:
            return await self._wait()
        finally:
            within._needs.remove(self)

    def leads_to(self, other: Flight) -> bool:
        """Whether this load waits for `other`, directly or through others."""
        seen, left = {self}, [self]
        while left:
            flight = left.pop()
            if flight is other:
                return True
            new = set(flight._needs) - seen
            seen |= new
            left += new
        return False

    async def _wait(self) -> Any:
        if self._ended:
            if self._error is not None:
                raise own_copy(self._error)
            return self._value
        waiter = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            return await waiter
        finally:
            self._waiters.discard(waiter)
            del waiter  # an error would keep itself alive through its traceback and this frame
            if not self._waiters and self._task is not None and self not in self._cache._refreshes:
                self._task.cancel()
                self._withdraw()

    async def _run(self) -> None:
        LOADING.set(self)
        began = clock.monotonic()
        try:
            self._land(await self._load())
            self._cache._took += (clock.monotonic() - began - self._cache._took) / 4
        except asyncio.CancelledError:
            self._fail(Closed("the load was cancelled while it was waited for"))
            raise
        except Exception as error:  # noqa: BLE001 - whatever a loader raises is for its waiters
            self._fail(error)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._cache._refreshes.discard(self)

    async def _load(self) -> Any:
        value = self._loader() if needed(self._loader) == 0 else self._loader(self._key)
        return await value if isawaitable(value) else value

    def _land(self, value: Any) -> None:
        if self._withdraw():
            (self._cache.guess if self._guess else self._cache.put)(self._key, value, ttl=self._ttl)
        self._task = None
        self._ended, self._value = True, value
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(value)

    def _fail(self, error: BaseException) -> None:
        self._task = None
        self._ended, self._error = True, error if not self._waiters else None
        self._cache._load_failures += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(own_copy(error))
                waiter.exception()  # seen, even if its task is being cancelled at this moment
        self._withdraw()

    def _withdraw(self) -> bool:
        """Stop taking further waiters; return whether the value may still be stored."""
        mine = self._cache._loading.get(self._key) is self
        if mine:
            del self._cache._loading[self._key]
        return mine


LOADING: ContextVar[Flight | None] = ContextVar("LOADING", default=None)


def running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def needed(function: Callable[..., Any]) -> int | None:
    """Return how many positional arguments `function` cannot do without; None if it does not say."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(p.kind in POSITIONAL and p.default is p.empty for p in parameters)
