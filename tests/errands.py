"""What tests let worker processes do; here, for a worker imports it by its name."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np

KEPT = []


def die(marker, times=1):
    """Kill the worker that this runs in, the first so many times."""
    path = Path(marker)
    runs = len(path.read_text()) if path.exists() else 0
    path.write_text("+" * (runs + 1))
    if runs < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return runs


def hold(marker):
    """Say that it has begun, then take very long."""
    Path(marker).write_text(str(os.getpid()))
    time.sleep(60)


class Odd(Exception):
    """An error that cannot be made from what pickle gives it."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def odd():
    raise Odd(1, 2)


def keep(array):
    KEPT.append(array)
    return len(KEPT)


def kept():
    return [float(array.sum()) for array in KEPT]


def scaled(array):
    array *= 2
    return array


def zeros(nbytes):
    return np.zeros(nbytes, np.uint8)


def drawn():
    return float(np.random.default_rng().random()), float(np.random.random()), random.random()


def holding(milliseconds):
    """Compute in Python, which holds the interpreter."""
    end = time.perf_counter() + milliseconds / 1000
    number = 0
    while time.perf_counter() < end:
        number += 1
    return number


def releasing(data):
    """Compute in C, which lets others run."""
    return hashlib.sha256(data).hexdigest()


def locked(milliseconds):
    """Return what no process can send."""
    holding(milliseconds)
    return threading.Lock()
