"""What the engine knows about a message before it asks the model: the components of a turn.

A component is a function of the turn: `fn(turn) -> value`, sync or async. It may need the values of others, has a
deadline of its own, and a fallback that stands for its value when it is late or fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import SettingsError
from .message import STAGES

if TYPE_CHECKING:
    from pathlib import Path

    from .conversation import Conversations
    from .memory import MemoryStore
    from .message import ChatMessage, Message, Recalled, Turn

__all__ = ["Component", "conversation", "embedding", "emotion", "persona", "persona_text", "recall", "user_component"]

PERSONA = "You are a warm, attentive companion. You know this person from earlier conversations; be brief and kind."
FACT_BYTES = 4096  # what a user's component may add to a prompt


class Component:
    """One named part of every turn.

    `check(value)` returns the value to keep or raises ValueError for one that makes no sense; the component then
    counts as failed. `needs` names components that start before it; where one of them fails its fallback is found.
    """

    __slots__ = ("asynchronous", "check", "deadline", "fallback", "fn", "name", "needs")

    def __init__(
        self,
        name: str,
        fn: Callable[[Turn], Any],
        *,
        deadline: float,
        needs: tuple[str, ...] = (),
        fallback: Any = None,
        check: Callable[[Any], Any] | None = None,
    ) -> None:
        self.name = name
        self.fn = fn
        self.deadline = deadline
        self.needs = needs
        self.fallback = fallback
        self.check = check
        self.asynchronous = inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
            getattr(fn, "__call__", None)  # noqa: B004 - asked for its kind, not for being callable
        )

    def __repr__(self) -> str:
        return f"Component({self.name!r}, deadline={self.deadline} s, needs={self.needs})"


def user_component(
    name: str, fn: Callable[[Turn], Any], *, deadline: float, needs: tuple[str, ...] = (), fallback: Any = None
) -> Component:
    """Return the component for a function that a user registered; its value goes into the prompt as a fact.

    Raises SettingsError for a name that cannot stand in a prompt or a deadline that is none.
    """
    if name in ("embedding", "recall", "conversation"):
        raise SettingsError(f"component {name} is a part of the engine and cannot be replaced")
    if name in STAGES:
        raise SettingsError(f"component {name} is called like a stage of every turn; choose another name")
    if not name.isidentifier():
        raise SettingsError(f"component name is {name!r:.80}; letters, digits and underscores are allowed")
    if not callable(fn):
        raise SettingsError(f"component {name}: {fn!r:.80} cannot be called")
    if not deadline > 0:
        raise SettingsError(f"component {name}: deadline is {deadline!r}; it must be more than 0 seconds")
    check = {"emotion": strengths, "persona": text}.get(name, fact)
    return Component(name, fn, deadline=deadline, needs=needs, fallback=fallback, check=check)


def fact(value: Any) -> Any:
    """Return `value` if it can stand in a prompt: None, text, numbers, lists and dicts of them, at most 4 KiB."""
    try:
        size = len(msgspec.json.encode(value))
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise ValueError(f"its value cannot be written as JSON: {error}") from None
    if size > FACT_BYTES:
        raise ValueError(f"its value has {size} bytes; at most {FACT_BYTES} go into a prompt")
    return value


def emotion(analyse: Callable[[Message], Awaitable[Any]], deadline: float) -> Component:
    """Return the component `emotion`: the feeling in the user's words, from `await analyse(message)`, once."""

    async def feel(turn: Turn) -> Any:
        return await analyse(turn.message)

    return Component("emotion", feel, deadline=deadline, check=strengths)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a persona is a text, found {type(value).__name__}")
    return value


def strengths(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"an emotion is a mapping of names to strengths, found {type(value).__name__}")
    return {str(name): float(strength) for name, strength in value.items()}


def embedding(embed: Callable[[Message], Awaitable[Any]], deadline: float) -> Component:
    """Return the component `embedding`: the vector of the user's words, from `await embed(message)`."""

    async def embed_text(turn: Turn) -> Any:
        return await embed(turn.message)

    return Component("embedding", embed_text, deadline=deadline)


def recall(memory: MemoryStore, k: int, deadline: float) -> Component:
    """Return the component `recall`: the user's `k` best memories that may be told where the message was written.

    Without an embedding it searches by words alone.
    """

    async def search(turn: Turn) -> tuple[Recalled, ...]:
        message = turn.message
        vector = turn.get("embedding")
        if vector is None:
            vector = ()  # by words alone
        return tuple(await memory.recall(message.user, message.text, k=k, scope=message.scope, vector=vector))

    return Component("recall", search, deadline=deadline, needs=("embedding",), fallback=())


def conversation(conversations: Conversations, deadline: float) -> Component:
    """Return the component `conversation`: the recent messages of this user in this place, oldest first."""

    async def recent(turn: Turn) -> list[ChatMessage]:
        if turn.message.history is not None:
            return list(turn.message.history)
        return await conversations.recent(turn.message)

    return Component("conversation", recent, deadline=deadline, fallback=[])


def persona(who: str, *, always: bool) -> Component:
    """Return the component `persona`: who the bot is; unless `always`, only where the request does not say so."""

    async def describe(turn: Turn) -> str:  # async though it never suspends: it costs no thread and no task
        return who if always or not turn.message.system else ""

    return Component("persona", describe, deadline=1.0, fallback="")


def persona_text(path: Path | None) -> str:
    """Return the text of a persona file, or the default one. Raises SettingsError for a file that cannot be read."""
    if path is None:
        return PERSONA
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"WHISPER_FAST_PERSONA_FILE is {str(path)!r}: it cannot be read ({error})") from None
