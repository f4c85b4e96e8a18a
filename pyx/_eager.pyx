"""Run a coroutine's first step at once; make a task of it only if it suspends.

A coroutine that never suspends (a cache hit, an inline function) then costs neither a task nor a turn of the event
loop. asyncio knows this since 3.12 as the eager task, at the price of a task per call; here one task is kept in
reserve and serves as the *current* task of every first step. It is used up only when a step suspends: then it
carries that coroutine to its end. So the coroutine sees one and the same task from its first line to its last, as
`asyncio.timeout`, `TaskGroup` and anyio's scopes demand, and it has a context of its own.
"""

cimport cython
from cpython.object cimport PyObject

import asyncio
from collections.abc import Coroutine

__all__ = ["Eager"]

cdef extern from "Python.h":
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(object iterator, object value, PyObject **result) except PYGEN_ERROR

cdef extern from *:
    """
    static PyObject *owned(PyObject *object) { return object; }
    """
    object owned(PyObject *object)  # takes over the reference that PyIter_Send gives

cdef object current_task = asyncio.current_task
cdef object enter_task = asyncio._enter_task
cdef object leave_task = asyncio._leave_task
cdef object running_loop = asyncio.get_running_loop


@cython.final
cdef class _Carrier:
    """What the task in reserve runs: nothing at first, then the coroutine that it was given."""

    cdef object coroutine, context, yielded, idle, loop
    cdef bint handed  # whether `yielded` has been handed to the task
    cdef readonly object task

    def __init__(self, loop):
        self.loop = loop
        self.task = loop.create_task(self, name="eager-reserve")

    cdef object carry(self, object coroutine, object context, object yielded, str name):
        """Go on with `coroutine`, which has just yielded `yielded` in its first step."""
        self.coroutine, self.context, self.yielded = coroutine, context, yielded
        self.task.set_name(name)
        if self.idle is not None and not self.idle.done():
            self.idle.set_result(None)
        return self.task

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        if self.coroutine is None:
            self.idle = self.loop.create_future()
            self.idle._asyncio_future_blocking = True  # what `await` sets on the future that it yields
            return self.idle
        if not self.handed:
            self.handed = True
            yielded, self.yielded = self.yielded, None
            return yielded
        PyContext_Enter(self.context)
        try:
            return self.coroutine.send(value)
        finally:
            PyContext_Exit(self.context)

    def throw(self, kind, value=None, trace=None):
        if self.coroutine is None:
            raise kind if value is None else value
        if not self.handed:  # cancelled before the task waited for it by itself
            self.handed = True
            if self.yielded is not None:
                self.yielded.cancel()
            self.yielded = None
        PyContext_Enter(self.context)
        try:
            return self.coroutine.throw(kind if value is None else value)
        finally:
            PyContext_Exit(self.context)

    def close(self):
        if self.coroutine is not None:
            self.coroutine.close()

    def __await__(self):
        raise TypeError("a carrier is run by its task, it cannot be awaited")


Coroutine.register(_Carrier)


@cython.final
cdef class Eager:
    """Starts coroutines eagerly on the running loop; owns the one task in reserve, until `close()`."""

    cdef _Carrier reserve

    def start(self, coroutine, str name, /):
        """Run `coroutine` up to its first suspension.

        Returns (its result, None) if it finished, else (None, the task called `name` that goes on with it).
        Raises what the coroutine raises in that first step.
        """
        cdef PyObject *result = NULL
        cdef PySendResult outcome
        cdef _Carrier carrier = self.reserve
        if carrier is None or carrier.task.done() or carrier.task.cancelling():
            carrier = self.reserve = _Carrier(running_loop())
        loop, task = carrier.loop, carrier.task
        caller = current_task(loop)
        context = PyContext_CopyCurrent()
        if caller is not None:
            leave_task(loop, caller)
        enter_task(loop, task)
        PyContext_Enter(context)
        try:
            outcome = PyIter_Send(coroutine, None, &result)
            value = None if result == NULL else owned(result)
        finally:
            PyContext_Exit(context)
            leave_task(loop, task)
            if caller is not None:
                enter_task(loop, caller)
        if outcome == PYGEN_RETURN:
            return value, None
        self.reserve = None
        return None, carrier.carry(coroutine, context, value, name)

    async def close(self):
        """End the task in reserve."""
        carrier, self.reserve = self.reserve, None
        if carrier is not None:
            carrier.task.cancel()
            await asyncio.wait([carrier.task])
