"""The language model: one provider, one pool over many, one simulated model.

completion   what a model is to the rest: ChatProvider, Completion
endpoint     where a server is; address (where none may be)
provider     an OpenAI-compatible server; transport (HTTP), wire (JSON), pieces and sse (streams), silence (their
             timeouts), tokens (what was used) under it
simulated    a model that is only simulated
pool         many callers, few slots; under it: upstream (an endpoint with its limit and breaker), slots (who is
             next), call (the budget), alarm (all deadlines), route and prefix (where next), reading (a stream),
             budget (extra requests), hedge and latency (second attempts), flight (equal requests)
packing      small questions of many users in one call
discovery    which model a start finds
"""

from __future__ import annotations

from .completion import ChatProvider, Completion
from .discovery import discover
from .endpoint import Endpoint, Timeouts
from .packing import Classifier, Control, Task
from .pool import LLMPool
from .provider import OpenAIProvider
from .simulated import Constant, Empirical, LogNormal, SimulatedLLM

__all__ = [
    "ChatProvider",
    "Classifier",
    "Completion",
    "Constant",
    "Control",
    "Empirical",
    "Endpoint",
    "LLMPool",
    "LogNormal",
    "OpenAIProvider",
    "SimulatedLLM",
    "Task",
    "Timeouts",
    "discover",
]
