"""An engine's days in virtual time, each drawn from a seed: the real code, but for disk, model, users and clock.

loop     an asyncio loop whose time passes at once
parts    the engine with a disk that fails and a writer and an executor without threads
plan     what happens in a day: messages, redeliveries, faults, crashes
platform the chat networks that replies are sent to
world    the day itself, life after life of the process
verdict  what must be true at its end
"""

from __future__ import annotations

from .verdict import Verdict
from .world import simulate

__all__ = ["Verdict", "simulate"]
