"""Where a language model may be: link-local and metadata addresses are refused, however they are written."""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Final

from whisper_fast.errors import SettingsError

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver

__all__ = ["ForbiddenAddress", "checked_host", "forbidden", "guarded_resolver"]

Address = IPv4Address | IPv6Address

METADATA_HOSTS: Final = frozenset(
    {"instance-data", "instance-data.ec2.internal", "metadata", "metadata.goog", "metadata.google.internal"}
)
METADATA: Final = frozenset(
    map(ip_address, ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"))
)
"""Metadata services outside 169.254.0.0/16: Alibaba, Azure, Oracle, Amazon and Google over IPv6."""

LINK_LOCAL: Final = (ip_network("169.254.0.0/16"), ip_network("fe80::/10"))
NAT64: Final = ip_network("64:ff9b::/96")
NUMERIC: Final = re.compile(r"[0-9a-fx.]+", re.IGNORECASE)
REMEDY: Final = "set WHISPER_FAST_LLM_ALLOW_LINK_LOCAL=true (Endpoint: allow_link_local) if it is really meant"


def checked_host(host: str) -> str:
    """Return `host` if a model may be there; raises SettingsError for a link-local or metadata address or name."""
    if host.rstrip(".").lower() in METADATA_HOSTS:
        raise SettingsError(f"base_url names the metadata service {host!r:.100}; {REMEDY}")
    address = literal(host)
    if address is not None and forbidden(address):
        raise SettingsError(f"base_url names the link-local or metadata address {address}; {REMEDY}")
    return host


def literal(host: str) -> Address | None:
    """Return the address that `host` is, None for a name.

    The system's resolver also takes IPv4 in one to four parts, each decimal, octal or hexadecimal (inet_aton(3)).

    >>> literal("0xa9fea9fe")
    IPv4Address('169.254.169.254')
    """
    try:
        return ip_address(host.rstrip(".").partition("%")[0])
    except ValueError:
        pass
    if not NUMERIC.fullmatch(host):
        return None
    try:
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None


def forbidden(address: Address) -> bool:
    """Say whether `address` is link-local or a metadata service, also inside an IPv6 address that carries IPv4."""
    return any(
        one in METADATA or any(one.version == net.version and one in net for net in LINK_LOCAL)
        for one in (address, *carried(address))
    )


def carried(address: Address) -> list[IPv4Address]:
    """Return the IPv4 addresses inside an IPv6 one: mapped or compatible (RFC 4291), 6to4 (3056), NAT64 (6052)."""
    if isinstance(address, IPv4Address):
        return []
    found = [one for one in (address.ipv4_mapped, address.sixtofour) if one is not None]
    if address in NAT64 or int(address) >> 32 == 0:
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return found


class ForbiddenAddress(OSError):
    """A name leads to no address that is allowed."""


def guarded_resolver() -> AbstractResolver:
    """Return aiohttp's resolver without the addresses that are forbidden: those it returns are the ones dialled.

    It raises ForbiddenAddress for a name that leads to no other.
    """
    from aiohttp.resolver import DefaultResolver

    class GuardedResolver(DefaultResolver):  # type: ignore[misc,valid-type]  # its class depends on what is installed
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[aiohttp.abc.ResolveResult]:
            found: list[aiohttp.abc.ResolveResult] = await super().resolve(host, port, family)
            allowed = [one for one in found if not forbidden(ip_address(one["host"].partition("%")[0]))]
            if found and not allowed:
                raise ForbiddenAddress(f"the name leads to a link-local or metadata address; {REMEDY}")
            return allowed

    return GuardedResolver()
