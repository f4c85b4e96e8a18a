"""A real service's requests, replayed: Azure's LLM inference trace (Patel et al., Splitwise, ISCA 2024)."""

from __future__ import annotations

import asyncio
import csv
import gzip
import zlib
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..errors import SettingsError
from ..llm import Completion
from ..message import Delta, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence
    from pathlib import Path

    from ..message import ChatMessage

__all__ = ["Row", "TraceLLM", "opened", "rows"]

WORD = "word "


class Row(NamedTuple):
    """One request: `at` in seconds since the first one, and the tokens of its prompt and of its answer."""

    at: float
    prompt: int
    answer: int


def rows(path: Path) -> list[Row]:
    """Return the requests of a trace (CSV with TIMESTAMP, ContextTokens and GeneratedTokens, may be gzipped).

    Raises SettingsError for a file that cannot be read or is none.
    """
    with opened(path) as file:
        table = csv.DictReader(file)
        try:
            found = [
                (moment(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in table
            ]
        except (KeyError, TypeError, ValueError, csv.Error):
            text = f"{str(path)!r:.200} is no trace in line {table.line_num}: TIMESTAMP,ContextTokens,GeneratedTokens"
            raise SettingsError(text) from None
    if not found:
        raise SettingsError(f"the trace {str(path)!r:.200} holds no request")
    return [Row(at - found[0][0], prompt, answer) for at, prompt, answer in found]


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """Open a text, which may be gzipped; raises SettingsError when it cannot be read to its end."""
    try:
        with gzip.open(path, "rt", errors="replace") if path.suffix == ".gz" else path.open(errors="replace") as file:
            yield file
    except EOFError:
        raise SettingsError(f"{str(path)!r:.200} is cut off: its end is missing; copy it again") from None
    except (OSError, zlib.error) as error:
        raise SettingsError(f"{str(path)!r:.200} cannot be read: {error}") from None


def moment(text: str) -> float:
    whole, _, fraction = text.partition(".")  # seven digits, one more than fromisoformat takes
    return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")


class TraceLLM:
    """A simulated model whose n-th call is as long as the n-th request of a trace, from the start again at its end.

    The first token comes after prompt tokens / `prefill` seconds, the others at `decode` a second; several share a
    piece where they come faster than one a `tick`. The text has no meaning. The usage is the trace's.
    """

    name = model = "trace"

    def __init__(
        self, trace: Sequence[Row], *, prefill: float = 4000.0, decode: float = 60.0, tick: float = 0.02
    ) -> None:
        self._trace = trace
        self._prefill = prefill
        self._decode = decode
        self._size = max(1, round(decode * tick))
        self._number = count()

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer after the whole time of the call."""
        row = self._next()
        await asyncio.sleep(row.prompt / self._prefill + row.answer / self._decode)
        return Completion(text=WORD * row.answer, usage=Usage(row.prompt, row.answer), model=self.name)

    async def stream(self, messages: Sequence[ChatMessage], **params: Any) -> AsyncGenerator[Delta, None]:
        """Answer piece by piece at the pace of the model."""
        row = self._next()
        clock = asyncio.get_running_loop().time
        begin = clock() + row.prompt / self._prefill
        for done in range(0, row.answer, self._size):
            await asyncio.sleep(max(0.0, begin + done / self._decode - clock()))
            yield Delta(WORD * min(self._size, row.answer - done))
        yield Delta(finish_reason="stop", usage=Usage(row.prompt, row.answer))

    async def close(self) -> None:
        """Do nothing: a simulation holds nothing."""

    def _next(self) -> Row:
        return self._trace[next(self._number) % len(self._trace)]

    def __repr__(self) -> str:
        return f"TraceLLM({len(self._trace)} requests, prefill={self._prefill:g}/s, decode={self._decode:g}/s)"
