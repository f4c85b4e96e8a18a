"""The address of one OpenAI-compatible server: checked, brought to one form, and silent about its key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit, urlunsplit

from whisper_fast.errors import SettingsError

__all__ = ["Endpoint"]

VERSION = re.compile(r"v\d+\w*")
UNUSABLE = re.compile(r"[^\x21-\x7e]")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is asked: `base_url` with or without `/v1`, a trailing slash or `/chat/completions`.

    `model` None asks the server for its list and takes the first. `max_concurrent` is this server's own limit
    (1 for a local server that answers one at a time); None takes the pool's. Raises SettingsError when the
    address is not http(s), names no host, or carries credentials or a query.

    >>> Endpoint("http://127.0.0.1:1234/").base_url
    'http://127.0.0.1:1234/v1'
    """

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", normal(self.base_url))
        if self.api_key is not None and (not self.api_key or UNUSABLE.search(self.api_key)):
            raise SettingsError("api_key is empty or holds a space, a control or a non-ASCII character")
        if self.max_concurrent is not None and self.max_concurrent < 1:
            raise SettingsError(f"max_concurrent is {self.max_concurrent}; it must be at least 1")


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
