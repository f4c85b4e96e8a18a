"""What the engine sees of itself: how long each stage of a turn takes, and the slowest turns in full."""

from .record import Record, Stage, Waterfall

__all__ = ["Record", "Stage", "Waterfall"]
