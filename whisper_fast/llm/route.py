"""Which endpoint a call goes to, and which one next after an error, after what pause."""

from __future__ import annotations

from random import uniform
from typing import TYPE_CHECKING, Literal, get_args

from whisper_fast.errors import LLMRateLimited, LLMUnavailable, WhisperFastError

from .prefix import prefix, ranked, within

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whisper_fast.message import ChatMessage

    from .budget import Budget
    from .upstream import Upstream

__all__ = ["ORDERS", "Order", "Route", "ordered"]

Order = Literal["listed", "fastest", "prefix"]
ORDERS: tuple[str, ...] = get_args(Order)

JITTER = (0.05, 0.25)  # seconds before the same endpoint is asked again
PATIENCE = 1.0  # seconds; a longer pause is only worth it where no other endpoint is left


def ordered(upstreams: Sequence[Upstream], order: Order, messages: Sequence[ChatMessage]) -> Sequence[Upstream]:
    """Return the endpoints in the order in which a call tries them.

    listed   as they were given
    fastest  by the time that a call is expected to take, its wait included
    prefix   for a long beginning by rendezvous, so that it stays with one endpoint while that one's load is within
             1.25 of the mean; otherwise as fastest
    """
    if order == "listed" or len(upstreams) == 1:
        return upstreams
    by_time = sorted(upstreams, key=lambda upstream: upstream.expected)
    if order == "fastest" or (key := prefix(messages)) is None:
        return by_time
    total = sum(upstream.load for upstream in upstreams)
    best = [upstreams[at] for at in ranked(key, (upstream.name for upstream in upstreams))]
    return sorted(best, key=lambda upstream: not within(upstream.load, total, len(upstreams)))


class Route:
    """The way of one call over its endpoints, in order.

    An endpoint that was unavailable or rate limited is asked once more, if the pool's budget for that allows it,
    after a pause with jitter and not before its Retry-After, if that fits in the time left; then the next one has
    its turn. Errors that are not retriable end the call. So a call makes at most two attempts per endpoint.
    """

    __slots__ = ("_again", "_retries", "at", "upstreams")

    def __init__(self, upstreams: Sequence[Upstream], retries: Budget) -> None:
        self.upstreams = upstreams
        self.at = 0
        self._again = False
        self._retries = retries

    @property
    def upstream(self) -> Upstream:
        """The endpoint whose turn it is."""
        return self.upstreams[self.at]

    @property
    def last(self) -> bool:
        """Whether there is no other one after it."""
        return self.at + 1 == len(self.upstreams)

    def skip(self) -> None:
        """Go on to the next endpoint."""
        self.at += 1
        self._again = False

    def failed(self, error: WhisperFastError, left: float) -> float:
        """Return the pause in seconds before `upstream` is asked; raises `error` when nobody is left to ask."""
        if not error.retriable or left <= 0:
            raise error
        if not self._again and isinstance(error, (LLMUnavailable, LLMRateLimited)):
            pause = max(error.retry_after or 0.0, 0.0) + uniform(*JITTER)
            if pause < (left if self.last else min(left, PATIENCE)) and self._retries.spend():
                self._again = True
                return pause
        if self.last:
            raise error
        self.skip()
        return 0.0
