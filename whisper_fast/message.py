"""What goes through the engine: a message in, a turn that belongs to it alone, a reply out."""

from __future__ import annotations

import re
from itertools import count
from math import isfinite
from os import getpid
from typing import TYPE_CHECKING, Any, Final, Literal, get_args
from uuid import uuid4

import msgspec

from . import clock
from .errors import InvalidMessage

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "STAGES",
    "ChatMessage",
    "Delta",
    "Message",
    "Recalled",
    "Reply",
    "Turn",
    "Usage",
    "WhenBusy",
    "checked_id",
    "checked_scope",
    "checked_user",
    "joined",
]

ChatMessage = dict[str, Any]
"""One message of the OpenAI chat protocol, passed through as it is: `{"role": ..., "content": ...}`."""

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]

WhenBusy = Literal["queue", "merge", "interrupt", "drop"]
"""What becomes of a message while the same user's earlier one in its channel is not answered yet; see `busy`."""

ID_CHARACTERS = 512
CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")
SCOPE = re.compile(r"dm|global|server:[^\x00-\x1f/]{1,200}/(?:private|public)")
SURROGATE = re.compile(r"[\ud800-\udfff]")


BORN = uuid4().hex
COUNT = count()


def fresh_id() -> str:
    """Return an id that no other message has: random for the program's start, counted from there, safe after a fork.

    A random id each would cost a system call, which is a tenth of a turn on some virtual machines.
    """
    return f"{BORN}-{getpid():x}-{next(COUNT):x}"


def now() -> float:
    """Return the wall clock's time, as it is at the call."""
    return clock.wall()


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of one user.

    `id` makes redelivery harmless: the same (platform, channel, user, id) is answered once. Without one, every call
    is a message of its own. `scope` says where it was told, see `checked_scope`. `at` is in epoch seconds.
    `history`, when given, is the recent conversation to use instead of the stored one. `system` holds further
    system messages for this turn only. `parts` are content parts that belong to the text (images), `continuation`
    what came after it within the turn (tool calls and their results). `parameters` goes to the language model as
    it is (temperature, tools, ...).
    `remember=False` answers without storing conversation or memories. Smaller `priority` is served first, a user of
    twice the `weight` twice as often while others wait. `when_busy` says what happens while the user's earlier
    message in this channel is not answered yet (None: as the settings say); `strict=True` refuses an id that was
    used before for other words.
    """

    user: str
    text: str
    id: str = msgspec.field(default_factory=fresh_id)
    channel: str = "default"
    scope: str = "dm"
    platform: str = "library"
    at: float = msgspec.field(default_factory=now)
    priority: int = 0
    history: tuple[ChatMessage, ...] | None = None
    system: tuple[ChatMessage, ...] = ()
    parts: tuple[dict[str, Any], ...] = ()
    continuation: tuple[ChatMessage, ...] = ()
    parameters: dict[str, Any] = {}
    remember: bool = True
    weight: float = 1.0
    when_busy: WhenBusy | None = None
    strict: bool = False

    def checked(self, max_text_bytes: int) -> Message:
        """Return this message fit to be stored: lone surrogates in the text become U+FFFD.

        Raises InvalidMessage when the text is empty or over `max_text_bytes` of UTF-8, an id is empty, over
        512 characters or holds control characters, or the scope is unknown.
        """
        if not isinstance(self.text, str):
            raise InvalidMessage(f"text is {type(self.text).__name__}; it must be a string")
        if not self.text.strip():
            raise InvalidMessage("text is empty; say something")
        if len(self.text) > max_text_bytes:
            raise InvalidMessage(f"text has {len(self.text)} characters; at most {max_text_bytes} bytes are allowed")
        checked_user(self.user)
        for name in ("id", "channel", "platform"):
            checked_id(name, getattr(self, name))
        checked_scope(self.scope)
        if not isinstance(self.at, float | int) or not isfinite(self.at):
            raise InvalidMessage(f"at is {self.at!r:.80}; it must be epoch seconds")
        if not isinstance(self.priority, int):
            raise InvalidMessage(f"priority is {self.priority!r:.80}; it must be a whole number")
        if self.weight != 1.0 and not (isinstance(self.weight, float | int) and 0.001 <= self.weight <= 1000):
            raise InvalidMessage(f"weight is {self.weight!r:.80}; it must be from 0.001 to 1000")
        if self.when_busy is not None and self.when_busy not in get_args(WhenBusy):
            raise InvalidMessage(f"when_busy is {self.when_busy!r:.80}; allowed are {', '.join(get_args(WhenBusy))}")
        return self if self.text.isascii() else self._encodable(max_text_bytes)

    def _encodable(self, max_text_bytes: int) -> Message:
        text = SURROGATE.sub("\ufffd", self.text)
        size = len(text.encode())
        if size > max_text_bytes:
            raise InvalidMessage(f"text has {size} bytes; at most {max_text_bytes} are allowed")
        return self if text == self.text else msgspec.structs.replace(self, text=text)


def joined(first: Message, then: Message) -> Message:
    """Return the message that says what both say: the words of `first`, a line break, those of `then`.

    It keeps the place, id and time of `first` and what `then` asks of the model; it is remembered if both may be.
    """
    return msgspec.structs.replace(
        first,
        text=f"{first.text}\n{then.text}",
        parts=first.parts + then.parts,
        system=then.system or first.system,
        history=first.history if then.history is None else then.history,
        parameters=then.parameters or first.parameters,
        priority=min(first.priority, then.priority),
        remember=first.remember and then.remember,
        strict=False,
    )


def checked_id(name: str, value: str) -> str:
    """Return `value` if it can name something; raises InvalidMessage that says what was found."""
    if not isinstance(value, str):
        raise InvalidMessage(f"{name} is {type(value).__name__}; it must be a string")
    if not value:
        raise InvalidMessage(f"{name} is empty")
    if len(value) > ID_CHARACTERS:
        raise InvalidMessage(f"{name} has {len(value)} characters; at most {ID_CHARACTERS} are allowed")
    if found := CONTROL.search(value):
        raise InvalidMessage(f"{name} holds the character U+{ord(found[0]):04X}; control characters are not allowed")
    return value


def checked_user(user: str) -> str:
    """Return `user` if it can name a person; raises InvalidMessage otherwise."""
    return checked_id("user", user)


def checked_scope(scope: str) -> str:
    """Return `scope` if it is one of `dm`, `global`, `server:<id>/private`, `server:<id>/public`.

    A scope says where something was told. Raises InvalidMessage for anything else.
    """
    if not isinstance(scope, str) or not SCOPE.fullmatch(scope):
        raise InvalidMessage(
            f"scope is {scope!r:.80}; allowed are 'dm', 'global', 'server:<id>/private' and 'server:<id>/public'"
        )
    return scope


class Recalled(msgspec.Struct, frozen=True):
    """One memory as recalled: `score` is higher for better, `at` is in epoch seconds."""

    id: int
    text: str
    score: float
    at: float
    scope: str
    metadata: dict[str, Any] | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one call to the language model, as the provider counted them, or else `estimated` from bytes."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to one message.

    `partial` names the components that were late or failed, `timings` maps names to seconds.
    `emotion` maps an emotion's name to its strength from -1 to 1.
    """

    id: str
    user: str
    text: str
    emotion: dict[str, float] | None = None
    memories: tuple[Recalled, ...] = ()
    partial: tuple[str, ...] = ()
    timings: dict[str, float] = {}
    finish_reason: str = "stop"
    tool_calls: tuple[dict[str, Any], ...] = ()
    usage: Usage = Usage()
    model: str = ""


class Delta(str):
    """A piece of an answer: the new text itself, and beside it what else the piece brought."""

    finish_reason: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    usage: Usage | None = None

    def __new__(
        cls,
        text: str = "",
        *,
        finish_reason: str | None = None,
        tool_calls: Iterable[dict[str, Any]] = (),
        usage: Usage | None = None,
    ) -> Delta:
        """Make a piece; `tool_calls` are protocol fragments, passed through as they are."""
        self = super().__new__(cls, text)
        self.finish_reason = finish_reason
        self.tool_calls = tuple(tool_calls)
        self.usage = usage
        return self


STAGES: Final = ("journal", "lane", "gather", "llm", "first_token", "record", "remember", "total")
"""The names in `Turn.timings` that are no component's."""


class Turn:
    """All state of one message on its way; it belongs to that message alone.

    Components leave their values in `values` under their names, `partial` names those that were late or failed.
    `began` says when a stage began (by `clock.monotonic`), `timings` how many seconds it took. `message` holds the
    words of all messages that are answered together.
    """

    __slots__ = ("_lap", "began", "message", "partial", "prompt", "started", "timings", "values")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.started = self._lap = clock.monotonic()
        self.values: dict[str, Any] = {}
        self.partial: list[str] = []
        self.began: dict[str, float] = {}
        self.timings: dict[str, float] = {}
        self.prompt: list[ChatMessage] = []

    def __getitem__(self, component: str) -> Any:
        """Return a component's value; KeyError if it has not finished."""
        return self.values[component]

    def get(self, component: str, default: Any = None) -> Any:
        """Return a component's value, or `default` where there is none."""
        return self.values.get(component, default)

    def begin_again(self, message: Message) -> None:
        """Forget what was gathered: the turn is now about `message`."""
        self.message = message
        self.values, self.partial, self.prompt = {}, [], []

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap, or since the start, under `name`."""
        self.took(name, self._lap)
        self._lap = self.began[name] + self.timings[name]

    def took(self, name: str, began: float) -> None:
        """Note that the stage `name` ran from `began` until now."""
        self.began[name] = began
        self.timings[name] = clock.monotonic() - began
