"""Commands about what is stored: `export`, `forget`, `backup`, `restore`; they also work beside a running engine."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..message import checked_user
from .terminal import DataDir, Json, configure_logging, console, emit, load_settings, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from ..settings import Settings
    from ..store.sqlite import Database

__all__ = ["backup", "export", "forget", "opened", "restore"]

User = Annotated[str, typer.Argument(help="The user's id, as the bot or client sends it.")]


def export(
    user: User,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the lines to this file.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write everything that is stored about a user, one JSON object a line.

    Example: whisper-fast export u1 --output u1.jsonl

    With --json one object (user, records) is printed instead of lines.
    """
    configure_logging()
    records = run(collect(load_settings(data_dir=data_dir), checked_user(user)))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if output is not None:
        write_private(output, lines)
    if as_json:
        emit({"user": user, "records": records if output is None else len(records), "path": output and str(output)})
    elif output is not None:
        console().print(f"{len(records)} records written to {output}", markup=False)
    else:
        typer.echo(lines, nl=False)


def forget(
    user: User,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Delete everything that is stored about a user, for good.

    Example: whisper-fast forget u1 --yes
    """
    configure_logging()
    settings = load_settings(data_dir=data_dir)
    if not yes and not as_json:
        typer.confirm(f"Delete everything about {user!r} in {settings.data_dir}?", abort=True, err=True)
    deleted = run(erase(settings, checked_user(user)))
    report({"user": user, "deleted": deleted}, as_json, f"{deleted} rows deleted")


def backup(
    target: Annotated[Path, typer.Argument(help="File to write; replaced only by a complete, verified copy.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Copy the data folder's database to a file and check the copy; a running engine is not disturbed.

    Example: whisper-fast backup /backups/monday.db
    """
    from ..store.backup import backup as copy_out

    configure_logging()
    result = copy_out(load_settings(data_dir=data_dir).data_dir, target)
    report(result, as_json, f"{result['path']}: {result['bytes']} bytes, verified")


def restore(
    source: Annotated[Path, typer.Argument(help="A file that `backup` wrote.")],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Replace the data by a backup; what was there is backed up first, in the data folder.

    Example: whisper-fast restore /backups/monday.db
    """
    from ..store.backup import restore as copy_in

    configure_logging()
    result = copy_in(load_settings(data_dir=data_dir).data_dir, source)
    report(result, as_json, f"{result['path']}: {result['bytes']} bytes restored, verified")


def report(result: Mapping[str, Any], as_json: bool, sentence: str) -> None:
    if as_json:
        emit(result)
    else:
        console().print(sentence, markup=False)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read. Raises StoreReadOnly."""
    from ..errors import StoreReadOnly
    from ..store.files import private_file

    private_file(path)
    try:
        path.write_text(text)
    except OSError as error:
        raise StoreReadOnly(f"{path} cannot be written: {error.strerror}") from None


async def collect(settings: Settings, user: str) -> list[dict[str, Any]]:
    from ..store.export import export_user

    async with opened(settings) as database:
        return await database.read(lambda connection: list(export_user(connection, user)))


async def erase(settings: Settings, user: str) -> int:
    """Delete the rows of `user` and their traces, and return how many there were."""
    from ..errors import StoreLocked
    from ..store.schema import forget_user

    try:
        async with opened(settings, alone=True) as database:
            deleted = await database.write(partial(forget_user, user=user))
            await database.compact()
    except StoreLocked:  # an engine runs: it wipes the traces itself, for it may have them in memory
        async with opened(settings) as database:
            deleted = await database.write(partial(forget_user, user=user))
    return deleted


@asynccontextmanager
async def opened(settings: Settings, *, alone: bool = False) -> AsyncIterator[Database]:
    """Open the data folder, by default without asking to be the only one: an engine notices what was changed."""
    from ..store.sqlite import Database

    database = await Database.open(settings.data_dir, exclusive=alone)
    try:
        yield database
    finally:
        await database.close()
