"""What moves on a terminal while a command measures; anywhere else nothing moves and no thread redraws it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from ..lab.figures import Figures
    from ..lab.load import Run

__all__ = ["Sides", "status_line", "watching"]


class Sides(Live):
    """The demo's table of both sides, redrawn from what `show` was told last."""

    def __init__(self, console: Console) -> None:
        self.sides: dict[str, Figures] = {}
        super().__init__(console=console, auto_refresh=console.is_terminal, get_renderable=self.table)

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


@contextmanager
def status_line(console: Console) -> Iterator[Callable[[str], None]]:
    """Give a function that shows one line of progress in the place of the last."""
    if not console.is_terminal:
        yield lambda line: None
        return
    with console.status("starting") as status:
        yield status.update


@contextmanager
def watching(console: Console) -> Iterator[Callable[[Run], None]]:
    """Give a function that shows a run as it was when it was looked at last, drawn anew once a second."""
    if not console.is_terminal:
        yield lambda run: None
        return
    with Live(console=console, refresh_per_second=1, transient=True) as live:
        yield lambda run: live.update(now(run))


def now(run: Run) -> Table:
    """Draw what a run has come to: all so far, and its last stretch."""
    tally, table = run.tally, Table("", "", "last second", "")
    last = run.samples[-1] if run.samples else None
    rows = [
        ("sent", tally.sent, "answers/s", last and last.answered_per_s),
        ("answered", tally.answered, "total p50 ms", last and last.total_p50),
        ("in flight", tally.in_flight, "total p99 ms", last and last.total_p99),
        ("shed", tally.shed.total(), "added p99 ms", last and last.added_p99),
        ("errors", tally.errors.total(), "memory MB", last and last.rss_mb),
        ("out of order", tally.out_of_order, "CPU", last and " ".join(f"{share:.0%}" for share in last.cores)),
    ]
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    return table
