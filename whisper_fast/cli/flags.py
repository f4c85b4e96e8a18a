"""`flags`: the optimisations of a running server, listed and switched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingsError
from .terminal import Json, configure_logging, console, emit, load_settings, run

if TYPE_CHECKING:
    from ..settings import Settings

__all__ = ["flags"]

SECONDS = 10.0  # for the server to answer
SIDES = {"on": True, "off": False}
HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a server listens that listens everywhere


def flags(
    changes: Annotated[list[str] | None, typer.Argument(metavar="[NAME=on|off]...", help="What to switch.")] = None,
    reason: Annotated[str, typer.Option(help="Why; it is logged and kept with the change.")] = "",
    url: Annotated[
        str | None, typer.Option(help="The server (default: WHISPER_FAST_HOST and WHISPER_FAST_PORT).")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the optimisations of a running server, or switch some; it counts from the next message on.

    Example: whisper-fast flags caching=off hedging=off --reason "looking for stale answers"

    Where the server has API keys, WHISPER_FAST_TRUSTED_API_KEYS must hold one of its trusted ones.
    """
    configure_logging()
    wanted = dict(map(parsed, changes or ()))
    if wanted and not reason.strip():
        raise SettingsError('--reason is missing: say why, as in --reason "looking for stale answers"')
    told = run(ask(load_settings(), url, wanted, reason))
    if as_json:
        emit(told)
        return
    for flag in told["flags"]:
        state = "on" if flag["on"] else "off, tried again by itself" if flag["resting"] else "off"
        failed = f" (failed {flag['failures']} times)" if flag["failures"] else ""
        tell(f"{flag['name']:9} {state}{failed}: {flag['does']}")
    for change in told["changes"][: len(wanted)]:
        tell(f"{change['flag']} is {'on' if change['on'] else 'off'} now: {change['reason']}")


def tell(line: str) -> None:
    console().print(line, markup=False, soft_wrap=True)


def parsed(change: str) -> tuple[str, bool]:
    """Return the flag and what it shall be. Raises SettingsError."""
    name, _, side = change.partition("=")
    if side not in SIDES:
        raise SettingsError(f"{change!r:.80} is no change of a flag; write it as caching=off or caching=on")
    return name, SIDES[side]


async def ask(settings: Settings, url: str | None, wanted: dict[str, bool], reason: str) -> dict[str, Any]:
    """Return flags and changes as the server tells them, after switching what is wanted. Raises SettingsError."""
    import aiohttp

    address = (url or default(settings)).rstrip("/") + "/ops/flags"
    keys = [*settings.trusted_api_keys, *settings.api_keys]
    headers = {"authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {}
    body = {"flags": wanted, "reason": reason} if wanted else None
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(SECONDS), headers=headers) as session,
            session.request("POST" if body else "GET", address, json=body) as response,
        ):
            told: dict[str, Any] = await response.json()
    except (aiohttp.ClientError, ValueError, TimeoutError) as error:
        what = f"no whisper-fast server answers at {address} ({type(error).__name__})"
        raise SettingsError(f"{what}; start `whisper-fast serve`, or say with --url where it is") from None
    if not response.ok:
        raise SettingsError(f"the server refused: {told.get('error', {}).get('message', response.status)}")
    return told


def default(settings: Settings) -> str:
    host = HERE.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
