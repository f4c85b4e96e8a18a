"""`load`: traffic on the engine, on the bot's sequential way or on a server, and what came of it."""

from __future__ import annotations

import logging
import shlex
import sys
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SettingsError
from .measure import table
from .terminal import INTERRUPTED, Json, configure_logging, console, emit, run_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..lab.load import Run, Target
    from ..lab.traffic import Arrivals, Traffic

__all__ = ["load"]

LATENCY = 1.0  # seconds
IDLE = 20.0  # seconds without a reply until what is missing is lost: an engine pauses up to 8 before it tries again


class Reference(StrEnum):
    """What the engine can be compared with."""

    sequential = "sequential"


class Gaps(StrEnum):
    """How the gaps between a user's messages are spread."""

    exponential = "exponential"
    lognormal = "lognormal"
    constant = "constant"


def load(
    users: Annotated[int, typer.Option(help="Users who write at any time.")] = 1000,
    period: Annotated[float, typer.Option(help="Mean seconds between two messages of a user.")] = 45.0,
    seconds: Annotated[float, typer.Option(help="How long messages come.")] = 10.0,
    llm_latency: Annotated[
        float | None,
        typer.Option("--llm-latency", help="Seconds the simulated model takes (1); with --url: the one behind it."),
    ] = None,
    llm_tokens: Annotated[int | None, typer.Option("--llm-tokens", help="Length of its answers in tokens.")] = None,
    url: Annotated[str | None, typer.Option(help="Measure the OpenAI-compatible server at this address.")] = None,
    model: Annotated[str | None, typer.Option(help="The model to ask for there (default: its first).")] = None,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="File with its key.")] = None,
    reference: Annotated[Reference | None, typer.Option(help="Measure the bot's way instead of the engine.")] = None,
    closed: Annotated[bool, typer.Option("--closed", help="Closed loop: wait for the reply, then think.")] = False,
    gaps: Annotated[Gaps, typer.Option(help="How a user's gaps are spread.")] = Gaps.exponential,
    session: Annotated[float, typer.Option(help="Messages until a user leaves, on average; 0: never.")] = 20.0,
    away: Annotated[float, typer.Option(help="Seconds until a user comes back, on average.")] = 3600.0,
    replay: Annotated[
        Path | None, typer.Option(help="Arrivals from a recording instead: a trace (CSV) or a channel's log; or .gz.")
    ] = None,
    speed: Annotated[float, typer.Option(help="How many times faster the recording is replayed.")] = 1.0,
    texts: Annotated[Path | None, typer.Option(help="Folder of LoCoMo conversations to speak from.")] = None,
    faults: Annotated[float, typer.Option(help="Share of the simulated model's calls that fail.")] = 0.0,
    objective: Annotated[float, typer.Option(help="Seconds that a good answer may take beyond the model.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same users, words and arrivals.")] = 0,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="An empty folder (default: one that is removed afterwards)."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Send messages at their own times, whether they are answered or not, and measure what it adds to the model.

    Example: whisper-fast load --users 2000 --period 10 --llm-latency 1 --seconds 20

    Latency counts from the moment a message was due; added_ms leaves out the model's time and the wait for the
    user's own earlier reply. Ends with 1 if a message is lost, or, on the engine, doubled or out of order. Ctrl-C
    prints what was counted so far, marked partial.
    """
    from ..lab import users as people
    from ..lab.load import Patience, Run
    from ..lab.load.page import checked, write
    from ..lab.traffic import Traffic

    configure_logging(logging.CRITICAL)  # what goes wrong is counted
    if html is not None:
        checked(html)
    traffic = Traffic(users, period, seconds, seed, closed, gaps.value, session, away)
    words = people.Talks(texts) if texts else None
    arrivals = coming(traffic, replay, speed)
    with ExitStack() as stack:
        if url is not None:
            target = server(url, model, api_key_file, llm_latency, unwanted(reference, faults, llm_tokens, data_dir))
        else:
            folder = stack.enter_context(place(data_dir))
            target = own(folder, traffic, reference, llm_latency, llm_tokens, faults)
        patience = Patience(idle=IDLE + 2 * (llm_latency or LATENCY))
        measured = Run(traffic, arrivals, target, objective=objective, patience=patience, words=words)
        interrupted = watched(measured)
    if html is not None:
        write(measured, html, shlex.join(["whisper-fast", *sys.argv[1:]]))
    report(measured, as_json)
    raise typer.Exit(INTERRUPTED if interrupted else 1 if measured.broken else 0)


def coming(traffic: Traffic, replay: Path | None, speed: float) -> Arrivals:
    """Return the arrivals that were asked for. Raises SettingsError for a recording that is none."""
    from ..lab.replay import Replay, recorded
    from ..lab.traffic import Sessions

    if replay is None:
        return Sessions(traffic)
    if traffic.closed:
        raise SettingsError("--closed and --replay exclude each other: what was recorded waits for nobody")
    return Replay(recorded(replay, traffic), traffic.seconds, speed)


def own(
    folder: Path,
    traffic: Traffic,
    reference: Reference | None,
    latency: float | None,
    tokens: int | None,
    faults: float,
) -> Target:
    """Return the engine or the sequential way, with its simulated model."""
    from ..lab.load import EngineTarget, Metered, SequentialTarget

    if latency is not None and not 0 <= latency < float("inf"):
        raise SettingsError(f"--llm-latency is {latency}; at least 0 seconds are needed")
    if tokens is not None and tokens < 1:
        raise SettingsError(f"--llm-tokens is {tokens}; at least 1 is needed")
    simulated = Metered(LATENCY if latency is None else latency, tokens, traffic.seed, faults=faults)
    kind = SequentialTarget if reference else EngineTarget
    return kind(folder, simulated, traffic.users)


def unwanted(reference: Reference | None, faults: float, tokens: int | None, data_dir: Path | None) -> list[str]:
    """Return the options that mean nothing for a server elsewhere."""
    given = {"--reference": reference, "--faults": faults, "--llm-tokens": tokens, "--data-dir": data_dir}
    return [name for name, value in given.items() if value]


def server(url: str, model: str | None, key: Path | None, latency: float | None, unwanted: list[str]) -> Target:
    """Return the server at an address. Raises SettingsError."""
    from ..lab.load import ServerTarget

    if unwanted:
        raise SettingsError(f"{', '.join(unwanted)} and --url exclude each other: it is the server's own matter")
    try:
        secret = key.read_text().strip() if key else None
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--api-key-file {str(key)!r:.200} cannot be read: {error}") from None
    return ServerTarget(url, model, secret, latency)


@contextmanager
def place(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        yield data_dir
        return
    with TemporaryDirectory(prefix="whisper-fast-load-") as temporary:
        yield Path(temporary)


def watched(measured: Run) -> bool:
    """Run it under a table that moves; returns whether Ctrl-C has cut it."""
    from .live import watching

    with watching(console(stderr=True)) as show:
        try:
            run_once(measured.run(show))
        except KeyboardInterrupt:
            return True
    return False


def report(measured: Run, as_json: bool) -> None:
    """Print the figures."""
    figures = measured.figures()
    if as_json:
        emit({**figures, "histograms": measured.histograms(), "samples": [s._asdict() for s in measured.samples]})
    else:
        console().print(table(figures))
