"""What a load takes of the machine: this process, its workers, and what they used before they ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from whisper_fast.lab.load import machine
from whisper_fast.lab.load.machine import Machine, offspring

WORKER = """
import subprocess, sys, time
kept = bytearray(60_000_000)
while time.process_time() < 0.4:
    pass
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def worker():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WORKER], **pipes) as process:
        yield process
        process.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_the_workers_count_even_after_their_end(worker):
    seen = Machine()
    before = seen.look()
    assert worker.stdout.readline() == b"done\n"
    during = seen.look()
    assert worker.pid in offspring(machine.psutil.Process().pid)
    assert during.cpu_seconds - before.cpu_seconds > 0.2
    assert seen.look().rss > 60_000_000 + machine.psutil.Process().memory_info().rss - 20_000_000
    worker.stdin.close()
    worker.wait()
    assert seen.look().cpu_seconds >= during.cpu_seconds
    assert seen.rss_peak >= during.rss
    assert len(during.cores) == len(seen.busy) == machine.psutil.cpu_count()
    assert seen.looks == 4


def test_a_process_without_children_has_none(tmp_path):
    assert offspring(2**22 + 1) == set()
