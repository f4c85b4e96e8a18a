"""One clock for deadlines, timers, messages and compiled parts."""

from __future__ import annotations

import time

import pytest

from whisper_fast import Message, clock
from whisper_fast._batch import Assembly
from whisper_fast.deadline import Deadline


def test_the_clocks_are_the_systems():
    assert clock.monotonic is time.monotonic
    assert clock.wall is time.time
    assert clock.for_kernels() is None


def test_a_replaced_clock_is_everybodys_and_goes_again():
    now = [100.0]
    with clock.replaced(monotonic=lambda: now[0], wall=lambda: 5.0):
        deadline = Deadline.after(2.0)
        now[0] = 101.5
        assert deadline.remaining() == 0.5
        assert Message(user="u", text="hi").at == 5.0
        assert clock.for_kernels()() == 101.5
    assert clock.monotonic is time.monotonic
    assert Message(user="u", text="hi").at > 5.0


def test_it_goes_even_when_the_block_fails():
    with pytest.raises(ZeroDivisionError), clock.replaced(monotonic=lambda: 0.0, wall=lambda: 0.0):
        _ = 1 / 0
    assert clock.monotonic is time.monotonic


def test_a_batch_is_timed_by_the_clock_it_was_given():
    assembly = Assembly(4, clock=lambda: 7.0)
    assembly.append(object())
    assert assembly.oldest == 7.0
    assembly.fill()
    failing = Assembly(4, clock=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.append(object())
    assert len(failing) == 0
