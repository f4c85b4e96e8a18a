"""What a language model is to the rest: something that completes a chat, whole or piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from whisper_fast.message import ChatMessage, Delta, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

__all__ = ["ChatProvider", "Completion", "merged"]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer; `finish_reason` and `tool_calls` are the protocol's, `model` the one that answered."""

    text: str
    finish_reason: str = "stop"
    tool_calls: tuple[dict[str, Any], ...] = ()
    usage: Usage = Usage()
    model: str = ""


def merged(fragments: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the whole tool calls of a stream's fragments: by `index`, their arguments joined in order."""
    calls: dict[int, dict[str, Any]] = {}
    for fragment in fragments:
        call = calls.setdefault(fragment.get("index", len(calls)), {})
        function = {**call.get("function", {})}
        for name, value in (fragment.get("function") or {}).items():
            function[name] = function.get(name, "") + value if name == "arguments" else value
        call.update({name: value for name, value in fragment.items() if name not in ("index", "function")})
        if function:
            call["function"] = function
    return tuple(calls[index] for index in sorted(calls))


class ChatProvider(Protocol):
    """One source of completions; errors are those of `LLMError` and its heirs.

    `params` are those of the OpenAI chat protocol (temperature, tools, ...) and are passed on as they are.
    Cancelling a call, or closing a stream before its end, gives everything back that the call held.
    """

    @property
    def name(self) -> str:
        """What it is called in statistics and errors; holds no secret."""

    async def chat(self, messages: Sequence[ChatMessage], **params: Any) -> Completion:
        """Answer `messages`."""

    def stream(self, messages: Sequence[ChatMessage], **params: Any) -> AsyncIterator[Delta]:
        """Answer `messages` piece by piece."""

    async def close(self) -> None:
        """Give back what is held; may be called twice."""
