"""The demo's live table: both sides as their turns end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from ..lab.figures import Figures

__all__ = ["Sides"]


class Sides(Live):
    """A table on the terminal, redrawn ten times a second from what `show` was told last."""

    def __init__(self, console: Console) -> None:
        self.sides: dict[str, Figures] = {}
        super().__init__(console=console, refresh_per_second=10, get_renderable=self.table)

    def show(self, side: str, figures: Figures) -> None:
        """Take a side's figures; they are read again at each redraw."""
        self.sides[side] = figures

    def table(self) -> Table:
        """Draw the figures as they are now."""
        table = Table("", "turns", "turns/s", "added p50 ms", "added p99 ms")
        for side, figures in self.sides.items():
            added = figures.added_ms(50, 99)
            done = f"{len(figures.total)}/{figures.expected}"
            table.add_row(side, done, f"{figures.turns_per_s:.1f}", *(f"{ms:.1f}" for ms in added.values()))
        return table
