"""`journal`: what waits for somebody's decision, and the decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidMessage
from .data import opened
from .terminal import DataDir, Json, configure_logging, console, emit, load_settings, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    import apsw

    from ..settings import Settings

__all__ = ["journal"]


def journal(
    release: Annotated[
        list[int] | None,
        typer.Option(help="Try this quarantined message again, or send this held reply again."),
    ] = None,
    drop: Annotated[list[int] | None, typer.Option(help="Take this entry off the list for good.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List messages that were set aside and replies that nobody is known to have; release or drop them.

    Example: whisper-fast journal --release 17 --drop 18

    A message is quarantined when the process died in its turn three times (WHISPER_FAST_QUARANTINE_AFTER). A reply
    is held when it is not known whether it was sent, and its platform would show it twice.
    """
    configure_logging()
    entries = run(decide(load_settings(data_dir=data_dir), release or (), drop or ()))
    if as_json:
        emit({"entries": entries, "released": len(release or ()), "dropped": len(drop or ())})
        return
    for entry in entries:
        console().print("{id}  {state}  {platform}/{channel}  {user}  {message_id}".format(**entry), markup=False)
    console().print(f"{len(entries)} entries wait for a decision", markup=False)


async def decide(settings: Settings, release: Sequence[int], drop: Sequence[int]) -> list[dict[str, Any]]:
    """Carry out the decisions, all or none, and return what is listed then. Raises InvalidMessage, StoreError."""
    from .. import journal as book

    def job(connection: apsw.Connection) -> list[dict[str, Any]]:
        for one in release:
            if not book.release(connection, one):
                raise InvalidMessage(f"{one} is neither quarantined nor held; nothing was changed")
        for one in drop:
            if not book.drop(connection, one):
                raise InvalidMessage(f"{one} is not on the list; nothing was changed")
        return book.listed(connection)

    async with opened(settings) as database:
        if release or drop:
            return await database.write(job)
        return await database.read(job)
