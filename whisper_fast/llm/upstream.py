"""One endpoint as the pool sees it: who answers, how many at once, whether it is well, and how it went."""

from __future__ import annotations

import asyncio
from collections import Counter
from math import inf
from typing import TYPE_CHECKING, Any

from whisper_fast.breaker import Breaker
from whisper_fast.errors import LLMError, LLMRateLimited, LLMTimeout, LLMUnavailable, WhisperFastError
from whisper_fast.flags import logged
from whisper_fast.limits import AdaptiveLimit

from .endpoint import Endpoint
from .latency import Latency
from .provider import OpenAIProvider
from .slots import Slots
from .wire import believable

if TYPE_CHECKING:
    from collections.abc import Callable

    from whisper_fast.message import Usage

    from .alarm import Alarm
    from .completion import ChatProvider
    from .hedge import Hedge
    from .slots import Caller

__all__ = ["Upstream", "Visit"]

TOKENS = 1000.0  # what a call is taken to cost before the first was answered
PATIENCE = 2.0  # seconds; callers wait for a server that is left alone for less, and are sent away otherwise
LONGEST_PAUSE = 60.0  # seconds that a server's Retry-After is respected
GRAIN = 0.002  # seconds that a timer of the loop may be early
SOON = 1.0  # seconds that a call is given before it is late, while nothing is known of the endpoint
OVERLOADED = (503, 529)
HIGH = 0.93  # the quantile of latencies that a hedge waits for


class Visit:
    """One attempt at an endpoint. It holds a slot until it was `answered`, `failed` or has `left`."""

    first = 0.0  # seconds until the first piece of a stream
    watch: tuple[Callable[..., None], tuple[Any, ...]] | None = None  # how to hedge it, while there is no answer
    hedge: Hedge[Any] | None = None

    def __init__(self, upstream: Upstream, caller: Caller, begun: float, pass_: int, since: float) -> None:
        self.upstream = upstream
        self.caller = caller
        self.begun = begun
        self.pass_ = pass_
        self.since = since
        self.cost = upstream.tokens

    def began(self, now: float) -> None:
        """Count the first piece of a stream."""
        self.watch = None
        self.first = now - self.begun
        self.upstream.first.observe(self.first)

    def spent(self, usage: Usage) -> None:
        """Charge the user for a stream that did not come to its end what it took, not what a call is expected to."""
        upstream, tokens = self.upstream, sum(counted(usage))
        upstream.slots.settle(self.caller, tokens - self.cost, self.since)
        self.cost = tokens

    def answered(self, usage: Usage | None) -> None:
        """Count an answer and give the slot back."""
        self.upstream.answered(self, usage)

    def failed(self, error: WhisperFastError) -> None:
        """Count a failure and give the slot back."""
        self.watch = None
        self.upstream.failed(self, error)

    def left(self) -> None:
        """Give the slot back; the call went away, which says nothing about the endpoint."""
        self.watch = None
        self.upstream.left(self)


class Upstream:
    """An endpoint with its slots, limit and breaker.

    An endpoint that keeps failing, or asks to be left alone, is shut: callers for whom the pool finds no other one
    wait for it when it opens within 2 s, and are sent away otherwise. It is opened by one call that goes first. All
    that is known of its health comes from the calls themselves; nothing ever probes it on the side.
    """

    def __init__(
        self,
        source: Endpoint | ChatProvider,
        max_concurrent: int,
        max_waiting: int,
        alarm: Alarm,
        clock: Callable[[], float],
        adaptive: Callable[[], bool],
        failed: Callable[[str, Exception], None] = logged,
    ) -> None:
        declared = source.max_concurrent if isinstance(source, Endpoint) else None
        start = declared or max_concurrent
        self.provider: ChatProvider = (
            OpenAIProvider(source, timeout=None)
            if isinstance(source, Endpoint)
            else source  # the pool's budget limits
        )
        self.name = self.provider.name
        self.batches = getattr(self.provider, "batches", None)
        self.slots = Slots(start, max_waiting, alarm, clock)
        self.limit = AdaptiveLimit(start, most=declared) if declared else AdaptiveLimit(start)
        self.breaker = Breaker()
        self.tokens = TOKENS  # mean of a call
        self.whole, self.first = Latency(HIGH), Latency(HIGH)
        self.calls = 0
        self.errors: Counter[str] = Counter()
        self._clock = clock
        self._adaptive = adaptive
        self._failed = failed
        self._timer: asyncio.TimerHandle | None = None
        self._until = 0.0  # it is shut until then
        self._opened = 0  # how often the breaker had opened when it was shut last

    # ---- who comes

    def take(self, caller: Caller, now: float) -> Visit | None:
        """Return a visit if a slot is free and the endpoint is well."""
        since = self.slots.take(caller, self.tokens)
        return None if since < 0 else self._visit(caller, now, since)

    async def acquire(self, caller: Caller, timeout: float | None) -> Visit:
        """Return a visit, waiting for a slot at most `timeout` seconds.

        Raises what `Slots.acquire` raises, and LLMUnavailable when the endpoint stays shut for longer than 2 s.
        """
        until = None if timeout is None else self._clock() + timeout
        while True:
            left = None if until is None else max(0.0, until - self._clock())
            if self.slots.shut and self.shut_for > self._patience(left):
                raise self._away()
            since = await self.slots.acquire(caller, self.tokens, left)
            if visit := self._visit(caller, self._clock(), since):
                return visit  # and otherwise it was shut between its turn and this moment

    def _visit(self, caller: Caller, now: float, since: float) -> Visit | None:
        pass_ = self.breaker.enter(now)
        if pass_ < 0:
            self.slots.settle(caller, -self.tokens, since)
            self.slots.release()
            return None
        self.calls += 1
        return Visit(self, caller, now, pass_, since)

    @property
    def shut_for(self) -> float:
        """Seconds until a call may go there."""
        return max(0.0, self._until - self._clock()) if self.slots.shut else 0.0

    @property
    def expected(self) -> float:
        """Seconds that a call would take from now on, its wait included; 0 while nothing is known."""
        slots = self.slots
        return self.whole.mean * (1 + slots.waiting / slots.limit)

    @property
    def load(self) -> int:
        """How many calls it has or will have."""
        return self.slots.in_flight + self.slots.waiting

    # ---- how it went

    def answered(self, visit: Visit, usage: Usage | None) -> None:
        """Count what a visit's answer tells about latency, tokens and health."""
        visit.watch = None
        now = self._clock()
        sent, received = counted(usage) if usage is not None else (0, 0)
        tokens, in_flight = sent + received, self.slots.in_flight
        if visit.first:
            self._learn(self.limit.answered, now, visit.begun, in_flight, sent, visit.first, "first token")
        else:
            self.whole.observe(now - visit.begun)
            if 2 * in_flight >= self.slots.limit:  # fewer calls do not show what it bears
                self._learn(self.limit.answered, now, visit.begun, in_flight, received)
        if tokens:
            self.tokens += (tokens - self.tokens) / 64
            if visit.caller.shares:
                self.slots.divide(visit.caller, visit.cost, tokens, visit.since)
            else:
                self.slots.settle(visit.caller, tokens - visit.cost, visit.since)
        self.breaker.succeeded(visit.pass_)
        self._released()

    def failed(self, visit: Visit, error: WhisperFastError) -> None:
        """Count a visit's error; only those of the server tell about its health, those of the request do not."""
        now = self._clock()
        self.errors[type(error).__name__] += 1
        if not isinstance(error, LLMError) or self._hurried(visit, error, now):
            return self.left(visit)
        if isinstance(error, LLMRateLimited) or error.status in OVERLOADED:
            self._learn(self.limit.refused, now, visit.begun, self.slots.in_flight)
        elif isinstance(error, LLMTimeout):
            self._learn(self.limit.late, now, visit.begun, self.slots.in_flight)
        if error.outage:
            self.breaker.failed(visit.pass_, now, error.retry_after)
        else:
            self.breaker.succeeded(visit.pass_)
        if isinstance(error, LLMRateLimited) and error.retry_after and self.breaker.state == "closed":
            self._shut(min(error.retry_after, LONGEST_PAUSE))
        return self._released()

    def _learn(self, step: Callable[..., None], *args: Any) -> None:
        """Let the limit learn; whatever is wrong with it, the call has its answer and the slot comes back."""
        try:
            step(*args)
        except Exception as error:  # noqa: BLE001
            self._failed("adaptive", error)

    def left(self, visit: Visit) -> None:
        """Count nothing."""
        self.breaker.left(visit.pass_)
        self._released()

    def _hurried(self, visit: Visit, error: WhisperFastError, now: float) -> bool:
        """Whether a call ran out of time only because its caller had given it less than many calls take."""
        usual = self.whole if self.whole.mean else self.first
        enough = usual.high if usual.high < inf else max(SOON, 4 * usual.mean)
        return isinstance(error, LLMTimeout) and now - visit.begun < enough

    def _released(self) -> None:
        """Give the slot back, after everything that decides who may have it next."""
        limit, slots = self.limit, self.slots
        if self._adaptive() is not limit.adaptive:
            limit.follow(not limit.adaptive)
        if limit.value != slots.limit:
            slots.resize(limit.value)
        if slots.shut or self.breaker.state != "closed":
            self._attend()
        slots.release()

    # ---- shut and open

    def _attend(self) -> None:
        """Bring the slots in line with the breaker after a call has told it something."""
        state = self.breaker.state
        if state == "closed":
            if self._timer is None:
                self.slots.open()
        elif state == "open":
            if self._opened != self.breaker.opened:
                self._opened = self.breaker.opened
                self._shut(self.breaker.wait(self._clock()))
        elif self.breaker.wait(self._clock()) == 0:  # the probe was given up
            self.slots.admit_one()

    def _shut(self, seconds: float) -> None:
        self.slots.shut = True
        until = self._clock() + seconds
        if self._timer is not None:
            if until <= self._until:
                return
            self._timer.cancel()
        self._until = until
        self._timer = asyncio.get_running_loop().call_later(seconds + GRAIN, self._over)
        if seconds > PATIENCE and self.breaker.state != "closed":
            self.slots.fail(self._away())

    def _over(self) -> None:
        self._timer = None
        if self.breaker.state == "closed":
            self.slots.open()
        else:
            self.slots.admit_one()

    def _patience(self, timeout: float | None) -> float:
        """How long a caller may wait while it is shut: all of its queue time for a server that only is too busy."""
        return PATIENCE if self.breaker.state != "closed" or timeout is None else timeout

    def _away(self) -> LLMError:
        seconds = self.shut_for or self.breaker.cooldown
        if self.breaker.state == "closed":
            return LLMRateLimited(f"{self.name}: it asked to be left alone for {seconds:.0f} s", retry_after=seconds)
        return LLMUnavailable(f"{self.name}: it keeps failing and is left alone for now", retry_after=seconds)

    # ---- end and statistics

    async def close(self) -> None:
        """Close the provider; the slots were closed before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self.provider.close()

    def stats(self) -> dict[str, Any]:
        """Return what `LLMPool.stats` shows of an endpoint; times in seconds."""
        slots, limit, tokens = self.slots, self.limit, getattr(self.provider, "tokens", None)
        return {
            "name": self.name,
            "in_flight": slots.in_flight,
            "limit": slots.limit,
            "limit_why": limit.why,
            "limit_moves": limit.moves,
            "waiting": slots.waiting,
            "waiting_by_priority": slots.by_priority(),
            "oldest_waiting": round(slots.oldest, 3),
            "calls": self.calls,
            "errors": dict(self.errors),
            "breaker": self.breaker.state,
            "breaker_opened": self.breaker.opened,
            "shut_for": round(self.shut_for, 3),
            "latency": round(self.whole.mean, 4),
            "first_token": round(self.first.mean, 4),
            "tokens": tokens.stats() if tokens is not None else {},
        }


def counted(usage: Usage) -> tuple[int, int]:
    """Return the tokens sent and received; none for counts that cannot be true, which no user is charged."""
    sent, received = usage.prompt_tokens, usage.completion_tokens
    return (sent, received) if believable(sent, received) else (0, 0)
