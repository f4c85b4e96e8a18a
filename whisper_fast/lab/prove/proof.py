"""What all proofs share: figures that can be asked for at any moment, and what they must be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

__all__ = ["Proof", "Show", "proved"]

Show = Callable[[float, str], None]
"""Called with the share that is done (0 to 1) and a few words."""


class Proof(ABC):
    """One promise put to the test.

    `must_be_zero` names the figures that break the promise when they are not 0; `arguments` are those of the command
    that runs the same proof again.
    """

    name: ClassVar[str]
    must_be_zero: ClassVar[tuple[str, ...]]
    arguments: str = ""

    @abstractmethod
    async def run(self, folder: Path, show: Show) -> None:
        """Run to the end in an empty folder. Raises StoreError when there is nothing to be proved with."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """Return the figures so far."""

    def broken(self) -> bool:
        """Say whether the figures so far break the promise."""
        figures = self.figures()
        return any(figures[name] for name in self.must_be_zero)

    @property
    def replay(self) -> str:
        """The command that runs the same proof again."""
        return f"whisper-fast prove {self.name} {self.arguments}".rstrip()


async def proved(proof: Proof, show: Show) -> dict[str, Any]:
    """Run a proof in a temporary folder and return its figures."""
    with TemporaryDirectory(prefix=f"whisper-fast-prove-{proof.name}-") as folder:
        await proof.run(Path(folder), show)
    return proof.figures()
