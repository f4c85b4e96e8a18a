"""The prompt: one ordered list of chat messages that fits the model's context window.

Order: one system message (persona or the request's own system text, the user's feeling, what is remembered, what
users' components found), the recent conversation, the user's words, and what followed them within the turn.

Tokens are estimated as UTF-8 bytes / 4 + 4 a message. What the request itself brings is never cut; the rest of the
window goes to memories, best first, until half of it is used, then to the conversation, newest first.
"""

from __future__ import annotations

from functools import lru_cache
from time import gmtime, strftime
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import InvalidMessage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .message import ChatMessage, Message, Recalled, Turn

__all__ = ["OWN", "History", "compose", "tokens", "words"]

OWN = frozenset({"emotion", "embedding", "recall", "conversation", "persona"})
DAY = 86_400  # seconds
ANSWER_TOKENS = 1024  # what is kept free for the answer when the request sets no limit
MEMORY_HEADING = "What you remember of what this person told you (use it when it helps, never invent more):"


class History(list["ChatMessage"]):
    """Chat messages, oldest first, with the estimated `tokens` of each, so that no turn estimates them again."""

    __slots__ = ("tokens",)

    def __init__(self, messages: Iterable[ChatMessage], tokens: list[int]) -> None:
        super().__init__(messages)
        self.tokens = tokens


def compose(turn: Turn, context_tokens: int) -> list[ChatMessage]:
    """Return the messages to send for `turn`, at most `context_tokens` with room for the answer.

    Raises InvalidMessage when what the request itself brings does not fit.
    """
    message = turn.message
    said = [user_message(message), *message.continuation]
    heading = [*instructions(turn), *feeling(turn.get("emotion")), *facts(turn)]
    room = context_tokens - reserved(message) - sum(map(tokens, said)) - sum(map(words, heading))
    if room < 0:
        raise InvalidMessage(
            f"the message needs {context_tokens - room} tokens with room for its answer; "
            f"the context window has {context_tokens} (WHISPER_FAST_CONTEXT_TOKENS)"
        )
    remembered = fitting([line(memory) for memory in turn.get("recall") or ()], room // 2)
    room -= sum(map(words, remembered))
    if remembered:
        heading.append("\n".join([MEMORY_HEADING, *remembered]))
    system = [{"role": "system", "content": "\n\n".join(heading)}] if heading else []
    return [*system, *newest(turn.get("conversation") or (), room), *said]


def tokens(message: ChatMessage) -> int:
    """Estimate the tokens of one chat message."""
    content = message.get("content")
    size = words(content) if isinstance(content, str) else json_tokens(content)
    return size + json_tokens(message["tool_calls"]) if message.get("tool_calls") else size


def words(text: str) -> int:
    """Estimate the tokens of a text that is a message of its own."""
    return (len(text) if text.isascii() else len(text.encode())) // 4 + 4


def json_tokens(value: Any) -> int:
    return len(msgspec.json.encode(value)) // 4 + 4


def reserved(message: Message) -> int:
    asked = message.parameters.get("max_completion_tokens") or message.parameters.get("max_tokens")
    tools = message.parameters.get("tools")
    answer = asked if isinstance(asked, int) and asked > 0 else ANSWER_TOKENS
    return answer + (json_tokens(tools) if tools else 0)


def user_message(message: Message) -> ChatMessage:
    if not message.parts:
        return {"role": "user", "content": message.text}
    return {"role": "user", "content": [{"type": "text", "text": message.text}, *message.parts]}


def instructions(turn: Turn) -> list[str]:
    """Return the persona and the request's own system texts."""
    texts = [plain(system.get("content")) for system in turn.message.system]
    return [text for text in (turn.get("persona"), *texts) if text]


def plain(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or () if isinstance(part, dict))


def feeling(emotion: dict[str, float] | None) -> list[str]:
    """Return one sentence about the user's feeling; nothing where it is neutral or unknown."""
    valence = (emotion or {}).get("valence", 0.0)
    if abs(valence) < 0.05:  # VADER's own bound for neutral
        return []
    strength = "strongly " if abs(valence) > 0.6 else ""
    return [f"The person's words sound {strength}{'positive' if valence > 0 else 'negative'}; answer accordingly."]


def facts(turn: Turn) -> list[str]:
    return [
        f"{name}: {value if isinstance(value, str) else msgspec.json.encode(value).decode()}"
        for name, value in turn.values.items()
        if name not in OWN and value is not None
    ]


def line(memory: Recalled) -> str:
    text = " ".join(memory.text.split())
    return f"- ({date(memory.at // DAY)}) {text}"


@lru_cache(4096)
def date(day: float) -> str:
    """Return the date of a whole day since the epoch, in UTC."""
    return strftime("%Y-%m-%d", gmtime(day * DAY))


def fitting(lines: Iterable[str], room: int) -> list[str]:
    kept = []
    for text in lines:
        room -= words(text)
        if room < 0:
            break
        kept.append(text)
    return kept


def newest(messages: Sequence[ChatMessage], room: int) -> list[ChatMessage]:
    """Return the newest messages that fit; never begins with a tool's result whose call was cut off."""
    if isinstance(messages, History) and len(messages.tokens) == len(messages):  # else a component has added to it
        sizes = messages.tokens
    else:
        sizes = [tokens(message) for message in messages]
    wanted, first = sum(sizes), 0
    while wanted > room and first < len(messages):
        wanted -= sizes[first]
        first += 1
    while first < len(messages) and messages[first].get("role") == "tool":
        first += 1
    return list(messages[first:])
