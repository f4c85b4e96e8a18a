"""Commands that measure: `demo` and `load` print figures, `doctor` says what this machine and its settings give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import DataDir, Json, configure_logging, console, emit, load_settings, run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

__all__ = ["demo", "doctor", "load"]

MUST_BE_ZERO = ("lost", "duplicated", "out_of_order")

Latency = Annotated[float, typer.Option("--llm-latency", min=0.0, help="Seconds the simulated model takes a reply.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same users, words and arrivals.")]


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


def load(
    users: Annotated[int, typer.Option(min=1, help="Simulated users.")] = 1000,
    period: Annotated[float, typer.Option(min=0.001, help="Mean seconds between two messages of a user.")] = 45.0,
    llm_latency: Latency = 1.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long messages arrive.")] = 10.0,
    seed: Seed = 0,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Data folder (default: a temporary one, removed afterwards).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send messages at their own times, whether the engine keeps up or not, and measure what it adds to the model.

    Example: whisper-fast load --users 2000 --period 10 --llm-latency 1 --seconds 20

    Latency counts from the moment a message was due; added_ms leaves out the model's time and the wait for the
    user's own earlier reply. Ends with 1 if a message is lost, doubled or out of order.
    """
    from ..lab.load import load
    from ..lab.traffic import Traffic
    from .live import status_line

    configure_logging()
    traffic = Traffic(users=users, period=period, seconds=seconds, seed=seed)
    with status_line(console(stderr=True)) as progress:
        result = run(load(traffic, llm_latency=llm_latency, data_dir=data_dir, progress=progress))
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
    from rich.table import Table

    grid = Table(show_header=False, box=None)
    for name, value in result.items():
        grid.add_row(name, spelled(value))
    return grid


def spelled(value: Any) -> str:
    if isinstance(value, dict):
        return "   ".join(f"{name} {spelled(part)}" for name, part in value.items())
    return str(value)
