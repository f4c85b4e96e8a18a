"""What a worker process does first. It imports next to nothing, for every worker pays for it."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process

__all__ = ["begin"]


def begin() -> None:
    """Leave interrupts to the parent, and end with it: a killed parent cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow_parent, name="follow-parent", daemon=True).start()


def follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
