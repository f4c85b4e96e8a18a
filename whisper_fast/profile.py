"""What was learnt of one function: where it is cheapest to run it, and why."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from time import perf_counter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["Place", "Profile", "Pulse", "copying", "identity", "known_by_name", "name_of"]

Place = Literal["inline", "thread", "process"]

SHORT_CALLS = 8  # calls in a row that must be short before a function first goes inline
MOST_SHORT_CALLS = 4096
LONG_INLINE = 1e-3  # seconds
LONG_CALLS = 4  # calls in a row that must have been worth a process
MOST_LONG_CALLS = 1024
LONG = 5e-3  # seconds: what holds the interpreter for less disturbs less than a process costs
BEAT = 1e-3  # seconds
SMOOTHING = 1 / 16


class Profile:
    """What is known of one function.

    It starts in a thread. After `SHORT_CALLS` calls in a row that each took, as wall time and as CPU time, less than
    the limit that the executor measures for a hop, it runs inline: going elsewhere would cost more than staying. One
    inline call above 1 ms sends it back to threads, and the number of short calls in a row that it then needs is four
    times what it was, up to 4,096. Between the limit and 1 ms nothing changes, so a function near the border does not
    flap.

    From a thread it goes on to a process after `LONG_CALLS` calls in a row for which all of this was measured:

        wall >= 5 ms,  cpu >= wall / 2,  held >= 1/2,  copying <= wall / 5

    `held` is the share of its time in which it did not let others run Python (see `Pulse`), `copying` what pickling
    its arguments and its result took. Only functions that a module knows by their name come into question: a closure
    or a method may depend on what another process does not have. Where the way to the process and back then takes
    more than half of what the call itself takes, it goes back to threads and needs four times as many calls.
    """

    __slots__ = (
        "but", "calls", "cpu", "kind", "long", "movable", "name", "needed", "needed_long",
        "short", "wall", "way", "why",
    )  # fmt: skip

    def __init__(self, name: str, *, movable: bool = False) -> None:
        self.name = name
        self.movable = movable
        self.kind: Place = "thread"
        self.why = "not measured yet"
        self.but = ""
        self.calls = self.short = self.long = 0
        self.needed, self.needed_long = SHORT_CALLS, LONG_CALLS
        self.wall = self.cpu = self.way = 0.0

    def ran_in_thread(self, wall: float, cpu: float, limit: float) -> None:
        """Learn from a call in a thread."""
        self._count(wall)
        self.cpu += (cpu - self.cpu) * (SMOOTHING if self.calls > 1 else 1.0)
        if max(wall, cpu) >= limit:
            self.short = 0
            self.why = f"a call took {wall * 1e6:.0f} us, a hop is worth it from {limit * 1e6:.0f} us{self.but}"
            return
        self.short += 1
        if self.short >= self.needed:
            self.kind = "inline"
            self.why = f"{self.short} calls in a row took less than {limit * 1e6:.0f} us"

    def ran_inline(self, wall: float) -> None:
        """Learn from a call on the loop."""
        self._count(wall)
        if wall > LONG_INLINE:
            self.kind = "thread"
            self.why = f"an inline call held the loop for {wall * 1e3:.1f} ms"
            self.short = 0
            self.needed = min(4 * self.needed, MOST_SHORT_CALLS)

    @property
    def may_move(self) -> bool:
        """Whether the next call in a thread is to be looked at for a process."""
        return self.movable and self.kind == "thread" and self.wall >= LONG

    def worth_a_process(self, wall: float, cpu: float, held: float) -> bool:
        """Say whether a call in a thread was worth a process, copying aside."""
        worth = wall >= LONG and cpu >= wall / 2 and held >= 0.5
        self.long *= worth
        return worth

    def could_move(self, wall: float, copying: float | None) -> None:
        """Learn what copying the arguments and the result of a call took that was worth a process; None: no way."""
        if copying is None:
            self.movable = False
            self.but = "; it holds the interpreter, but its arguments or results cannot be pickled"
            return
        self.long = self.long + 1 if copying <= wall / 5 else 0
        if self.long >= self.needed_long:
            self.kind, self.way = "process", 0.0
            self.why = f"{self.long} calls in a row held the interpreter; the last one for {wall * 1e3:.1f} ms"

    def ran_in_process(self, wall: float, way: float) -> None:
        """Learn from a call in a process, and from the way there and back."""
        self._count(wall)
        self.way += (way - self.way) * (SMOOTHING if self.way else 1.0)
        if self.kind == "process" and self.way > wall / 2:
            self.kind, self.long = "thread", 0
            self.needed_long = min(4 * self.needed_long, MOST_LONG_CALLS)
            self.why = f"the way to a process took {self.way * 1e3:.1f} ms for a call of {wall * 1e3:.1f} ms"

    def _count(self, wall: float) -> None:
        self.calls += 1
        self.wall += (wall - self.wall) * (SMOOTHING if self.calls > 1 else 1.0)


class Pulse:
    """Beats once a millisecond while a call runs in a thread: a beat that does not come was kept from running."""

    __slots__ = ("_beats", "_began", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._beats = 0
        self._began = perf_counter()
        self._timer = loop.call_later(BEAT, self._beat)

    def held(self) -> float:
        """Stop; return the share of the time in which no beat came, from 0 to 1."""
        self._timer.cancel()
        return max(0.0, 1.0 - (self._beats + 1) * BEAT / (perf_counter() - self._began))

    def _beat(self) -> None:
        self._beats += 1
        self._timer = self._loop.call_later(BEAT, self._beat)


def copying(*values: Any) -> float | None:
    """Return the seconds that it takes to pickle `values`, arrays in them aside; None if it cannot be done."""
    began = perf_counter()
    try:
        for value in values:
            pickle.dumps(value, pickle.HIGHEST_PROTOCOL, buffer_callback=lambda _: False)
    except Exception:  # noqa: BLE001 - an object may refuse in any way
        return None
    return perf_counter() - began


def identity(fn: Any) -> Any:
    """Return what stands for all calls of one piece of code: closures, partials and bound methods share it."""
    while isinstance(fn, partial):
        fn = fn.func
    if isinstance(fn, MethodType):
        fn = fn.__func__
    code = getattr(fn, "__code__", None)
    if code is not None:
        return code
    return fn if isinstance(fn, (type, BuiltinFunctionType)) else type(fn)


def name_of(fn: Any) -> str:
    """Return a function's name for people: module and qualified name."""
    while isinstance(fn, partial):
        fn = fn.func
    return f"{getattr(fn, '__module__', None) or 'builtins'}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def known_by_name(fn: Callable[..., Any]) -> bool:
    """Whether another process that imports the function's module finds this very function there."""
    module = sys.modules.get(getattr(fn, "__module__", None) or "")
    return isinstance(fn, FunctionType) and getattr(module, fn.__qualname__, None) is fn
