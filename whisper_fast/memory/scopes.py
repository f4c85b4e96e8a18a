"""Who may hear what was told where."""

from __future__ import annotations

__all__ = ["may_see"]


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
