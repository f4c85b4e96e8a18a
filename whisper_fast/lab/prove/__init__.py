"""The promises, proved on the user's own machine: each proof is a `Proof`, runs in a temporary folder, and counts.

crash        a child process is killed with SIGKILL again and again (`victim`, `points`)
order        many users write at once, a model is slow and fails: is anybody answered out of order, or starved?
isolation    words that only one user knows are looked for wherever another user's could come out
duplicates   a fifth of all messages is delivered again, over restarts
overload     ten times the capacity in open loop
simulation   a thousand days of an engine in virtual time, each from a seed (`../simulation`)
"""

from __future__ import annotations

from .proof import Proof, proved

__all__ = ["Proof", "proved"]
