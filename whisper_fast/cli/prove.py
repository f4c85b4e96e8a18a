"""`prove`: put the promises to the test on this machine; every figure that should be 0 and is not ends it with 1."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .measure import table
from .terminal import INTERRUPTED, Json, console, emit, loop_factory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..lab.prove import Proof
    from ..lab.prove.proof import Show

__all__ = ["app"]

app = typer.Typer(
    name="prove",
    help="""Put the promises to the test on this machine, in a temporary folder.

    Example: whisper-fast prove crash --kills 1000

    Without a name all proofs run in their quick form, in about a minute and a half. Ends with 1 when a figure that
    must be 0 is not, and prints the command that runs the same again. Ctrl-C prints what was counted so far.
    """,
    invoke_without_command=True,
)

Seed = Annotated[int, typer.Option(help="The same seed draws the same users, words, kills and faults.")]


@app.callback()
def prove(context: typer.Context, seed: Seed = 0, as_json: Json = False) -> None:
    """Run every proof in its quick form, unless one is named."""
    if context.invoked_subcommand is None:
        finish(quick(seed), as_json, many=True)


@app.command()
def crash(
    kills: Annotated[int, typer.Option(min=1, help="How often the engine's process is killed with SIGKILL.")] = 100,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Kill a process that is answering, again and again, and count what was promised and is lost or there twice.

    Example: whisper-fast prove crash --kills 1000

    Half of the kills come at a random moment, start and recovery included, half at a named point of a message's life.
    """
    from ..lab.prove.crash import Crash

    finish([Crash(kills, seed)], as_json)


@app.command()
def order(
    users: Annotated[int, typer.Option(min=1, help="Users who write at once.")] = 500,
    messages: Annotated[int, typer.Option(min=1, help="Messages of each user.")] = 20,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Count messages that are answered before an earlier one of the same user, and users who are left waiting.

    Example: whisper-fast prove order --users 500 --messages 2000
    """
    from ..lab.prove.order import Order

    finish([Order(users, messages, seed)], as_json)


@app.command()
def isolation(
    users: Annotated[int, typer.Option(min=1, help="Users, each with words that only that one knows.")] = 1000,
    recalls: Annotated[int, typer.Option(min=1, help="Recalls in all, in every scope.")] = 50_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Look for one user's words in what another gets: recalls, prompts, replies, streams, errors; and in the log.

    Example: whisper-fast prove isolation --users 1000 --recalls 10000000
    """
    from ..lab.prove.isolation import Isolation

    finish([Isolation(users, recalls, seed)], as_json)


@app.command()
def duplicates(
    deliveries: Annotated[int, typer.Option(min=1, help="Deliveries in all; a fifth of them come again.")] = 10_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Deliver a fifth of all messages again, over restarts, and count second answers.

    Example: whisper-fast prove duplicates --deliveries 1000000
    """
    from ..lab.prove.duplicates import Duplicates

    finish([Duplicates(deliveries, seed)], as_json)


@app.command()
def overload(
    seconds: Annotated[float, typer.Option(min=1.0, help="How long the flood lasts.")] = 10.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Offer ten times the capacity in open loop: how much is still answered, how soon the rest is refused.

    Example: whisper-fast prove overload --seconds 600

    Ends with 1 when something is lost, the goodput falls below 0.9 of its peak, refusals take over 10 ms (p99),
    memory grows by more than 128 MB, or answers 5 s after the flood take more than twice what they took before it.
    """
    from ..lab.prove.overload import Overload

    finish([Overload(seconds, seed)], as_json)


@app.command()
def simulation(
    seeds: Annotated[int, typer.Option(min=1, help="Days to live, each from a seed of its own.")] = 200,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Live whole days of an engine in virtual time: faults, power cuts, deaths, clock jumps; each seed the same day.

    Example: whisper-fast prove simulation --seeds 1 --seed 123
    """
    from ..lab.prove.simulation import Simulation

    finish([Simulation(seeds, seed)], as_json)


def quick(seed: int) -> list[Proof]:
    from ..lab.prove.crash import Crash
    from ..lab.prove.duplicates import Duplicates
    from ..lab.prove.isolation import Isolation
    from ..lab.prove.order import Order
    from ..lab.prove.overload import Overload
    from ..lab.prove.simulation import Simulation

    return [
        Crash(50, seed),
        Order(200, 20, seed),
        Isolation(200, 20_000, seed),
        Duplicates(5_000, seed),
        Overload(5.0, seed),
        Simulation(100, seed),
    ]


def finish(proofs: list[Proof], as_json: bool, *, many: bool = False) -> None:
    """Run proofs one after the other, print their figures, and end the command: 1 when a promise is broken."""
    import logging

    from ..lab.prove.proof import told

    logging.getLogger("whisper_fast").addHandler(logging.NullHandler())  # failures are staged here by the thousand
    results: dict[str, dict[str, Any]] = {}
    interrupted = False
    for proof in proofs:
        try:
            with progress(proof.name) as show:
                results[proof.name] = run(proof, show)
        except KeyboardInterrupt:
            results[proof.name] = {**proof.figures(), "partial": True}
            interrupted = True
            break
        except Exception as error:  # noqa: BLE001 - its figures say how far it came
            results[proof.name] = {**proof.figures(), "partial": True, "error": told(error)}
    report(results if many else next(iter(results.values())), as_json)
    broken = False
    for proof in proofs:
        wrong = wrongs(proof, results.get(proof.name, {}))
        broken |= bool(wrong)
        for line in wrong and [f"{proof.name}: {'; '.join(wrong)}", f"broken; to see it again: {proof.replay}"]:
            console(stderr=True).print(line, style="bold red", markup=False)
    raise typer.Exit(1 if broken else INTERRUPTED if interrupted else 0)


def wrongs(proof: Proof, result: dict[str, Any]) -> list[str]:
    """Return what is wrong with a proof's figures; nothing is with one that was not begun."""
    ended = [result["error"]] if "error" in result else []
    return [*ended, *proof.broken()] if result else []


def run(proof: Proof, show: Show) -> dict[str, Any]:
    import asyncio

    from ..lab.prove import proved

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(proved(proof, show))


def report(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(result)
    else:
        console().print(table(result))


@contextmanager
def progress(name: str) -> Iterator[Show]:
    """Give a function that moves a bar on the terminal; anywhere else nothing moves."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda share, words: None
        return
    columns = TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda share, words: bar.update(task, completed=share, description=words)
