"""What the engine sees of itself: each stage of a turn, the slowest turns in full, who holds the loop, and memory."""

from .budget import Budget
from .loop import LoopWatch
from .pressure import Gauge
from .record import Record, Stage, Waterfall
from .snapshot import Snapshots

__all__ = ["Budget", "Gauge", "LoopWatch", "Record", "Snapshots", "Stage", "Waterfall"]
