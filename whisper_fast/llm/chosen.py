"""The pool of language models that an engine asks: what it was given, or what the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .discovery import discover, fallbacks
from .pool import LLMPool

if TYPE_CHECKING:
    from ..flags import Flags
    from ..settings import Settings
    from .completion import ChatProvider
    from .endpoint import Endpoint

__all__ = ["chosen_pool"]


async def chosen_pool(
    llm: LLMPool | ChatProvider | Endpoint | None, settings: Settings, flags: Flags
) -> tuple[LLMPool, str]:
    """Return the pool for what was given, and a sentence that says which model answers."""
    if isinstance(llm, LLMPool):
        return llm, "the pool that was handed in"
    if llm is None:
        llm, description = await discover(settings)
    else:
        description = f"{llm!r}"
    pool = LLMPool(
        [llm, *fallbacks(settings)],
        max_concurrent=settings.max_concurrent_requests,
        timeout=settings.llm_request_timeout,
        queue_timeout=settings.llm_queue_timeout,
        order=settings.llm_order,
        adaptive=lambda: flags.adaptive,
        hedging=lambda: flags.hedging,
        coalescing=lambda: flags.batching,
        failed=flags.failed,
    )
    return pool, description
