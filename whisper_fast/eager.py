"""Run a coroutine's first step at once; make a task of it only if it suspends.

A coroutine that never suspends (a cache hit, an inline function) then costs neither a task nor a turn of the event
loop. asyncio knows this since 3.12 as the eager task, at the price of a task per call; here one task is kept in
reserve and serves as the *current* task of every first step. It is used up only when a step suspends: then it
carries that coroutine to its end. So the coroutine sees one and the same task from its first line to its last, as
`asyncio.timeout`, `TaskGroup` and anyio's scopes demand, and it has a context of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any

__all__ = ["Eager", "Suspended"]

Suspended = asyncio.Task[Any]
Step = Coroutine[Any, Any, Any]


class Carrier(Coroutine[Any, Any, Any]):
    """What the task in reserve runs: nothing at first, then the coroutine that it was given."""

    __slots__ = ("_context", "_coroutine", "_idle", "_yielded", "task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._idle: asyncio.Future[None] | None = None
        self._coroutine: Step | None = None
        self._context: Context | None = None
        self._yielded: Any = None
        self.task: Suspended = loop.create_task(self, name="eager-reserve")

    def carry(self, coroutine: Step, context: Context, yielded: Any, name: str) -> Suspended:
        """Go on with `coroutine`, which has just yielded `yielded` in its first step."""
        self._coroutine, self._context, self._yielded = coroutine, context, yielded
        self.task.set_name(name)
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        return self.task

    def send(self, value: Any) -> Any:
        if self._coroutine is None:
            self._idle = self.task.get_loop().create_future()
            self._idle._asyncio_future_blocking = True  # what `await` sets on the future that it yields
            return self._idle
        if self._yielded is not self:
            yielded, self._yielded = self._yielded, self
            return yielded
        assert self._context is not None
        return self._context.run(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        if self._coroutine is None:
            raise error[0] if len(error) == 1 else error[1]
        yielded, self._yielded = self._yielded, self
        if yielded is not self and yielded is not None:  # cancelled before the task waited for it by itself
            yielded.cancel()
        assert self._context is not None
        return self._context.run(self._coroutine.throw, *error)

    def close(self) -> None:
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("a carrier is run by its task, it cannot be awaited")


class Eager:
    """Starts coroutines eagerly on the running loop; owns the one task in reserve, until `close()`."""

    def __init__(self) -> None:
        self._reserve: Carrier | None = None

    def start(self, coroutine: Step, name: str) -> tuple[Any, Suspended | None]:
        """Run `coroutine` up to its first suspension.

        Returns (its result, None) if it finished, else (None, the task called `name` that goes on with it).
        Raises what the coroutine raises in that first step.
        """
        carrier = self._reserve
        if carrier is None or carrier.task.done() or carrier.task.cancelling():
            carrier = self._reserve = Carrier(asyncio.get_running_loop())
        loop = carrier.task.get_loop()
        caller = asyncio.current_task(loop)
        context = copy_context()
        if caller is not None:
            asyncio._leave_task(loop, caller)
        asyncio._enter_task(loop, carrier.task)
        try:
            yielded = context.run(coroutine.send, None)
        except StopIteration as stop:
            return stop.value, None
        finally:
            asyncio._leave_task(loop, carrier.task)
            if caller is not None:
                asyncio._enter_task(loop, caller)
        self._reserve = None
        return None, carrier.carry(coroutine, context, yielded, name)

    async def close(self) -> None:
        """End the task in reserve."""
        carrier, self._reserve = self._reserve, None
        if carrier is not None:
            carrier.task.cancel()
            await asyncio.wait([carrier.task])
