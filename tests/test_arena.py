"""Shared memory: pieces never overlap, views keep their place, and gaps are used again."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast._span import Span, copy_into
from whisper_fast.arena import Inbox, Outbox, shared_file


@pytest.fixture
def ends():
    file = shared_file()
    outbox, inbox = Outbox(file, header=8), Inbox(os.dup(file))
    yield outbox, inbox
    outbox.close()
    inbox.close()


def pair():
    file = shared_file()
    return Outbox(file, header=8), Inbox(os.dup(file))


@settings(max_examples=50)
@given(st.lists(st.one_of(st.integers(0, 20_000), st.none()), max_size=40))
def test_what_is_put_is_seen_until_it_is_let_go(steps):
    """A step puts so many bytes, or (None) lets the oldest go; plain bytes are the oracle."""
    outbox, inbox = pair()
    seen = []
    for n, step in enumerate(steps):
        if step is None:
            if seen:
                seen.pop(0)
            outbox.free(inbox.take_returned())
        else:
            data = bytes([n]) * step
            (view,) = inbox.look(outbox.put([memoryview(data)]))
            seen.append((np.frombuffer(view, np.uint8), data))
            del view
    assert all(array.tobytes()[: len(data)] == data for array, data in seen)
    seen.clear()
    gc.collect()
    outbox.free(inbox.take_returned())
    assert outbox.put([memoryview(b"x")]) == [(64, 1)]
    outbox.close()
    inbox.close()


def test_a_gap_is_used_again(ends):
    outbox, _ = ends
    first, second, third = outbox.put([memoryview(bytes(1000))] * 3)
    outbox.free([second[0]])
    assert outbox.put([memoryview(bytes(2000))]) != [second]
    assert outbox.put([memoryview(bytes(900))]) == [(second[0], 900)]
    assert first[0] < second[0] < third[0]


def test_a_place_is_returned_when_the_last_view_has_gone(ends):
    outbox, inbox = ends
    (piece,) = outbox.put([memoryview(b"0123456789")])
    (span,) = inbox.look([piece])
    view = np.frombuffer(span, np.uint8)
    part = view[2:5]
    del span, view
    assert not inbox.take_returned()
    assert part.tobytes() == b"234"
    del part
    assert inbox.take_returned() == [piece[0]]
    assert not inbox.take_returned()


def test_too_much_is_an_error_that_takes_nothing(ends):
    outbox, _ = ends

    class Huge:
        nbytes = (4 << 30) + 1

    before = outbox.nbytes
    with pytest.raises(OSError, match="are allowed"):
        outbox.put([memoryview(b"1"), Huge()])
    assert outbox.nbytes == before
    assert outbox.put([memoryview(b"2")]) == [(64, 1)]


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, 11), (11, 0), (1 << 62, 1), (1, (1 << 63) - 1)])
def test_a_span_lies_inside_its_mapping(offset, size):
    with pytest.raises(ValueError, match="not inside"):
        Span(bytearray(10), offset, size)


def test_a_span_is_a_writable_buffer_that_keeps_its_mapping():
    mapping = bytearray(b"0123456789")
    span = Span(mapping, 2, 4)
    memoryview(span)[:2] = b"ab"
    assert (bytes(span), len(span), span.offset, span.size) == (b"ab45", 4, 2, 4)
    with pytest.raises(BufferError):
        mapping.append(0)
    del span
    mapping.append(0)
    assert mapping == b"01ab456789\0"


def test_copy_into_refuses_what_does_not_fit():
    mapping = bytearray(4)
    copy_into(mapping, 1, b"abc")
    assert mapping == b"\0abc"
    for offset, data in ((2, b"abc"), (-1, b"a"), (5, b"")):
        with pytest.raises(ValueError, match="not inside"):
            copy_into(mapping, offset, data)
    with pytest.raises((BufferError, ValueError)):
        copy_into(mapping, 0, memoryview(b"abcdef")[::2])
    large = os.urandom(1 << 20)
    target = bytearray(1 << 20)
    copy_into(target, 0, large)
    assert target == large
