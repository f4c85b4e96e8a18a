"""Who may hear what was told where."""

from __future__ import annotations

__all__ = ["may_see", "visible_scopes"]


def may_see(asking: str, told: str) -> bool:
    """Say whether a memory told in scope `told` may be recalled in scope `asking`.

    asking             sees
    dm                 dm, global, server:*/public
    server:X/private   server:X/private, server:X/public, global
    server:X/public    server:X/public, global
    global             global
    """
    if told in (asking, "global"):
        return True
    if not told.endswith("/public"):
        return False
    return asking == "dm" or asking == f"{told.removesuffix('/public')}/private"


def visible_scopes(asking: str) -> tuple[list[str], bool]:
    """Return what `may_see` allows as a filter: scopes by name, and whether every public scope is seen as well."""
    scopes = {asking, "global"}
    if asking.endswith("/private"):
        scopes.add(f"{asking.removesuffix('/private')}/public")
    return sorted(scopes), asking == "dm"
