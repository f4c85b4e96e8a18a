"""How long an import takes in a fresh interpreter, beside those of asyncio and numpy (goal for ours: 150 ms)."""

from __future__ import annotations

import subprocess
import sys

import pytest

STATEMENTS = {
    "nothing": "pass",
    "asyncio": "import asyncio",
    "numpy": "import numpy",
    "whisper_fast": "import whisper_fast",
    "the engine": "from whisper_fast import Engine, Message, Settings",
}
ITSELF = "from time import perf_counter as now; began = now(); {}; print(now() - began)"


@pytest.mark.parametrize("what", STATEMENTS)
def test_interpreter_with_import(benchmark, what):
    """The whole life of an interpreter that imports it; `import_ms` is the import statement alone, best of all."""
    code = ITSELF.format(STATEMENTS[what])
    alone = []

    def interpreter():
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        alone.append(float(done.stdout))

    benchmark.pedantic(interpreter, rounds=10, warmup_rounds=2)
    benchmark.extra_info["import_ms"] = round(min(alone) * 1000, 1)
    if benchmark.enabled:
        print(f"\nimport of {what}: {min(alone) * 1000:.1f} ms")
