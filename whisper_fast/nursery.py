"""Where worker processes come from: one spawned process that forks them.

A spawned worker would cost an interpreter's start and the import of the program each time; a fork of the running
program would copy its locks and threads in whatever state they are. The nursery is spawned once, imports the main
module of the program and then does nothing but fork, so a worker that died has a successor within milliseconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from typing import TYPE_CHECKING

from .worker import RUNNING, nurse

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["Nursery"]


class Nursery:
    """The process that forks workers; started at the first birth, and again if it was killed."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._control: socket.socket | None = None
        self._one_at_a_time = asyncio.Lock()

    async def bear(self, link: int, calls: int, answers: int) -> int:
        """Return the process id of a new worker that holds these three descriptors. Raises OSError."""
        async with self._one_at_a_time:
            if self._process is None or not self._process.is_alive():
                await asyncio.to_thread(self._start)
            return await asyncio.to_thread(self._ask, [link, calls, answers])

    async def close(self) -> None:
        """End the process; the workers that still run go with it."""
        async with self._one_at_a_time:
            await asyncio.to_thread(self._end)

    def _start(self) -> None:
        self._end()
        ours, theirs = socket.socketpair()
        spawn = multiprocessing.get_context("spawn")
        self._control = ours
        self._process = spawn.Process(target=nurse, args=(theirs,), name="whisper-fast-nursery", daemon=True)
        try:
            self._process.start()
        finally:
            theirs.close()

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
            self._process.join()
            self._process.close()
        self._control = self._process = None
