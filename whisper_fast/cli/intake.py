"""The command `import`: memories from a file that `export` wrote, or from a bot's Chroma server."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..message import checked_user
from .data import opened, report
from .live import status_line
from .terminal import DataDir, Json, configure_logging, console, load_settings, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..settings import Settings

__all__ = ["import_"]


def import_(
    source: Annotated[str, typer.Argument(help="A file of JSON lines, or `chroma` for a bot's Chroma server.")],
    user: Annotated[str | None, typer.Option(help="Give a file's memories to this user.")] = None,
    url: Annotated[str, typer.Option(help="Address of the Chroma server.")] = "http://localhost:8000",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read, check and count; store nothing.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Take memories in; what was taken in before is known and stored once.

    Example: whisper-fast import chroma --url http://localhost:8000 --dry-run

    From Chroma come the collections user_memories and global_facts. Ids are new; a running engine sees what came.
    """
    configure_logging()
    owner = None if user is None else checked_user(user)
    with status_line(console(stderr=True)) as progress:
        counts = run(take(load_settings(data_dir=data_dir), source, owner, url, dry_run, progress))
    done = "would be stored" if dry_run else "stored"
    sentence = "{read} read, {stored} {done}, {known} known, {invalid} invalid, of {users} users"
    report({"source": source, "dry_run": dry_run, **counts}, as_json, sentence.format(**counts, done=done))


async def take(
    settings: Settings, source: str, user: str | None, url: str, dry_run: bool, progress: Callable[[str], Any]
) -> dict[str, int]:
    from ..memory import MemoryStore
    from ..memory.chroma import Connection
    from ..memory.intake import from_chroma, from_lines, take_in
    from ..models.chosen import chosen_embedder, close_embedder

    async with AsyncExitStack() as stack:
        if source == "chroma":
            records = from_chroma(await stack.enter_async_context(Connection.open(url)))
        else:
            records = from_lines(Path(source), user)
        database = await stack.enter_async_context(opened(settings))
        embedder = await chosen_embedder(settings)
        stack.push_async_callback(close_embedder, embedder)
        store = MemoryStore(database, embedder)
        stack.push_async_callback(store.close)
        return await take_in(store, records, dry_run=dry_run, progress=lambda read: progress(f"{read} records read"))
