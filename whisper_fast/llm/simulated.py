"""A language model that is only simulated: it waits like a real one and says what it was given."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any
from zlib import crc32

from whisper_fast.errors import LLMRejected
from whisper_fast.message import ChatMessage, Delta, Usage

from .completion import Completion

__all__ = ["TOKEN", "Constant", "Distribution", "Empirical", "LogNormal", "SimulatedLLM", "sized"]

Distribution = Callable[[Random], float]
"""Anything that draws a number from a seeded `random.Random`."""

TOKEN = 4  # characters, the usual estimate for English
PIECES = 20
MODULUS = 1 << 64
FIRST_SHARE = 0.25  # of the latency, until the first piece
FILLER = "These words are filler of a simulated model. "


@dataclass(frozen=True, slots=True)
class Constant:
    """Always `value`."""

    value: float

    def __call__(self, rng: Random) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Log-normal: median * exp(sigma * N(0, 1)); its 99th percentile is exp(2.33 sigma) medians."""

    median: float
    sigma: float

    def __call__(self, rng: Random) -> float:
        """Draw one value."""
        return rng.lognormvariate(math.log(self.median), self.sigma)


@dataclass(frozen=True, slots=True)
class Empirical:
    """One of the `values` seen, each as likely as every other."""

    values: Sequence[float] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values is empty; an empirical distribution needs at least one")

    def __call__(self, rng: Random) -> float:
        """Draw one value."""
        return self.values[int(rng.random() * len(self.values))]


class SplitMix(Random):
    """A `random.Random` that is seeded in no time: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

    The Mersenne Twister takes 6 us to seed, which is more than all the rest of a simulated call.
    """

    def seed(self, a: Any = 0, version: int = 2) -> None:
        """Start again from the whole number `a`."""
        whole = a or 0
        self._state = (whole ^ (whole >> 64) * 0x9E3779B97F4A7C15) % MODULUS
        self.gauss_next = None

    def random(self) -> float:
        """Return the next number of [0, 1)."""
        self._state = z = (self._state + 0x9E3779B97F4A7C15) % MODULUS
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
        z = (z ^ z >> 27) * 0x94D049BB133111EB % MODULUS
        return ((z ^ z >> 31) >> 11) * 2.0**-53


class SimulatedLLM:
    """A simulation, not a language model: it understands nothing and invents nothing.

    After `latency` seconds it quotes the user's last words and every list line ("- ...") of the system
    messages, so that whoever reads the answer sees what reached the prompt. With `tokens` the answer is
    filled up or cut to that many tokens, of 4 characters each, but a quote is never cut. `max_tokens` of a
    call cuts anything.

    `latency` and `tokens` are numbers or distributions. What is drawn depends on `seed`, the user's last
    words and the prompt's length alone: the same messages get the same answer after the same time, in any
    order, in any process.
    """

    def __init__(
        self,
        latency: float | Distribution = 0.3,
        tokens: float | Distribution | None = None,
        seed: int = 0,
        *,
        name: str = "simulated",
    ) -> None:
        self.name = self.model = name
        self._latency = distribution(latency)
        self._tokens = None if tokens is None else distribution(tokens)
        self._seed = seed
        self._random = SplitMix()
        self._draws = not (isinstance(self._latency, Constant) and isinstance(self._tokens, Constant | None))

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer after the latency drawn for `messages`."""
        latency, answer = self._answer(messages, params)
        await asyncio.sleep(latency)
        return answer

    async def stream(self, messages: Sequence[ChatMessage], **params: Any) -> AsyncGenerator[Delta, None]:
        """Answer in at most 20 pieces: the first after a quarter of the latency, the last at its end."""
        latency, answer = self._answer(messages, params)
        clock = asyncio.get_running_loop().time
        begin = clock() + FIRST_SHARE * latency
        pieces = cut(answer.text, PIECES)
        step = (1 - FIRST_SHARE) * latency / max(1, len(pieces) - 1)
        for number, piece in enumerate(pieces):
            await asyncio.sleep(max(0.0, begin + number * step - clock()))
            yield Delta(piece)
        yield Delta(finish_reason=answer.finish_reason, usage=answer.usage)

    async def close(self) -> None:
        """Do nothing: a simulation holds nothing."""

    def _answer(self, messages: Sequence[ChatMessage], params: dict[str, Any]) -> tuple[float, Completion]:
        words, memories, size = heard(messages)
        rng = self._drawn(words, size)
        latency = max(0.0, self._latency(rng))
        text = quoted(words, memories)
        if self._tokens is not None:
            text = sized(text, TOKEN * max(1, round(self._tokens(rng))))
        limit, reason = most(params), "stop"
        if limit is not None and len(text) > TOKEN * limit:
            text, reason = text[: TOKEN * limit], "length"
        usage = Usage(prompt_tokens=-(-size // TOKEN), completion_tokens=-(-len(text) // TOKEN))
        return latency, Completion(text=text, finish_reason=reason, usage=usage, model=self.name)

    def _drawn(self, words: str, size: int) -> Random:
        if self._draws:
            self._random.seed(self._seed << 64 | size << 32 | crc32(words.encode("utf-8", "replace")))
        return self._random

    def __repr__(self) -> str:
        return f"SimulatedLLM(latency={self._latency}, tokens={self._tokens}, seed={self._seed})"


def distribution(value: float | Distribution) -> Distribution:
    """Return `value` if it can draw, else the distribution that is always `value`."""
    return value if callable(value) else Constant(float(value))


def most(params: dict[str, Any]) -> int | None:
    """Return the call's limit in tokens, None without one; raises LLMRejected for what is not a count."""
    limit = params.get("max_tokens", params.get("max_completion_tokens"))
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise LLMRejected(f"max_tokens is {limit!r:.40}; it must be a whole number of at least 1", status=400)
    return limit


def heard(messages: Sequence[ChatMessage]) -> tuple[str, list[str], int]:
    """Return the user's last words, the list lines of the system messages, and the characters in all."""
    words, memories, size = "", [], 0
    for message in messages:
        text = content(message)
        size += len(text)
        role = message.get("role")
        if role == "user":
            words = text
        elif role in ("system", "developer"):
            memories += [line.partition("\n")[0].rstrip() for line in f"\n{text}".split("\n- ")[1:]]
    return words, memories, size


def content(message: ChatMessage) -> str:
    """Return a message's text; the text parts joined where the content is a list of parts."""
    text = message.get("content")
    if isinstance(text, str):
        return text
    return "\n".join(str(part.get("text", "")) for part in text or () if isinstance(part, dict))


def quoted(words: str, memories: list[str]) -> str:
    """Return the sentences that repeat what was heard."""
    text = f'You said: "{words}".'
    if memories:
        text += ' I was given: "' + '", "'.join(memories) + '".'
    return text


def sized(text: str, characters: int) -> str:
    """Return `text` followed by filler up to `characters`; a longer text stays whole."""
    missing = characters - len(text)
    if missing <= 1:
        return text
    return text + " " + (FILLER * (missing // len(FILLER) + 1))[: missing - 1]


def cut(text: str, pieces: int) -> list[str]:
    """Return `text` in at most `pieces` parts of whole tokens."""
    size = TOKEN * max(1, -(-len(text) // (TOKEN * pieces)))
    return [text[start : start + size] for start in range(0, len(text), size)]
