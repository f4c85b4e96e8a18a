"""An asyncio loop in virtual time: when nothing is ready it is at once as late as the next timer says.

There is no socket, no thread and no waiting in it, so that what happens depends on the code and its seed alone. What
others give to a thread runs inline, and its result comes after a time that `delay()` draws.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from ...store.opened import Opened

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["Stalled", "VirtualLoop"]


class Death(BaseException):
    """Goes through a task whose process has died; nobody catches it to go on."""


LAST_WORDS = 100  # waits in the `finally` blocks of one task


class Stalled(Exception):
    """Everybody waits and no timer is set: nothing would ever happen again."""


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop; `now` is its time in seconds, which begins where the last loop's ended.

    `delay()` draws the seconds of whatever is given to a thread, `look()` is asked before time passes
    whether it may.
    """

    def __init__(self, now: float, delay: Callable[[], float], look: Callable[[], bool]) -> None:
        super().__init__()
        self.now = now
        self._delay = delay
        self._look = look
        self._selector = self
        self._held: dict[asyncio.Future[Any], Any] = {}
        self.set_exception_handler(self._note)
        self.problems: list[str] = []

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    def select(self, timeout: float | None) -> list[Any]:
        """Pass the time that the loop would have waited."""
        if not self._look():
            return []
        if timeout is None:
            raise Stalled(f"everybody waits at {self.now:.3f} s")
        self.now += max(0.0, timeout)
        return []

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Run `func` now, inline; whoever waits hears of it later."""
        future = self.create_future()
        try:
            outcome: tuple[Any, BaseException | None] = func(*args), None
        except Exception as error:  # noqa: BLE001 - the caller's to handle
            outcome = None, error
        self._held[future] = outcome[0]
        self.call_later(self._delay(), self._hand_over, future, *outcome)
        return future

    def die(self) -> None:
        """End the world: no task takes another step, what their `finally` blocks do reaches nobody."""
        asyncio._set_running_loop(self)  # else what they wait for would begin a loop of its own
        buried: set[asyncio.Task[Any]] = set()
        while left := asyncio.all_tasks(self) - buried:  # one that ends may begin another in its `finally` block
            for task in left:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                bury(cast("Coroutine[Any, Any, Any]", task.get_coro()))
            buried |= left
        asyncio._set_running_loop(None)
        for result in self._held.values():
            if isinstance(result, Opened):  # files that nobody had yet taken from the thread
                result.close()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()

    def _hand_over(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        del self._held[future]
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _note(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.problems.append(f"{context.get('message')}: {context.get('exception')!r}")


def bury(coroutine: Coroutine[Any, Any, Any]) -> None:
    """End a coroutine that may wait again and again in its `finally` blocks."""
    try:
        for _ in range(LAST_WORDS):
            coroutine.throw(Death())  # `close` would not reach through an async generator that waits
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
