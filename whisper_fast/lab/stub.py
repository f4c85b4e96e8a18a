"""The former name of the faulty language model."""

from __future__ import annotations

from .faulty import FAULTS
from .faulty import FaultyLLM as Stub

__all__ = ["FAULTS", "Stub"]
