"""What runs in worker processes: the nursery that forks them, and the loop of one worker.

A worker's link carries frames: four bytes of length, then a marshalled tuple. A call is (number, data, pieces, taken
back, main), an answer (number, data, pieces, taken back, peak bytes, seconds): `data` is a pickle, its arrays lie at
`pieces` of the arena of that direction; a long pickle is itself the first piece, and `data` is None. `taken back` are
offsets of the other direction's arena that are no longer looked at. Before a worker begins a call it writes the
number into the first bytes of its arena, so that its parent knows what was running when it died. `main` says where
the program's main module is, if the call needs it.

It imports next to nothing, for every worker pays for it.
"""

from __future__ import annotations

import marshal
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import traceback
from select import poll
from struct import Struct
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .arena import Inbox, Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .arena import Piece

__all__ = ["LENGTH", "RUNNING", "begin", "framed", "pickled", "placed", "unpacked"]

LENGTH = Struct("<I")
RUNNING = Struct("<Q")
IN_BAND = 32 << 10  # bytes of a pickle that go through the link; longer ones through the arena
ARRAY = 4 << 10  # bytes from which an array goes through the arena
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024
SIGKILL_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def begin(control: int) -> None:
    """Be the nursery at the other end of this descriptor; where a fresh interpreter starts."""
    nurse(socket.socket(fileno=control))


def nurse(control: socket.socket) -> None:
    """Fork a worker for each (link, arena, arena) that comes through `control`, until its other end is closed.

    It has one thread and holds nothing, so its children start in milliseconds, without the program's locks or
    threads. Answers each request with the worker's process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps them
    while True:
        _, files, _, _ = socket.recv_fds(control, 1, 3)
        if len(files) < 3:
            return
        born = os.fork()
        if not born:
            control.close()
            live(*files)
        for file in files:
            os.close(file)
        control.sendall(RUNNING.pack(born))


def live(link: int, calls: int, answers: int) -> None:
    """Be a worker until the parent closes the link; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_with_parent(link)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # else all workers would draw the same numbers
        work(socket.socket(fileno=link), Inbox(calls), Outbox(answers, header=RUNNING.size))
        code = 0
    except ConnectionError:  # the parent is gone
        pass
    except BaseException:  # noqa: BLE001 - a mistake of this module: nobody else could tell what happened
        traceback.print_exc()
    finally:
        os._exit(code)


def end_with_parent(link: int) -> None:
    """Make sure that a parent which is killed takes this process with it, also out of a call that never ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(SIGKILL_WITH_PARENT, signal.SIGKILL)
    threading.Thread(target=follow, args=(link,), name="follow-parent", daemon=True).start()


def follow(link: int) -> None:
    closing = poll()
    closing.register(link, 0)
    closing.poll()  # nothing is asked for, so only the end of the connection is reported
    os._exit(1)


def work(link: socket.socket, inbox: Inbox, outbox: Outbox) -> None:
    """Answer the calls that come through `link` one after the other."""
    for number, data, pieces, taken_back, main in frames(link):
        RUNNING.pack_into(outbox.mapping, 0, number)
        outbox.free(taken_back)
        began = perf_counter()
        content = answer(data, pieces, inbox, outbox, main)
        link.sendall(framed(number, *content, inbox.take_returned(), peak(), perf_counter() - began))


def frames(link: socket.socket) -> Iterator[Any]:
    stream = link.makefile("rb")
    while head := stream.read(LENGTH.size):
        yield marshal.loads(stream.read(LENGTH.unpack(head)[0]))  # noqa: S302 - the parent wrote it


def answer(
    data: bytes | None, pieces: list[Piece], inbox: Inbox, outbox: Outbox, main: dict[str, str] | None = None
) -> tuple[bytes | None, list[Piece]]:
    """Return the packed outcome (True, result) or (False, error) of a call."""
    try:
        if main:
            import_main(main)
        fn, args = unpacked(data, pieces, inbox)
        outcome = True, fn(*args)
        del fn, args  # what it looked at may be given back with this answer
        return placed(*pickled(outcome), outbox)
    except BaseException as error:  # noqa: BLE001 - whatever a call raises, SystemExit too, is its caller's
        return placed(*pickled((False, sendable(error))), outbox)


def import_main(main: dict[str, str]) -> None:
    """Import the program's main module under the name `__mp_main__`, as multiprocessing does; once."""
    if "__mp_main__" not in sys.modules:
        from multiprocessing.spawn import prepare

        prepare(main)


def sendable(error: BaseException) -> BaseException:
    """Return the error with its traceback as a note; one that cannot be pickled becomes a RuntimeError."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception as reason:  # noqa: BLE001 - an error of a user's class may refuse in any way
        error = RuntimeError(f"{type(error).__name__}: {error} (it cannot be pickled: {reason})")
    error.__traceback__ = None
    error.add_note(f"in a worker process:\n{trace}")
    return error


def pickled(value: Any) -> tuple[bytes, list[memoryview]]:
    """Return a pickle of `value` and its large arrays apart from it. Raises what pickle raises."""
    arrays: list[memoryview] = []
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL, buffer_callback=aside(arrays)), arrays


def placed(data: bytes, arrays: list[memoryview], outbox: Outbox) -> tuple[bytes | None, list[Piece]]:
    """Return (data, pieces) as a frame carries them. Raises OSError when the arrays are too large."""
    if len(data) <= IN_BAND:
        return data, outbox.put(arrays) if arrays else []
    return None, outbox.put([memoryview(data), *arrays])


def aside(arrays: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
    """Return a callback that puts large contiguous buffers into `arrays` and leaves the others in the pickle."""

    def callback(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < ARRAY:
            return True
        arrays.append(raw)
        return False

    return callback


def unpacked(data: bytes | None, pieces: list[Piece], inbox: Inbox) -> Any:
    """Return the value of (data, pieces); its arrays lie in the arena, writable, and belong to whoever has them."""
    if not pieces:
        return pickle.loads(data or b"")  # noqa: S301 - the other end is this program
    spans = inbox.look(pieces)
    return pickle.loads(spans.pop(0) if data is None else data, buffers=spans)  # noqa: S301


def framed(*parts: Any) -> bytes:
    """Return a frame."""
    body = marshal.dumps(parts)
    return LENGTH.pack(len(body)) + body


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT
