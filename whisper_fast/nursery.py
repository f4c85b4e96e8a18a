"""Where worker processes come from: one fresh interpreter that forks them.

A worker of its own interpreter would cost that one's start and the import of the program each time; a fork of the
running program would copy its locks and threads in whatever state they are. The nursery is started once, imports next
to nothing and then does nothing but fork, so a worker that died has a successor within milliseconds. It does not
import the program's main module before a call asks for something that is defined there: a program that starts an
engine without asking whether it is the main module must not be run a second time by it.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

from .worker import RUNNING

__all__ = ["Nursery"]

NURSE = "import sys; sys.path[:] = eval(sys.argv[2]); from whisper_fast.worker import begin; begin(int(sys.argv[1]))"


class Nursery:
    """The process that forks workers; started at the first birth, and again if it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._one_at_a_time = asyncio.Lock()

    async def bear(self, link: int, calls: int, answers: int) -> int:
        """Return the process id of a new worker that holds these three descriptors. Raises OSError."""
        async with self._one_at_a_time:
            if self._process is None or self._process.poll() is not None:
                await asyncio.to_thread(self._start)
            return await asyncio.to_thread(self._ask, [link, calls, answers])

    async def close(self) -> None:
        """End the process; the workers that still run go with it."""
        async with self._one_at_a_time:
            await asyncio.to_thread(self._end)

    def _start(self) -> None:
        self._end()
        ours, theirs = socket.socketpair()
        self._control = ours
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-I", "-c", NURSE, str(number), repr(sys.path)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[number])  # noqa: S603 - ours

    def _ask(self, files: list[int]) -> int:
        assert self._control is not None  # noqa: S101 - bear() has started it
        socket.send_fds(self._control, [b"+"], files)
        answer = self._control.recv(RUNNING.size, socket.MSG_WAITALL)
        if len(answer) < RUNNING.size:
            raise ChildProcessError("the nursery died before it had forked a worker")
        return int(RUNNING.unpack(answer)[0])

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.wait()
        self._control = self._process = None
