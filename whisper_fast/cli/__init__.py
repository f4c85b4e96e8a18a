"""The command line: `terminal` is what all commands share, the other modules hold a few commands each."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
