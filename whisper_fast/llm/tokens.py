"""The tokens of one server: as it counted them, or estimated by what its counts have taught."""

from __future__ import annotations

from whisper_fast.message import Usage

__all__ = ["Tokens"]

START = 4.0  # bytes a token, the usual estimate for English
PRIOR = 64.0  # tokens that the start counts for, so that one odd answer does not turn the estimate over
MEMORY = 0.98  # what each call leaves of the weight of those before: the latest 50 calls decide


class Ratio:
    """Bytes a token: sum(bytes) / sum(tokens) over the calls that were counted, each `MEMORY` times the next."""

    __slots__ = ("_bytes", "_tokens")

    def __init__(self) -> None:
        self._bytes = START * PRIOR
        self._tokens = PRIOR

    def learn(self, size: int, tokens: int) -> None:
        if size > 0 and tokens > 0:
            self._bytes = MEMORY * self._bytes + size
            self._tokens = MEMORY * self._tokens + tokens

    def tokens(self, size: int) -> int:
        return round(size * self._tokens / self._bytes) or int(size > 0)


class Tokens:
    """The tokens of one server's calls, those included that failed or were cancelled on the way.

    `estimated` is the part of `prompt` and `completion` together that the server did not count.
    """

    __slots__ = ("_received", "_sent", "completion", "estimated", "prompt")

    def __init__(self) -> None:
        self._sent = Ratio()
        self._received = Ratio()
        self.prompt = 0
        self.completion = 0
        self.estimated = 0

    def settle(self, sent: int, received: int, counted: Usage | None) -> Usage:
        """Book one call of `sent` bytes of request and `received` bytes of text; return its usage.

        `counted` is the server's own count, which is learnt from; without one the usage is an estimate.
        """
        usage = counted
        if usage is None or not usage.total_tokens:
            usage = Usage(self._sent.tokens(sent), self._received.tokens(received), estimated=True)
            self.estimated += usage.total_tokens
        else:
            self._sent.learn(sent, usage.prompt_tokens)
            self._received.learn(received, usage.completion_tokens)
        self.prompt += usage.prompt_tokens
        self.completion += usage.completion_tokens
        return usage

    def stats(self) -> dict[str, int]:
        """Return the totals since the start."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "estimated_tokens": self.estimated,
        }
