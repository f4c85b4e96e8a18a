"""Identical deterministic requests that are under way at once are one call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from whisper_fast.errors import Closed, WhisperFastError, own_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from whisper_fast.message import ChatMessage

    from .completion import Completion

__all__ = ["Flights", "deterministic", "identity"]


def deterministic(params: dict[str, Any]) -> bool:
    """Whether the model was asked for the same answer each time: temperature 0, or a seed."""
    return params.get("temperature") == 0 or params.get("seed") is not None


def identity(
    owner: str | None, limits: tuple[object, ...], messages: Sequence[ChatMessage], params: Any
) -> bytes | None:
    """Return what equal requests of one owner have in common, None for one that cannot be written down."""
    try:
        return msgspec.json.encode([owner, limits, messages, params], order="sorted")
    except (TypeError, ValueError, RecursionError):
        return None


class Flights:
    """The calls that others may join: each runs as a task of its own and ends when nobody waits for it any more."""

    __slots__ = ("_tasks", "_waiters", "joined")

    def __init__(self) -> None:
        self._tasks: dict[bytes, asyncio.Task[Completion]] = {}
        self._waiters: dict[asyncio.Task[Completion], int] = {}
        self.joined = 0

    async def join(self, key: bytes, start: Callable[[], Coroutine[Any, Any, Completion]]) -> Completion:
        """Return the answer of the call `key` that is under way, or of one that is started; an error is a copy."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.get_running_loop().create_task(start(), name="llm-flight")
            self._waiters[task] = 0
            task.add_done_callback(lambda done: self._land(key, done))
        else:
            self.joined += 1
        self._waiters[task] += 1
        try:
            await asyncio.wait([task])
        finally:
            self._leave(key, task)
        if task.cancelled():
            raise Closed("the pool was closed during this call")
        error = task.exception()
        if isinstance(error, WhisperFastError):
            raise own_copy(error)
        return task.result()

    async def close(self) -> None:
        """Cancel all of them and wait for their end."""
        tasks = list(self._waiters)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _leave(self, key: bytes, task: asyncio.Task[Completion]) -> None:
        """Count a waiter out; a call that nobody waits for takes nobody in any more and is cancelled."""
        left = self._waiters.get(task)
        if left is None:
            return
        self._waiters[task] = left - 1
        if left == 1 and not task.done():
            if self._tasks.get(key) is task:
                del self._tasks[key]
            task.cancel()

    def _land(self, key: bytes, task: asyncio.Task[Completion]) -> None:
        self._waiters.pop(task, None)
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled():
            task.exception()  # seen, even if every waiter is being cancelled at this moment
