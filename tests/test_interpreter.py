"""How long a thread waits for the interpreter."""

from __future__ import annotations

import threading
from math import inf

import pytest

from whisper_fast._interpreter import waited


@pytest.mark.parametrize("pause", [-1.0, 61.0, float("nan"), inf])
def test_a_pause_that_cannot_be(pause):
    with pytest.raises(ValueError, match="pause is"):
        waited(pause)


def test_the_interpreter_is_waited_for_while_another_thread_has_it():
    stop = threading.Event()

    def holds():
        while not stop.is_set():
            sum(range(2000))

    def longest():
        return max(waited(0.002) for _ in range(20))

    alone = min(waited(0.0) for _ in range(20))
    thread = threading.Thread(target=holds)
    thread.start()
    try:
        assert longest() > 10 * alone
    finally:
        stop.set()
        thread.join()
