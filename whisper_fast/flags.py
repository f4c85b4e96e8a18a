"""Every optimisation that can be switched off while the engine runs; a change counts from the next message on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import SettingsError

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["Flags"]


class Flags:
    """The flags of one engine; with all of them off it still answers, sequentially.

    `parallel` runs components together, `batching` embeds for many users at once, `caching` keeps segments and
    conversations in memory, `preload` loads for who is about to write, `hedging` asks a slow model a second time,
    `adaptive` lets the model's limit follow what it bears, `ann` searches users with very many memories through
    hnswlib, `budget` (with `adaptive`) lets caches give way when memory is short, and then refuses messages.
    """

    __slots__ = ("adaptive", "ann", "batching", "budget", "caching", "hedging", "parallel", "preload")

    adaptive: bool
    ann: bool
    parallel: bool
    batching: bool
    budget: bool
    caching: bool
    hedging: bool
    preload: bool

    def __init__(self, settings: Settings) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(settings, f"feature_{name}"))

    def __setattr__(self, name: str, value: object) -> None:
        """Switch a flag. Raises SettingsError for an unknown one or a value that is not a bool."""
        if name not in self.__slots__:
            raise SettingsError(f"there is no flag {name!r}; there are {', '.join(self.__slots__)}")
        if not isinstance(value, bool):
            raise SettingsError(f"flag {name} is {value!r:.80}; True or False is allowed")
        super().__setattr__(name, value)

    def as_dict(self) -> dict[str, bool]:
        """Return all flags with their present values."""
        return {name: getattr(self, name) for name in self.__slots__}
