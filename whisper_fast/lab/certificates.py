"""Certificates for a server on loopback: a right one, a wrong one, and the authority to trust. Needs trustme."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Certificates"]


class Certificates:
    """An authority of its own, made when constructed; its own certificate is written to `folder`/ca.pem.

    Raises SettingsError where the package trustme is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import trustme
        except ImportError:
            raise SettingsError("certificates need the package trustme: pip install trustme") from None
        authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_file))
        self.right, self.wrong = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(self.right)
        authority.issue_cert("elsewhere.example").configure_cert(self.wrong)

    def choosing(self, wrong: Callable[[], bool]) -> ssl.SSLContext:
        """Return a server's context that shows the wrong certificate whenever `wrong()` says so at a handshake."""

        def choose(handshake: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            handshake.context = self.wrong if wrong() else self.right

        self.right.sni_callback = choose
        return self.right
