"""The simulated model of a load: it says how much of a message's time was its own, and fails on demand."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, Final

from msgspec import structs

from ... import clock
from ...errors import LLMProtocolError, LLMRateLimited, LLMUnavailable, SettingsError
from ...llm import SimulatedLLM
from ...llm.simulated import TOKEN, sized

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...errors import WhisperFastError
    from ...llm.completion import Completion
    from ...llm.simulated import Distribution
    from ...message import ChatMessage
    from ..traffic import Length

__all__ = ["FAULTS", "Metered"]

FAULTS: Final[dict[str, Callable[[], WhisperFastError | None]]] = {
    "error": lambda: LLMUnavailable("a simulated fault: the model answered 500", status=500),
    "rate_limited": lambda: LLMRateLimited("a simulated fault: the model answered 429", status=429, retry_after=0.1),
    "garbled": lambda: LLMProtocolError("a simulated fault: what the model answered is not the protocol"),
    "slow": lambda: None,
}
"""What a call may suffer; a slow one takes ten times as long."""

SLOW: Final = 10.0
PREFILL, DECODE = 4000.0, 60.0  # tokens a second of a replayed request, as `trace.TraceLLM` has them


class Metered(SimulatedLLM):
    """A SimulatedLLM of which a share `faults` of the calls suffer one of FAULTS, each as likely.

    A message's time in the model is what its calls were meant to take. What the event loop wakes late is not in it:
    that is the caller's.
    """

    def __init__(
        self,
        latency: float | Distribution,
        tokens: float | Distribution | None = None,
        seed: int = 0,
        *,
        faults: float = 0.0,
    ) -> None:
        super().__init__(latency, tokens, seed)
        if not 0 <= faults <= 1:
            raise SettingsError(f"faults is {faults}; it is the share of the calls that fail, from 0 to 1")
        self._faults = faults
        self._fate = Random(seed)
        self._expected: dict[str, tuple[Length | None, list[tuple[float, float]]]] = {}

    def expect(self, text: str, length: Length | None = None) -> None:
        """Take down the calls for a user's `text` from now on; one with a `length` takes as long as that request."""
        self._expected[text] = length, []

    def took(self, text: str) -> float:
        """Return the seconds that the message spent in the model, and forget it."""
        return spent(self._expected.pop(text, (None, []))[1])

    def _answer(self, messages: Sequence[ChatMessage], params: dict[str, Any]) -> tuple[float, Completion]:
        latency, answer = super()._answer(messages, params)
        length, calls = self._expected.get(str(messages[-1].get("content")), (None, []))
        if length is not None:
            latency = length.prompt / PREFILL + length.answer / DECODE
            answer = structs.replace(answer, text=sized(answer.text, TOKEN * length.answer))
        if self._faults and self._fate.random() < self._faults:
            latency *= self._suffer()
        now = clock.monotonic()
        calls.append((now, now + latency))
        return latency, answer

    def _suffer(self) -> float:
        """Raise a fault, or return how many times longer the call takes."""
        error = FAULTS[self._fate.choice(tuple(FAULTS))]()
        if error is not None:
            raise error
        return SLOW


def spent(calls: list[tuple[float, float]]) -> float:
    """Return the seconds from the begin of the first call to the end of the one that answered.

    That is the one that was to end first: another would have been awaited no longer. What failed at once is no call.
    """
    return min(end for _, end in calls) - min(begun for begun, _ in calls) if calls else 0.0
