"""whisper-fast: the runtime under AI companion bots.

A name is imported when it is first asked for, so that `import whisper_fast` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .engine import Engine
    from .message import Message, Reply
    from .settings import Settings

__all__ = ["Engine", "Message", "Reply", "Settings", "errors"]

_ROOMS = {"Engine": ".engine", "Message": ".message", "Reply": ".message", "Settings": ".settings"}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
