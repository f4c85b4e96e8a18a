"""What a load is put on: the engine in this process, the bot's sequential way, or a server at an address."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from ...engine import Engine
from ...errors import LLMError, LLMRateLimited, Overloaded, SettingsError
from ...llm import Endpoint
from ...llm.provider import OpenAIProvider
from ...settings import Settings
from ...store.files import DATABASE
from ..reference import Sequential

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from ...message import Message
    from ..traffic import Arrival
    from .model import Metered

__all__ = ["EngineTarget", "SequentialTarget", "ServerTarget", "Target", "refused"]

ALL: Final = 1 << 50  # the journal keeps what a run asks for at its end


class Target(ABC):
    """Somebody who answers. `promises` names the figures that are 0 when it does what it promises."""

    name: ClassVar[str]
    promises: ClassVar[tuple[str, ...]] = ("lost",)
    folder: Path | None = None  # where what was promised can be read afterwards

    @abstractmethod
    def open(self) -> Any:
        """Return an async context in which it answers. Raises WhisperFastError."""

    @abstractmethod
    async def answer(self, message: Message, accepted: Callable[[], None]) -> Sequence[str]:
        """Return the components that the answer had to do without; calls `accepted` once an answer is promised.

        Raises WhisperFastError.
        """

    def expect(self, message: Message, arrival: Arrival) -> None:  # noqa: B027 - not everybody wants to know
        """Hear of a message before it is sent."""

    def model_seconds(self, message: Message) -> float | None:
        """Return how much of the message's time was the model's, None where nobody knows."""
        return None


class Own(Target):
    """A target of this process, with a model that says what it took."""

    def __init__(self, folder: Path, model: Metered, users: int) -> None:
        if (folder / DATABASE).exists():
            raise SettingsError(f"{str(folder)!r:.200} holds a database; a load needs an empty folder of its own")
        self.folder: Path = folder
        self.model = model
        self.settings = Settings(data_dir=folder, max_concurrent_requests=max(50, users), journal_max_bytes=ALL)

    def expect(self, message: Message, arrival: Arrival) -> None:
        """Tell the model."""
        self.model.expect(message.text, arrival.length)

    def model_seconds(self, message: Message) -> float:
        """Ask the model."""
        return self.model.took(message.text)


class EngineTarget(Own):
    """The engine in this process; `prepare` is called with it before the first message."""

    name = "engine"
    promises = ("lost", "duplicated", "out_of_order")

    def __init__(
        self, folder: Path, model: Metered, users: int, prepare: Callable[[Engine], object] = lambda engine: None
    ) -> None:
        super().__init__(folder, model, users)
        self._prepare = prepare

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Self]:
        """Open the engine. Raises StoreError."""
        async with Engine.open(self.settings, llm=self.model) as self._engine:
            self._prepare(self._engine)
            yield self

    async def answer(self, message: Message, accepted: Callable[[], None]) -> Sequence[str]:
        """Answer; what is on the disk is promised."""
        ticket = await self._engine.submit(message)
        accepted()
        return (await ticket.reply()).partial


class SequentialTarget(Own):
    """The bot's way, see `lab/reference.py`; it takes everything at once and keeps it in memory."""

    name = "sequential"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Self]:
        """Open its store and its three threads. Raises StoreError."""
        async with Sequential.open(self.settings, self.model) as self._bot:
            yield self

    async def answer(self, message: Message, accepted: Callable[[], None]) -> Sequence[str]:
        """Answer; nothing is refused, and nothing is promised before."""
        reply = await self._bot.respond(message)
        accepted()
        return reply.partial


class ServerTarget(Target):
    """An OpenAI-compatible server; each message is one request, which names its user and is never repeated.

    `model_seconds` is what the model behind it is known to take, where it is known.
    """

    name = "server"

    def __init__(
        self, url: str, model: str | None = None, api_key: str | None = None, model_seconds: float | None = None
    ) -> None:
        self._endpoint = Endpoint(url, model, api_key)
        self._seconds = model_seconds

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Self]:
        """Ask for the models first, so that an address where nobody is ends the run. Raises LLMError."""
        self._provider = OpenAIProvider(self._endpoint)
        try:
            await self._provider.ask_model()
            yield self
        finally:
            await self._provider.close()

    async def answer(self, message: Message, accepted: Callable[[], None]) -> Sequence[str]:
        """Answer; what was sent there is to be answered or refused."""
        accepted()
        await self._provider.chat([{"role": "user", "content": message.text}], user=message.user)
        return ()

    def model_seconds(self, message: Message) -> float | None:
        """Return what was said."""
        return self._seconds


def refused(error: BaseException) -> bool:
    """Say whether an error means that there is too much to do: shed, not failed."""
    return isinstance(error, Overloaded | LLMRateLimited) or (isinstance(error, LLMError) and error.status == 503)
