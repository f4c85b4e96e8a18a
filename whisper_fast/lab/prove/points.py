"""The moments in a message's life at which the victim can be told to die, by name.

A point is a function of the engine and the moment before or after it. The victim, and nobody else, wraps that one
function in its own process before its engine opens; the engine itself knows of no point.
"""

from __future__ import annotations

import os
import signal
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import journal
from ...conversation import Conversations
from ...journal import Journal
from ...memory import MemoryStore
from ...round import Round
from ...store.claims import Claims
from ...turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["POINTS", "arm"]


class Point(NamedTuple):
    """Before or after which call of the engine the process dies."""

    owner: Any
    function: str
    after: bool = False


POINTS = {
    "before-accept-commit": Point(journal, "insert", after=True),
    "before-ack": Point(Turns, "_claim"),
    "after-claim": Point(Claims, "take", after=True),
    "before-record": Point(Journal, "record"),
    "before-delivery": Point(Round, "deliver"),
    "before-complete": Point(Turns, "_remember"),
    "within-complete": Point(Conversations, "insert", after=True),
    "after-complete": Point(MemoryStore, "publish"),
}
"""In the order of a message's life: stored, not committed; committed, its sender not told; its turn runs; answered,
not recorded; recorded, not delivered; delivered, not remembered; half remembered; remembered, not shown."""


def arm(name: str, passes: int) -> None:
    """Let this process die by its own SIGKILL at the `passes`-th time that it comes by the point."""
    point = POINTS[name]
    setattr(point.owner, point.function, deadly(getattr(point.owner, point.function), point.after, passes))


def deadly(function: Callable[..., Any], after: bool, passes: int) -> Callable[..., Any]:
    left = passes

    @wraps(function)
    def counted(*args: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left or after:
            result = function(*args, **named)
            if left:
                return result
        os.kill(os.getpid(), signal.SIGKILL)
        return None  # never: nobody survives SIGKILL

    return counted
