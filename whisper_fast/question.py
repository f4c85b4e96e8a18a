"""The question that a turn puts to the language model, and the reply that its answer makes."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from . import clock
from .llm.completion import Completion, merged
from .message import Reply, Usage

if TYPE_CHECKING:
    from .llm import LLMPool
    from .message import Turn
    from .round import Round

__all__ = ["ask", "reply_of"]


async def ask(llm: LLMPool, around: Round, timeout: float) -> Completion:
    """Ask the model within `timeout` seconds; pieces go to whoever streams. Raises LLMError, Overloaded."""
    turn, message = around.turn, around.turn.message
    options = {**message.parameters, "timeout": timeout}
    options |= {"user": message.user, "priority": message.priority, "weight": message.weight}
    if around.streamed:
        return await ask_in_pieces(llm, turn, around, options)
    return await llm.chat(turn.prompt, **options)


async def ask_in_pieces(llm: LLMPool, turn: Turn, around: Round, options: dict[str, Any]) -> Completion:
    since, last, usage = clock.monotonic(), "stop", Usage()
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    async with aclosing(llm.stream(turn.prompt, **options)) as pieces:
        async for piece in pieces:
            if not texts:
                turn.took("first_token", since)
            texts.append(piece)
            calls.extend(piece.tool_calls)
            last, usage = piece.finish_reason or last, piece.usage or usage
            around.push(piece)
    return Completion(text="".join(texts), finish_reason=last, tool_calls=merged(calls), usage=usage)


def reply_of(turn: Turn, completion: Completion) -> Reply:
    """Return the reply to a turn's message."""
    turn.timings["total"] = clock.monotonic() - turn.started
    return Reply(
        id=turn.message.id,
        user=turn.message.user,
        text=completion.text,
        emotion=turn.get("emotion"),
        memories=turn.get("recall") or (),
        partial=tuple(turn.partial),
        timings=dict(turn.timings),
        finish_reason=completion.finish_reason,
        tool_calls=completion.tool_calls,
        usage=completion.usage,
        model=completion.model,
    )
