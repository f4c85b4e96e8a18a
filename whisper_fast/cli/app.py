"""The commands by name, and how errors end the process.

Exit codes: 0 all is well, 1 it failed or a figure that must be 0 is not, 2 wrong usage or settings, 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from ..errors import InvalidMessage, SettingsError, WhisperFastError
from . import data, flags, intake, load, measure, prove, talk, undone
from .terminal import fail

__all__ = ["app", "main"]

app = typer.Typer(
    name="whisper-fast",
    help="The runtime under AI companion bots: durable, ordered, isolated, fast. Not speech recognition.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: tuple[Callable[..., None], ...] = (
    talk.serve,
    talk.chat,
    measure.demo,
    load.load,
    measure.doctor,
    flags.flags,
    data.export,
    data.forget,
    data.backup,
    data.restore,
    undone.journal,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(prove.app)
app.command("import")(intake.import_)


def main() -> None:
    """Run the command line and end with an exit code; our errors end in one sentence, never a traceback."""
    as_json = "--json" in sys.argv
    try:
        app()
    except (InvalidMessage, SettingsError) as error:
        fail(error, code=2, as_json=as_json)
    except WhisperFastError as error:
        fail(error, code=1, as_json=as_json)
    except BrokenPipeError:  # the reader (head, jq) has what it wanted
        sys.stderr.close()
        sys.exit(1)
