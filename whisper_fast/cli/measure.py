"""Commands that measure: `demo` prints figures, `doctor` says what this machine and its settings give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import DataDir, Json, configure_logging, console, emit, load_settings, run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

__all__ = ["demo", "doctor", "finish", "table"]

MUST_BE_ZERO = ("lost", "duplicated")

Latency = Annotated[float, typer.Option("--llm-latency", min=0.0, help="Seconds the simulated model takes a reply.")]


def demo(
    users: Annotated[int, typer.Option(min=1, help="Simulated users, each with one message.")] = 200,
    llm_latency: Latency = 0.2,
    quick: Annotated[
        bool, typer.Option("--quick", help="30 users and a model of 50 ms: a few seconds in all.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the bot's sequential way against the engine, then kill it with -9 ten times and count what is lost.

    Example: whisper-fast demo --quick

    Both sides use the same components, store and simulated model. Ends with 1 if anything is lost or doubled.
    """
    from ..lab.demo import Plan, demo
    from .live import Sides

    configure_logging()
    plan = Plan(users=30, llm_latency=0.05) if quick else Plan(users=users, llm_latency=llm_latency)
    with Sides(console(stderr=True)) as sides:
        result = run(demo(plan, sides.show))
    finish(result, as_json)


def doctor(data_dir: DataDir = None, as_json: Json = False) -> None:
    """Say what this machine gives: compiler, SIMD, SQLite, the disk's fsync time, the model found, who may call.

    Example: whisper-fast doctor --json

    Ends with 1 and what to do about it if the server would not run well here.
    """
    from ..doctor import examine

    configure_logging()
    result = run(examine(load_settings(data_dir=data_dir)))
    if as_json:
        emit(result)
    else:
        screen = console()
        screen.print(table({name: value for name, value in result.items() if name != "problems"}))
        for problem in result["problems"]:
            screen.print(f"problem: {problem}", style="bold red", markup=False)
    raise typer.Exit(0 if result["ok"] else 1)


def finish(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a measurement and end the command: with 1 when a figure is 0 or not that must not be."""
    if as_json:
        emit(result)
    else:
        console().print(table(result))
    nothing = result.get("accepted") == 0  # nothing was there to be lost
    raise typer.Exit(1 if nothing or any(result.get(name) for name in MUST_BE_ZERO) else 0)


def table(result: Mapping[str, Any]) -> Table:
    """Return a table of names and values."""
    from rich.table import Table

    grid = Table(show_header=False, box=None)
    for name, value in result.items():
        grid.add_row(name, spelled(value))
    return grid


def spelled(value: Any) -> str:
    if isinstance(value, dict):
        return "   ".join(f"{name} {spelled(part)}" for name, part in value.items())
    return str(value)
