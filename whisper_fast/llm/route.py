"""Which endpoint a call goes to next after an error, and after what pause."""

from __future__ import annotations

from random import uniform

from whisper_fast.errors import LLMRateLimited, LLMUnavailable, WhisperFastError

__all__ = ["Route"]

JITTER = (0.05, 0.25)  # seconds before the same endpoint is asked again
PATIENCE = 1.0  # seconds; a longer pause is only worth it where no other endpoint is left


class Route:
    """The way of one call over `endpoints` endpoints, in order.

    An endpoint that was unavailable or rate limited is asked once more, after a pause with jitter and not
    before its Retry-After, if that fits in the time left; then the next one has its turn. Errors that are not
    retriable end the call. So a call makes at most two attempts per endpoint.
    """

    __slots__ = ("_again", "_endpoints", "at")

    def __init__(self, endpoints: int) -> None:
        self.at = 0
        self._endpoints = endpoints
        self._again = False

    def failed(self, error: WhisperFastError, left: float) -> float:
        """Return the pause in seconds before endpoint `at` is asked; raises `error` when nobody is left to ask."""
        if not error.retriable or left <= 0:
            raise error
        last = self.at + 1 == self._endpoints
        if not self._again and isinstance(error, (LLMUnavailable, LLMRateLimited)):
            pause = max(error.retry_after or 0.0, 0.0) + uniform(*JITTER)
            if pause < (left if last else min(left, PATIENCE)):
                self._again = True
                return pause
        if last:
            raise error
        self.at += 1
        self._again = False
        return 0.0
