"""What runs in a worker process. It imports next to nothing, for every worker pays for it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from multiprocessing import parent_process
from typing import Any

__all__ = ["begin", "call"]


def begin() -> None:
    """Leave interrupts to the parent, and end with it: a killed parent cannot tell its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow_parent, name="follow-parent", daemon=True).start()


def follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def call(work: bytes) -> Any:
    """Run a pickled (function, arguments). Unpickled here, an import that fails is an error and not a dead worker."""
    fn, args = pickle.loads(work)  # noqa: S301 - the parent wrote it
    return fn(*args)
