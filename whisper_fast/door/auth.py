"""Who is asking: API keys compared in constant time, and the user that a request speaks for."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from ..errors import SettingsError
from .refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..settings import Settings

__all__ = ["LOCAL_USER", "Caller", "Keys"]

LOCAL_USER = "local"
"""The user of a request that names none, where no keys are configured."""


class Caller(NamedTuple):
    """Who holds a key: `identity` is the user that the key itself is; `names_users`: it may speak for others."""

    identity: str
    names_users: bool

    def user(self, named: str | None) -> str:
        """Return the user this request is for; raises Refusal 403 if the caller may not speak for `named`."""
        if named is None or named == self.identity:
            return self.identity
        if not self.names_users:
            raise Refusal(
                403,
                "this API key is its own user and may not name another; leave X-User-Id and `user` out, "
                "or list the key in WHISPER_FAST_TRUSTED_API_KEYS",
                code="user_not_allowed",
                param="user",
            )
        return named


class Keys:
    """The API keys that open the door; with none at all, everyone is let in and may name users.

    Only digests are kept. A presented key is compared with every one of them by `hmac.compare_digest`, so the time
    taken tells neither whether nor where it matched.
    """

    def __init__(self, plain: Iterable[str] = (), trusted: Iterable[str] = ()) -> None:
        digests = {sha256(key.encode()).digest(): False for key in plain}
        digests |= {sha256(key.encode()).digest(): True for key in trusted}
        self._digests = tuple(digests.items())

    @classmethod
    def of(cls, settings: Settings) -> Keys:
        """Return the keys that `settings` configure."""
        return cls(
            [key.get_secret_value() for key in settings.api_keys],
            [key.get_secret_value() for key in settings.trusted_api_keys],
        )

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)})"

    def caller(self, authorization: str | None) -> Caller:
        """Return who presents this `Authorization` header; raises Refusal 401."""
        if not self._digests:
            return Caller(LOCAL_USER, names_users=True)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise refused("an API key is needed: send `Authorization: Bearer <key>`")
        presented = sha256(key.strip().encode("latin-1")).digest()
        found = [trusted for digest, trusted in self._digests if hmac.compare_digest(digest, presented)]
        if not found:
            raise refused("this API key is not known here")
        return Caller(f"key-{presented.hex()[:16]}", names_users=found[0])


def refused(message: str) -> Refusal:
    return Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def check_exposure(settings: Settings, keys: Keys, loopback: bool) -> None:
    """Raise SettingsError if the door would stand open to other machines without a key."""
    if not keys and not loopback:
        raise SettingsError(
            f"WHISPER_FAST_HOST is {settings.host!r} and WHISPER_FAST_API_KEYS is empty: without keys the server "
            "only listens on 127.0.0.1, ::1 or localhost; set WHISPER_FAST_API_KEYS, or leave WHISPER_FAST_HOST out"
        )
