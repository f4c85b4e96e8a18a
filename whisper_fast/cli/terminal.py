"""What every command shares: its options, its output, its logs, its way to run and to end."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from rich.console import Console

    from ..settings import Settings

__all__ = ["DataDir", "Json", "configure_logging", "console", "emit", "fail", "load_settings", "run", "run_once"]

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Data folder (default: WHISPER_FAST_DATA_DIR, else the user's data folder)."),
]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def load_settings(**overrides: Any) -> Settings:
    """Return the settings of the environment; an override that is None leaves them alone. Raises SettingsError."""
    from ..settings import Settings

    return Settings(**{name: value for name, value in overrides.items() if value is not None})


def emit(result: Mapping[str, Any]) -> None:
    """Print the one JSON object of a command."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def fail(error: Exception, *, code: int, as_json: bool) -> None:
    """End the process with `code` and one sentence on stderr; with `as_json` also as the command's JSON object."""
    if as_json:
        emit({"error": str(error), "type": type(error).__name__})
    sys.stderr.write(f"whisper-fast: {error}\n")
    sys.exit(code)


def console(*, stderr: bool = False) -> Console:
    """Return a rich console: stdout for results, stderr for progress."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine on uvloop, on asyncio where there is none; Ctrl-C ends it cleanly with 130."""
    try:
        return run_once(main)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def run_once(main: Coroutine[Any, Any, T]) -> T:
    """Run as `run` does, for a command that has something to say after Ctrl-C. Raises KeyboardInterrupt."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def configure_logging(level: int = logging.WARNING) -> None:
    """Send all logs to stderr: coloured lines for a person, JSON lines for a program."""
    import structlog

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if sys.stderr.isatty():
        last: list[Any] = [structlog.dev.ConsoleRenderer()]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
