"""Many callers, few slots: the pool admits, times, retries, hedges and falls back, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from whisper_fast import clock as everybody
from whisper_fast.errors import (
    Closed,
    InvalidMessage,
    LLMError,
    LLMRateLimited,
    LLMUnavailable,
    Overloaded,
    SettingsError,
)
from whisper_fast.flags import either, logged

from .alarm import Alarm
from .budget import Budget
from .call import Call, Overtaken
from .flight import Flights, deterministic, identity
from .hedge import BURST, SHARE, SOONEST, Hedge, Hedges
from .reading import Reading
from .route import ORDERS, Order, Route, ordered
from .slots import Caller, Share
from .upstream import Upstream, Visit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
    from types import TracebackType
    from typing import Self

    from whisper_fast.message import ChatMessage, Delta

    from .completion import ChatProvider, Completion
    from .endpoint import Endpoint

__all__ = ["LLMPool"]

UNWIND = 5.0  # seconds that interrupted calls have to give back what they hold
TICK = 0.02  # seconds that a deadline may be late
RETRIES = (0.1, 10.0)  # retries for each answer, and how many at once after a calm time


def on() -> bool:
    return True


class LLMPool:
    """Language models, each with a limit on its concurrent calls that starts at `max_concurrent` and adapts.

    A source is an Endpoint or anything that is a ChatProvider; the pool closes them with itself. A call waits
    for its slot at most `queue_timeout` seconds (None: as long as it takes), then has `timeout` seconds for
    everything else: connecting, the first token, the last token, retries. Who waits goes by priority (smaller first),
    then by fairness between users in tokens (`_fair.FairQueue`). `order` says which endpoint a call tries first
    (`route.ordered`); `Route` which errors are tried again, `Upstream` when an endpoint is left alone.

        async with LLMPool([Endpoint("http://127.0.0.1:1234"), SimulatedLLM()], max_concurrent=50) as pool:
            completion = await pool.chat([{"role": "user", "content": "hi"}])

    `adaptive`, `hedging` and `coalescing` are asked before each use, so that they can be switched while it runs: the
    limits that follow the servers (`limits.AdaptiveLimit`), second attempts of slow calls (`hedge.Hedges`), one call
    for equal deterministic requests under way (`flight`). `failed` is told by its flag's name which of them raised;
    the call goes on without it.

    Errors of a call: Overloaded when `max_waiting` calls wait already, DeadlineExceeded when no slot became
    free, LLMTimeout when the time was used up, Closed when the pool was closed, and the other LLMErrors of
    the providers.
    """

    def __init__(
        self,
        sources: Sequence[Endpoint | ChatProvider],
        *,
        max_concurrent: int = 50,
        timeout: float = 90.0,
        queue_timeout: float | None = 90.0,
        max_waiting: int = 100_000,
        order: Order = "listed",
        adaptive: Callable[[], bool] = on,
        hedging: Callable[[], bool] = on,
        coalescing: Callable[[], bool] = on,
        failed: Callable[[str, Exception], None] = logged,
        clock: Callable[[], float] | None = None,
    ) -> None:
        check(sources, max_concurrent, order)
        clock = everybody.monotonic if clock is None else clock
        self._clock = clock
        self._alarm = Alarm(TICK, clock)
        self._upstreams: Sequence[Upstream] = [
            Upstream(source, max_concurrent, max_waiting, self._alarm, clock, adaptive, failed) for source in sources
        ]
        self._timeout = checked(timeout)
        self._queue_timeout = queue_timeout
        self._order: Order = order
        self._retries = Budget(*RETRIES)
        self._hedging = hedging
        self._hedges = Hedges(clock, Budget(SHARE, BURST), failed)
        self._coalescing = coalescing
        self._failed = failed
        self._flights = Flights()
        self._closed = False

    @property
    def limit(self) -> int:
        """How many calls may be in flight at once, over all endpoints."""
        return sum(upstream.slots.limit for upstream in self._upstreams)

    @property
    def models(self) -> tuple[str, ...]:
        """The models in order of preference, as far as they are known; a server's own choice is once it was asked."""
        models = (getattr(upstream.provider, "model", upstream.name) for upstream in self._upstreams)
        return tuple(dict.fromkeys(model for model in models if model))

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        user: str | None = None,
        priority: int = 0,
        weight: float = 1.0,
        timeout: float | None = None,
        shared: bool = False,
        shares: Sequence[Share] = (),
        **params: Any,
    ) -> Coroutine[Any, Any, Completion]:
        """Return the answer to `messages`; smaller `priority` is served first, from -100 to 100.

        `user` says whose call it is; it stays in this process. One of `weight` 2 gets twice the share of one of 1
        while both wait. `shares` says who pays for a call that answers several, instead of `user`. Equal requests
        under way at temperature 0 or with a seed are one call, within one user, and with others' only where both are
        `shared`. `params` goes to the model as it is.
        """
        caller = caller_of(user, priority, weight, shares)
        if params and deterministic(params) and (shared or user is not None) and self._coalescing():
            key = identity(None if shared else user, (shared, priority, weight, timeout), messages, params)
            if key is not None:
                alone = partial(self._chat, messages, caller, timeout, params)
                return either("batching", partial(self._flights.join, key, alone), alone, self._failed)
        return self._chat(messages, caller, timeout, params)

    async def _chat(
        self, messages: Sequence[ChatMessage], caller: Caller, timeout: float | None, params: dict[str, Any]
    ) -> Completion:
        call, route = self._begin(messages, timeout)
        try:
            while True:
                upstream = route.upstreams[route.at]
                visit = upstream.take(caller, self._clock()) or await self._admit(route, caller)
                call.arm(visit.begun)
                if SOONEST < (whole := visit.upstream.whole).high < inf and self._hedging():
                    self._hedges.watch(whole, visit, self._hedge_chat, (call, route, messages, params))
                try:
                    with call:
                        answer = await visit.upstream.provider.chat(messages, **params)
                except BaseException as error:
                    if (rescued := await rescue(call, visit, error)) is not None:
                        return rescued
                    if not isinstance(error, LLMError):
                        raise
                    pause = route.failed(error, call.left)
                else:
                    visit.upstream.answered(visit, answer.usage)
                    self._earn()
                    return answer
                finally:
                    if visit.hedge is not None:
                        visit.hedge.cancel()
                await self._pause(call, pause)
        finally:
            call.end()

    async def stream(
        self,
        messages: Sequence[ChatMessage],
        *,
        user: str | None = None,
        priority: int = 0,
        weight: float = 1.0,
        timeout: float | None = None,
        **params: Any,
    ) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece, as `chat` otherwise; after the first piece nothing is tried again.

        Whoever stops before the end should `aclose()` the iterator: that ends the call upstream and frees its
        slot.
        """
        caller = caller_of(user, priority, weight)
        call, route = self._begin(messages, timeout)
        try:
            while True:
                upstream = route.upstreams[route.at]
                visit = upstream.take(caller, self._clock()) or await self._admit(route, caller)
                call.arm(visit.begun)
                reading, begun = Reading(visit, messages, params), False
                settle: Callable[[], None] = visit.left
                try:
                    reading, pieces = await self._first(call, route, reading, messages, params)
                    settle, begun = reading.visit.left, True
                    while True:
                        for piece in pieces:
                            yield piece
                        with call:  # only in here the call may be interrupted
                            pieces = await reading.next()
                except StopAsyncIteration:
                    settle = partial(reading.visit.answered, reading.usage)
                    self._retries.earn()
                    return
                except LLMError as error:
                    settle = partial(reading.visit.failed, error)
                    if begun:
                        raise
                    pause = route.failed(error, call.left)
                finally:
                    try:
                        await reading.close()
                    finally:
                        settle()
                await self._pause(call, pause)
        finally:
            call.end()

    async def _first(
        self, call: Call, route: Route, reading: Reading, messages: Sequence[ChatMessage], params: dict[str, Any]
    ) -> tuple[Reading, Sequence[Delta]]:
        """Return the first pieces and where to read on: of the attempt, or of its hedge where that was first."""
        visit = reading.visit
        if SOONEST < (first := visit.upstream.first).high < inf and self._hedging():
            self._hedges.watch(first, visit, self._hedge_stream, (call, route, messages, params))
        try:
            with call:
                pieces = await reading.next()
            visit.began(self._clock())
            self._hedges.budget.earn()
            return reading, pieces
        except Overtaken:
            await reading.leave()
            assert visit.hedge is not None  # noqa: S101 - nobody else overtakes
            found: tuple[Reading, Sequence[Delta]] = visit.hedge.take_result()
            return found
        finally:
            if visit.hedge is not None:
                visit.hedge.cancel()

    def stats(self) -> dict[str, Any]:
        """Return in_flight, limit, waiting, calls, errors (class name -> count) and more, in all and per endpoint.

        `tokens` counts those of calls that failed or were cancelled on the way too.
        `calls` and `errors` count attempts at an endpoint: a call that was tried again counts twice.
        """
        endpoints = [upstream.stats() for upstream in self._upstreams]
        total: dict[str, Any] = {
            key: sum(endpoint[key] for endpoint in endpoints) for key in ("in_flight", "limit", "waiting", "calls")
        }
        tokens: Counter[str] = Counter()
        for endpoint in endpoints:
            tokens.update(endpoint["tokens"])
        return total | {
            "errors": dict(sum((upstream.errors for upstream in self._upstreams), Counter[str]())),
            "oldest_waiting": max(endpoint["oldest_waiting"] for endpoint in endpoints),
            "retries": self._retries.spent,
            "retries_denied": self._retries.denied,
            "hedges": self._hedges.budget.spent,
            "hedges_won": self._hedges.won,
            "coalesced": self._flights.joined,
            "tokens": dict(tokens),
            "endpoints": endpoints,
        }

    async def close(self) -> None:
        """End every call with Closed, close the providers; returns when nothing is left. May be called twice."""
        self._closed = True
        for upstream in self._upstreams:
            upstream.slots.close()
        calls = [sleeper for sleeper in self._alarm if isinstance(sleeper, Call)]
        for call in calls:
            call.strike(Closed("the pool was closed during this call"))
        inside = [left for call in calls if (left := call.outside()) is not None]
        if inside:
            await asyncio.wait(inside, timeout=UNWIND)
        await self._flights.close()
        await self._hedges.close()
        for upstream in self._upstreams:
            await upstream.close()
        self._alarm.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _begin(self, messages: Sequence[ChatMessage], timeout: float | None) -> tuple[Call, Route]:
        if self._closed:
            raise Closed("the pool is closed")
        call = Call(self._timeout if timeout is None else checked(timeout), self._alarm, self._clock)
        upstreams = self._upstreams
        if self._order != "listed":
            upstreams = ordered(upstreams, self._order, messages)
        return call, Route(upstreams, self._retries)

    async def _admit(self, route: Route, caller: Caller) -> Visit:
        """Return a visit of the route's endpoint, or of a later one where that is shut or overloaded."""
        while True:
            if not route.last and route.upstream.slots.shut:
                route.skip()
                continue
            try:
                return await route.upstream.acquire(caller, self._queue_timeout)
            except (Overloaded, LLMUnavailable, LLMRateLimited):
                if route.last:
                    raise
                route.skip()

    async def _pause(self, call: Call, seconds: float) -> None:
        """Wait within the call's budget, holding no slot, before it queues again."""
        if seconds:
            with call:
                await asyncio.sleep(seconds)
        call.disarm()

    def _earn(self) -> None:
        if (retries := self._retries).left < retries.burst:
            retries.earn()
        if (hedges := self._hedges.budget).left < hedges.burst:
            hedges.earn()

    def _second(self, route: Route, visit: Visit) -> Visit | None:
        """Return a visit for a hedge: of the same endpoint where the order is one of preference, else of the next."""
        others = [upstream for upstream in route.upstreams if upstream is not visit.upstream]
        if self._order == "listed" or not others:
            others = [visit.upstream] if visit.upstream.slots.limit > 1 else []
        now = self._clock()
        for upstream in others:
            if second := upstream.take(visit.caller, now):
                return second
        return None

    def _hedge_chat(
        self, visit: Visit, call: Call, route: Route, messages: Sequence[ChatMessage], params: dict[str, Any]
    ) -> None:
        if (second := self._second(route, visit)) is not None:
            attempt = asked(second, messages, params)
            visit.hedge = Hedge(
                self._hedges, call, second, attempt, lambda visit, answer: visit.answered(answer.usage)
            )

    def _hedge_stream(
        self, visit: Visit, call: Call, route: Route, messages: Sequence[ChatMessage], params: dict[str, Any]
    ) -> None:
        if (second := self._second(route, visit)) is not None:
            attempt = opened(Reading(second, messages, params), self._clock)
            visit.hedge = Hedge(self._hedges, call, second, attempt, discard=lambda found: found[0].leave())


async def asked(visit: Visit, messages: Sequence[ChatMessage], params: dict[str, Any]) -> Completion:
    return await visit.upstream.provider.chat(messages, **params)


async def opened(reading: Reading, clock: Callable[[], float]) -> tuple[Reading, Sequence[Delta]]:
    """Return a stream with its first pieces; one that is given up before is closed."""
    try:
        pieces = await reading.next()
    except BaseException:
        await reading.close()
        raise
    reading.visit.began(clock())
    return reading, pieces


async def rescue(call: Call, visit: Visit, error: BaseException) -> Completion | None:
    """Settle a visit that has ended with `error`; return the answer of its hedge, None where there is none."""
    hedge = visit.hedge
    if isinstance(error, Overtaken) and hedge is not None:
        visit.left()
        answer: Completion = hedge.take_result()
        return answer
    if not isinstance(error, LLMError):
        visit.left()
        return None
    visit.failed(error)
    if hedge is None or not hedge.running:
        return None
    try:
        with call:
            answer = await hedge.result()
    except Overtaken:  # by the same answer, a moment before it was looked at
        answer = hedge.take_result()
    except LLMError:
        return None
    return answer


def caller_of(user: str | None, priority: int, weight: float, shares: Sequence[Share] = ()) -> Caller:
    """Return the caller; raises InvalidMessage for what the queue cannot sort."""
    if not (user is None or isinstance(user, str)) or not isinstance(priority, int):
        kinds = f"{type(user).__name__} and {type(priority).__name__}"
        raise InvalidMessage(f"user and priority are {kinds}; they must be str (or None) and int")
    if not isinstance(weight, int | float) or not 0.001 <= weight <= 1000:
        raise InvalidMessage(f"weight is {weight!r:.40}; it must be from 0.001 to 1000")
    for share in shares:
        caller_of(share.user, share.priority, weight)
        if not 0 <= share.part <= 1:
            raise InvalidMessage(f"a share's part is {share.part!r:.40}; it must be from 0 to 1")
    return Caller(user, priority, weight, tuple(shares))


def check(sources: Sequence[Endpoint | ChatProvider], max_concurrent: int, order: str) -> None:
    """Raise SettingsError for a pool that could never answer."""
    if not sources:
        raise SettingsError("a pool needs at least one endpoint")
    if max_concurrent < 1:
        raise SettingsError(f"max_concurrent is {max_concurrent}; it must be at least 1")
    if order not in ORDERS:
        raise SettingsError(f"order is {order!r:.40}; it is one of {', '.join(ORDERS)}")


def checked(timeout: float) -> float:
    """Return a number of seconds; raises SettingsError for one that is none."""
    if timeout >= 0:
        return timeout
    raise SettingsError(f"timeout is {timeout!r:.40}; it must be a number of seconds")
