"""What all proofs share: figures that can be asked for at any moment, and what they must be."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

__all__ = ["Proof", "Show", "proved", "told"]

Show = Callable[[float, str], None]
"""Called with the share that is done (0 to 1) and a few words."""


class Proof(ABC):
    """One promise put to the test.

    `must_be_zero` names the figures that break the promise when they are not 0, `must_not_be_zero` those without
    which nothing was proved, `bounds` the least and the most that others may be; `a.b` is the figure b in a.
    `arguments` are those of the command that runs the same proof again; `ended` says whether it ran to its end.
    """

    name: ClassVar[str]
    must_be_zero: ClassVar[tuple[str, ...]]
    must_not_be_zero: ClassVar[tuple[str, ...]] = ()
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {}
    arguments: str = ""
    ended = False

    @abstractmethod
    async def run(self, folder: Path, show: Show) -> None:
        """Run to the end in an empty folder. Raises StoreError when there is nothing to be proved with."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """Return the figures so far."""

    def broken(self) -> list[str]:
        """Return what in the figures so far breaks the promise; empty when it is kept."""
        return self.judge(self.figures(), whole=self.ended)

    @classmethod
    def judge(cls, figures: Mapping[str, Any], *, whole: bool = True) -> list[str]:
        """Return what in these figures breaks the promise, each with its name; a figure that is None is not good.

        What was not a `whole` run can be broken by what must be 0 alone: the rest may still come.
        """
        zero = {name: figures[name] for name in cls.must_be_zero}
        wrong = [f"{name} is {value}, not 0" for name, value in zero.items() if value or (whole and value is None)]
        if whole:
            some = {name: named(figures, name) for name in cls.must_not_be_zero}
            wrong += [f"nothing was proved: {name} is {value}" for name, value in some.items() if not value]
            for name, (least, most) in cls.bounds.items():
                value = named(figures, name)
                if value is None or not least <= value <= most:
                    wrong.append(f"{name} is {value}, not from {least:g} to {most:g}")
        return wrong

    @property
    def replay(self) -> str:
        """The command that runs the same proof again."""
        return f"whisper-fast prove {self.name} {self.arguments}".rstrip()


def told(error: BaseException) -> str:
    """Return an error's kind and words, and the line it comes from; of a group, its first error's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    *_, last = traceback.extract_tb(error.__traceback__) or [None]
    where = f" ({Path(last.filename).name}:{last.lineno})" if last is not None else ""
    return f"{type(error).__name__}: {error}{where}"


def named(figures: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        figures = figures[part]
    return figures


async def proved(proof: Proof, show: Show) -> dict[str, Any]:
    """Run a proof in a temporary folder and return its figures."""
    with TemporaryDirectory(prefix=f"whisper-fast-prove-{proof.name}-") as folder:
        await proof.run(Path(folder), show)
    proof.ended = True
    return proof.figures()
