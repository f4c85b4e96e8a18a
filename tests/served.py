"""A server in a process of its own, for tests that talk to it as strangers do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

CHILD = """
import asyncio, sys
from whisper_fast import Settings
from whisper_fast.door.server import serve
from whisper_fast.llm import SimulatedLLM

llm = SimulatedLLM(latency=float(sys.argv[1])) if sys.argv[1] else None
asyncio.run(serve(Settings(), llm=llm, ready=lambda address: print(address, flush=True)))
"""


@contextmanager
def served(data_dir, *, latency=0.05, llm=None, **variables):
    """Serve `data_dir` with a simulated model, or the one at `llm`; yields the process, its address in `address`.

    `variables` are environment variables without their prefix. The process is ended with SIGTERM if it still runs.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WHISPER_FAST_", "LLM_"))}
    given = {"data_dir": data_dir, "port": 0, **variables}
    env |= {f"WHISPER_FAST_{name.upper()}": str(value) for name, value in given.items()}
    if llm is not None:
        env |= {"LLM_CHAT_API_URL": llm, "LLM_CHAT_MODEL": "m"}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(latency) if llm is None else ""], env=env, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            child.address = child.stdout.readline().strip()
            assert child.address, f"the server did not start: {child.wait(10)}"
            yield child
        finally:
            child.terminate()
            child.wait(30)


def heed_ctrl_c():
    """Before a child begins: undo what a shell does to what it runs in the background, where Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
