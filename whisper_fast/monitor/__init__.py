"""What the engine sees of itself: each stage of a turn, the slowest turns in full, the loop, memory, what limits."""

from .adaptation import Adaptation, controls_of
from .budget import Budget
from .finder import Finder, Finding
from .loop import LoopWatch
from .pressure import Gauge
from .probe import Probe
from .record import Record, Stage, Waterfall
from .resources import Parts
from .snapshot import Snapshots

__all__ = [
    "Adaptation",
    "Budget",
    "Finder",
    "Finding",
    "Gauge",
    "LoopWatch",
    "Parts",
    "Probe",
    "Record",
    "Snapshots",
    "Stage",
    "Waterfall",
    "controls_of",
]
