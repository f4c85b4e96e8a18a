"""Vectors from a server that speaks OpenAI's `/v1/embeddings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from ..deadline import Deadline
from ..errors import LLMProtocolError, SettingsError
from ..llm.transport import Transport
from ..llm.wire import encoded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..llm import Endpoint

__all__ = ["OpenAIEmbedder"]

PATH: Final = "/embeddings"
TEXT_CHARACTERS: Final = 8000  # of one text are sent: about 2,000 tokens, which every common model takes
REQUEST_TEXTS: Final = 256
ANSWER_BYTES: Final = 64 << 20  # 256 texts in 4,096 dimensions, with all digits of a double, are 24 MB
PROBE: Final = "hello world"


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class Embeddings(msgspec.Struct):
    data: list[Embedding]


DECODER: Final = msgspec.json.Decoder(Embeddings)


class OpenAIEmbedder:
    """Embeds texts with the model that `endpoint` names; open it with `OpenAIEmbedder.open`.

    A text's first 8,000 characters count; one of spaces alone has a zero row and is not sent. `timeout` in seconds
    spans a request of at most 256 texts. Errors: LLMUnavailable, LLMRateLimited, LLMRejected, LLMTimeout,
    LLMProtocolError, InvalidMessage, and Closed after `close`; none of them repeats the key or a text.
    """

    def __init__(self, endpoint: Endpoint, dimension: int, *, timeout: float = 30.0) -> None:
        if endpoint.model is None:
            raise SettingsError("the embedding model has no name; set WHISPER_FAST_EMBEDDING_MODEL")
        self.dimension = dimension
        self.name = f"openai:{endpoint.model}:{dimension}"
        self._endpoint = endpoint
        self._timeout = timeout
        self._transport = Transport(endpoint)

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({self._endpoint!r}, {self.dimension})"

    @classmethod
    async def open(cls, endpoint: Endpoint, dimension: int | None = None, *, timeout: float = 30.0) -> OpenAIEmbedder:
        """Return the embedder; without a `dimension` the server is asked for it. Raises LLMError, SettingsError."""
        if dimension is not None:
            return cls(endpoint, dimension, timeout=timeout)
        asking = cls(endpoint, 0, timeout=timeout)
        try:
            [row] = await asking._ask([PROBE])
        finally:
            await asking.close()
        return cls(endpoint, len(row.embedding), timeout=timeout)

    async def embed(self, texts: Sequence[str], /) -> NDArray[np.float32]:
        """Return unit rows, float32 [len(texts), dimension]."""
        rows = np.zeros((len(texts), self.dimension), np.float32)
        sent = [i for i, text in enumerate(texts) if text.strip()]
        for start in range(0, len(sent), REQUEST_TEXTS):
            part = sent[start : start + REQUEST_TEXTS]
            for found in await self._ask([texts[i][:TEXT_CHARACTERS] for i in part]):
                rows[part[found.index]] = self._checked(found.embedding)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(lengths > 0, lengths, 1)
        return rows

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    async def _ask(self, texts: list[str]) -> list[Embedding]:
        """Return one embedding a text, each index once, in any order."""
        where = self._endpoint.base_url
        body = encoded({"model": self._endpoint.model, "input": texts, "encoding_format": "float"})
        answer = await self._transport.post(PATH, body, Deadline.after(self._timeout), max_bytes=ANSWER_BYTES)
        try:
            found = DECODER.decode(answer).data
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise LLMProtocolError(f"{where}: what it answered is no list of embeddings") from None
        if sorted(row.index for row in found) != list(range(len(texts))):
            raise LLMProtocolError(f"{where}: it answered {len(found)} embeddings to {len(texts)} texts")
        return found

    def _checked(self, embedding: list[float]) -> list[float]:
        if len(embedding) != self.dimension:
            raise LLMProtocolError(
                f"{self._endpoint.base_url}: {self._endpoint.model} gave {len(embedding)} dimensions, not "
                f"{self.dimension}; is WHISPER_FAST_EMBEDDING_DIMENSION right?"
            )
        return embedding
