"""The address of one OpenAI-compatible server: checked, brought to one form, and silent about its key."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit, urlunsplit

from whisper_fast.errors import SettingsError

from .address import checked_host

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Endpoint", "Timeouts"]

VERSION = re.compile(r"v\d+\w*")
UNUSABLE = re.compile(r"[^\x21-\x7e]")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds of the call's budget that one step may take; None lets it take all that is left.

    connect         name, connection and TLS handshake
    first_token     from the request to the first piece of a stream, or to a whole answer
    between_tokens  between two pieces of a stream; what brings no piece (a comment, one byte) does not count
    """

    connect: float | None = 10.0
    first_token: float | None = None
    between_tokens: float | None = 30.0

    def __post_init__(self) -> None:
        for name in ("connect", "first_token", "between_tokens"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise SettingsError(f"{name} is {seconds!r:.40}; it must be more than 0 seconds, or None")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is asked: `base_url` with or without `/v1`, a trailing slash or `/chat/completions`.

    `model` None asks the server for its list and takes the first. `max_concurrent` is this server's own limit
    (1 for a local server that answers one at a time); None takes the pool's. `ca_file` is a PEM file with the
    certificates to trust there instead of the system's. `proxy` is the address of an HTTP proxy; none is taken from
    the environment. Link-local and metadata addresses need `allow_link_local`. Raises SettingsError when the address
    is not http(s), names no host or one that is not allowed, or carries credentials or a query, and when `ca_file`
    cannot be used.

    >>> Endpoint("http://127.0.0.1:1234/").base_url
    'http://127.0.0.1:1234/v1'
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_concurrent: int | None = None
    timeouts: Timeouts = Timeouts()
    ca_file: str | Path | None = None
    proxy: str | None = field(default=None, repr=False)
    allow_link_local: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", normal(self.base_url))
        if not self.allow_link_local:
            checked_host(urlsplit(self.base_url).hostname or "")
        if self.api_key is not None and (not self.api_key or UNUSABLE.search(self.api_key)):
            raise SettingsError("api_key is empty or holds a space, a control or a non-ASCII character")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise SettingsError(f"max_concurrent is {self.max_concurrent}; it must be at least 1")
        if self.proxy is not None and not usable_proxy(self.proxy):
            raise SettingsError("proxy is not an address; it looks like http://127.0.0.1:3128")
        if self.ca_file is not None:
            self.trust()

    def trust(self) -> ssl.SSLContext | None:
        """Return what decides about the server's certificate, None for the system's own; raises SettingsError."""
        if self.ca_file is None:
            return None
        try:
            return ssl.create_default_context(cafile=str(self.ca_file))
        except OSError as error:
            why = "it holds no certificate" if isinstance(error, ssl.SSLError) else (error.strerror or "unreadable")
            raise SettingsError(f"ca_file is {str(self.ca_file)!r:.200}: {why}") from None


def usable_proxy(url: str) -> bool:
    parts = split(url)
    return parts is not None and parts.scheme == "http" and bool(parts.hostname) and not UNUSABLE.search(url)


def normal(url: str) -> str:
    """Return `url` in its one form, ending in its version segment; raises SettingsError."""
    parts = checked(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not any(VERSION.fullmatch(segment) for segment in path.split("/")):
        path += "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def checked(url: str) -> SplitResult:
    """Return the parts of `url`; raises SettingsError whose text never repeats credentials or a query."""
    parts = split(url.strip())
    if parts is None:
        raise SettingsError("base_url is not an address; it looks like http://127.0.0.1:1234/v1")
    if parts.username is not None or parts.password is not None:
        raise SettingsError("base_url carries credentials; give them as api_key")
    if parts.scheme not in ("http", "https"):
        raise SettingsError(f"base_url starts with {parts.scheme[:20]!r}; only http:// and https:// are allowed")
    if not parts.hostname or UNUSABLE.search(parts.netloc):
        raise SettingsError("base_url names no host; it looks like http://127.0.0.1:1234/v1")
    if parts.query or parts.fragment:
        raise SettingsError(f"base_url at {parts.hostname:.100} has a query or a fragment; leave it out")
    return parts


def split(url: str) -> SplitResult | None:
    """Return the parts of `url`, None where it has no such parts; urllib's error would repeat the text."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # checks it
    except ValueError:
        return None
    return parts
