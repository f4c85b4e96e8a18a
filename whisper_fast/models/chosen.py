"""The embedder that the settings name."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..errors import SettingsError
from .embedder import StaticEmbedder

if TYPE_CHECKING:
    from ..settings import Settings
    from .embedder import Embedder

__all__ = ["chosen_embedder", "close_embedder"]


async def chosen_embedder(settings: Settings) -> Embedder:
    """Return the embedder of `WHISPER_FAST_EMBEDDER`. Raises SettingsError, StoreError, LLMError for a silent server.

    static  the token table that comes with the package
    minilm  the model it was distilled from, in int8, through onnxruntime (extra `minilm`)
    openai  the server at WHISPER_FAST_EMBEDDING_API_URL
    """
    if settings.embedder == "openai":
        return await server(settings)
    if settings.embedder == "minilm":
        from .onnx import MiniLMEmbedder

        return await asyncio.to_thread(MiniLMEmbedder, settings.data_dir / "models")
    return await asyncio.to_thread(StaticEmbedder)


async def server(settings: Settings) -> Embedder:
    from ..llm import Endpoint
    from .openai import OpenAIEmbedder

    if settings.embedding_api_url is None:
        raise SettingsError("WHISPER_FAST_EMBEDDING_API_URL is not set; the embedder openai needs it")
    secret = settings.embedding_api_key
    key = None if secret is None else secret.get_secret_value()
    endpoint = Endpoint(
        settings.embedding_api_url,
        settings.embedding_model,
        key,
        ca_file=settings.llm_ca_file,
        proxy=settings.llm_proxy.get_secret_value() if settings.llm_proxy else None,
        allow_link_local=settings.llm_allow_link_local,
    )
    return await OpenAIEmbedder.open(endpoint, settings.embedding_dimension, timeout=settings.embedding_timeout)


async def close_embedder(embedder: Embedder) -> None:
    """Close the connections of an embedder that has some."""
    close = getattr(embedder, "close", None)
    if close is not None:
        await close()
