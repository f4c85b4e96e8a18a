"""What the engine sees of itself: each stage of a turn, the slowest turns in full, and who holds the event loop."""

from .loop import LoopWatch
from .record import Record, Stage, Waterfall

__all__ = ["LoopWatch", "Record", "Stage", "Waterfall"]
