"""Who is next, when many users want what only a few can have at once.

    level   all that has one priority, from -100 to 100; the smallest is served first
    flow    what one user has waiting in one level, in order of arrival
    clock   of a level: the start tag of what it served last

Inside a level goes start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) over the tokens that a user was served,
which is the virtual token counter of Sheng et al. (OSDI 2024) with requests as its unit of service. Each flow has a
counter; the flow with the smallest counter is served, and of equal ones the one that has waited for its turn longer:

    a user comes or comes back    counter = max(counter, clock): who was idle has saved nothing
    its first item is served      clock = counter, then counter += cost / weight
    the true cost is known        counter = max(clock, counter + difference / weight)

Between two users who wait all the while, service / weight differs by at most one largest item of each (before
corrections). A flow is remembered while it waits or its counter is above the clock, and costs nothing after that; of
those who do not wait a level remembers the 65,536 that owe most.

No level starves: one that was passed by 16 times is the next, whatever its priority, so it gets every 17th turn.

Heaps, lists and flows are plain C memory (src/fair.c), users are keys of a dict of exact strings, so that no code of
a caller runs inside; what is let go is let go after the structure is whole again.
"""

cimport cython
from cpython.long cimport PyLong_AsLongAndOverflow
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport isfinite
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from _gc cimport PyTypeObject, inquiry, traverseproc, visitproc
from fair cimport (
    WF_LEVELS,
    WF_NOBODY,
    wf_fair,
    wf_fair_append,
    wf_fair_begin,
    wf_fair_charge,
    wf_fair_close,
    wf_fair_end,
    wf_fair_forgettable,
    wf_fair_next,
    wf_fair_open,
    wf_fair_remove,
    wf_fair_reserve,
    wf_fair_serve,
)

__all__ = ["FairQueue"]

cdef extern from "Python.h":
    object PyUnicode_FromObject(object text)

cdef enum:
    MIDDLE = 100  # the level of priority 0

cdef double DEAREST = 1e9
cdef double HEAVIEST = 1e3


cdef object exact(object user):
    """Return the user as None or an exact str, whose comparison runs no code of a caller."""
    if user is None or type(user) is str:
        return user
    if isinstance(user, str):
        return PyUnicode_FromObject(user)
    raise TypeError(f"user is {type(user).__name__}; it must be str or None")


cdef int32_t level_of(object priority) except -1:
    cdef int overflow = 0
    cdef long value = PyLong_AsLongAndOverflow(priority, &overflow)
    if overflow:
        return WF_LEVELS - 1 if overflow > 0 else 0
    return <int32_t>(max(-MIDDLE, min(value, MIDDLE)) + MIDDLE)


cdef double charge_of(double cost, double weight) except? -1:
    if not -DEAREST <= cost <= DEAREST:
        raise ValueError(f"cost is {cost!r}; it must be from 0 to {DEAREST:g}")
    if not 1 / HEAVIEST <= weight <= HEAVIEST:
        raise ValueError(f"weight is {weight!r}; it must be from {1 / HEAVIEST:g} to {HEAVIEST:g}")
    return cost / weight


@cython.final
cdef class FairQueue:
    """Items that wait for their turn; see the module for the order. None as a user stands for all without a name."""

    cdef wf_fair queue
    cdef list users  # by level: user -> flow
    cdef readonly double finish  # the counter at which the last `pop` or `pass_by` left its user

    def __cinit__(self):
        wf_fair_begin(&self.queue)
        self.users = [None] * WF_LEVELS

    def __dealloc__(self):
        cdef int32_t entry
        for entry in range(self.queue.entry_capacity):
            if self.queue.entries[entry].item != NULL:
                Py_DECREF(<object>self.queue.entries[entry].item)
        wf_fair_end(&self.queue)

    def __len__(self):
        return self.queue.count

    @property
    def remembered(self):
        """How many users have state here: those who wait, and those whose counter is above the clock."""
        return self.queue.flow_count

    @property
    def oldest(self):
        """The item that waits longest, None when nothing waits."""
        return None if self.queue.oldest == WF_NOBODY else <object>self.queue.entries[self.queue.oldest].item

    def waiting(self):
        """Return how many items wait, by priority."""
        cdef int32_t at, level
        cdef dict found = {}
        for at in range(self.queue.busy_count):
            level = self.queue.busy[at]
            found[level - MIDDLE] = self.queue.levels[level].count
        return found

    def push(self, item, user, *, double cost=1.0, double weight=1.0, priority=0):
        """Let `item` wait and return its handle, a positive int.

        A priority beyond -100 or 100 counts as that. Raises ValueError for a cost that is not from 0 to 1e9 or a
        weight that is not from 1e-3 to 1e3, TypeError for a user that is neither str nor None.
        """
        cdef double charge = charge_of(cost, weight)
        cdef int32_t flow, entry
        if cost < 0:
            raise ValueError(f"cost is {cost!r}; it must not be negative")
        flow = self._flow(exact(user), level_of(priority))
        Py_INCREF(item)
        entry = wf_fair_append(&self.queue, flow, <void *>item, charge)
        return <uint64_t>self.queue.entries[entry].generation << 32 | <uint64_t>(entry + 1)

    def pop(self):
        """Return the item whose turn it is; raises IndexError when nothing waits."""
        cdef int32_t entry = wf_fair_next(&self.queue), flow
        if entry == WF_NOBODY:
            raise IndexError("nothing waits")
        flow = self.queue.entries[entry].flow
        wf_fair_serve(&self.queue, flow, self.queue.entries[entry].charge)
        self.finish = self.queue.flows[flow].counter
        return self._taken(entry)

    def pass_by(self, user, *, double cost=1.0, double weight=1.0, priority=0):
        """Count an item that was served at once, as if it had been pushed and popped; return `finish`.

        Raises what `push` raises, and ValueError when items of that priority wait: it would overtake them.
        """
        cdef double charge = charge_of(cost, weight)
        cdef int32_t level = level_of(priority), flow
        if cost < 0:
            raise ValueError(f"cost is {cost!r}; it must not be negative")
        if self.queue.levels[level] != NULL and self.queue.levels[level].count:
            raise ValueError(f"{self.queue.levels[level].count} items wait for their turn")
        flow = self._flow(exact(user), level)
        wf_fair_serve(&self.queue, flow, charge)
        self.finish = self.queue.flows[flow].counter
        self._forget(level)
        return self.finish

    def remove(self, handle):
        """Take out an item that leaves before its turn; return it, None when the handle's item has gone."""
        cdef uint64_t number = handle
        cdef int64_t place = <int64_t>(number & 0xFFFFFFFF) - 1
        if not 0 <= place < self.queue.entry_capacity:
            return None
        if self.queue.entries[place].item == NULL or self.queue.entries[place].generation != <uint32_t>(number >> 32):
            return None
        return self._taken(<int32_t>place)

    def charge(self, user, double cost, *, double weight=1.0, priority=0, since=None):
        """Correct what `user` was charged by `cost`, which may be negative, once the truth is known.

        `since` is the `finish` of the item in question; with it the correction is exact for a user that has been
        forgotten in between, without it such a user starts from the clock. Raises what `push` raises.
        """
        cdef double amount = charge_of(cost, weight), counter, clock
        cdef int32_t level = level_of(priority)
        user = exact(user)
        cdef dict users = self._room(level)
        clock = self.queue.levels[level].clock
        flow = users.get(user)
        if flow is not None:
            wf_fair_charge(&self.queue, flow, amount)
        else:
            counter = clock if since is None else <double>since
            if not isfinite(counter):
                raise ValueError(f"since is {since!r}; it must be the finish of an item")
            if counter + amount > clock:
                self._open(user, level, counter + amount)
        self._forget(level)

    def clear(self):
        """Forget everything; return the items that waited, in order of arrival."""
        cdef list left = [None] * self.queue.count  # made first: making a list may run a finaliser
        cdef int32_t entry = self.queue.oldest
        cdef Py_ssize_t at
        cdef wf_fair gone = self.queue
        if <Py_ssize_t>gone.count != len(left):
            return self.clear()
        wf_fair_begin(&self.queue)
        for at in range(WF_LEVELS):
            self.users[at] = None
        at = 0
        while entry != WF_NOBODY:
            left[at] = <object>gone.entries[entry].item
            Py_DECREF(<object>gone.entries[entry].item)
            entry = gone.entries[entry].later
            at += 1
        wf_fair_end(&gone)
        return left

    cdef dict _room(self, int32_t level):
        """Return the flows of `level`, with room for one more flow and item."""
        cdef dict users
        if self.users[level] is None:
            users = {}  # which may run a finaliser that comes here too
            if self.users[level] is None:
                self.users[level] = users
        if wf_fair_reserve(&self.queue, level):
            raise MemoryError
        return self.users[level]

    cdef int32_t _flow(self, object user, int32_t level) except -1:
        flow = self._room(level).get(user)
        return flow if flow is not None else self._open(user, level, self.queue.levels[level].clock)

    cdef int32_t _open(self, object user, int32_t level, double counter) except -1:
        cdef int32_t flow = wf_fair_open(&self.queue, <void *>user, level, counter)
        try:
            self.users[level][user] = flow
        except BaseException:
            wf_fair_close(&self.queue, flow)
            raise
        return flow

    cdef int _forget(self, int32_t level) except -1:
        """Drop the flows that would start at the clock anyway."""
        cdef int32_t flow = wf_fair_forgettable(&self.queue, level)
        cdef dict users = self.users[level]
        while flow != WF_NOBODY:
            user = <object>self.queue.flows[flow].user
            wf_fair_close(&self.queue, flow)
            del users[user]
            flow = wf_fair_forgettable(&self.queue, level)
        return 0

    cdef object _taken(self, int32_t entry):
        cdef object item = <object>self.queue.entries[entry].item
        cdef int32_t level = self.queue.flows[self.queue.entries[entry].flow].level
        wf_fair_remove(&self.queue, entry)
        Py_DECREF(item)
        self._forget(level)
        return item


# Items are kept in plain C memory, where the garbage collector would not find a circle through them.
cdef traverseproc traverse_attributes = (<PyTypeObject *>FairQueue).tp_traverse
cdef inquiry clear_attributes = (<PyTypeObject *>FairQueue).tp_clear


cdef int traverse(PyObject *cell, visitproc visit, void *arg) noexcept:
    cdef wf_fair *queue = &(<FairQueue>cell).queue
    cdef int32_t entry
    cdef int found = traverse_attributes(cell, visit, arg)
    for entry in range(queue.entry_capacity):
        if found:
            break
        if queue.entries[entry].item != NULL:
            found = visit(<PyObject *>queue.entries[entry].item, arg)
    return found


cdef int clear(PyObject *cell) noexcept:
    (<FairQueue>cell).clear()
    return 0


(<PyTypeObject *>FairQueue).tp_traverse = traverse
(<PyTypeObject *>FairQueue).tp_clear = clear
