"""Load: traffic on the engine, on the bot's sequential way or on a server, and honest figures of what came of it.

hdr       durations in HdrHistogram's layout
model     the simulated model, which says what its share of a message's time was
target    what the load is put on
tally     what became of each message
machine   what it took of the machine
run       one run
page      its report in HTML, with plots (plot)
"""

from .model import FAULTS, Metered
from .run import Patience, Run
from .target import EngineTarget, SequentialTarget, ServerTarget, Target

__all__ = ["FAULTS", "EngineTarget", "Metered", "Patience", "Run", "SequentialTarget", "ServerTarget", "Target"]
