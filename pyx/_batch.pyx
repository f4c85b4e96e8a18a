"""What waits for a batch, and which of it goes next.

    level    all that has one priority; the level with the smallest number is served first
    flow     what one user has waiting in one level: a binary heap by deadline, then order of arrival
    arrival  one doubly linked list through everything that waits, oldest first

Between the flows of a level goes deficit round robin (Shreedhar and Varghese, SIGCOMM 1995). An item is charged its
share of a batch in units of 1 / max_batch:

    units = max(1, ceil(max_batch * cost / max_cost)), at most 16 max_batch

A flow's turn gives it one unit of credit; it hands in items while its credit lasts, and the turn passes on. Where a
whole round serves nobody, the missing rounds are added at once instead of being walked. A batch ends when it holds
max_batch items, or when the next item would break the cost budget: that item then begins the next batch. An item
above the budget makes a batch of its own.

Nothing starves: whatever has seen 16 batches go by is the first of the next one, one such item a batch, oldest first.
"""

cimport cython
from cpython.long cimport PyLong_FromVoidPtr
from libc.math cimport INFINITY, ceil, isfinite, isnan
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from bisect import insort

__all__ = ["Assembly"]

cdef enum:
    PATIENCE = 16  # batches that may pass an item by
    HEAVIEST = 16  # batches that one item may be charged


cdef inline object name_of(object item):
    return PyLong_FromVoidPtr(<void *>item)


cdef double monotonic() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <double>now.tv_sec + 1e-9 * <double>now.tv_nsec


@cython.final
@cython.freelist(256)
cdef class _Entry:
    cdef object item
    cdef _Flow flow
    cdef double deadline, cost, at
    cdef long long number, seen  # order of arrival; batches that had gone when it came
    cdef long units
    cdef Py_ssize_t place  # in its flow's heap
    cdef _Entry sooner, later  # in order of arrival


@cython.final
cdef class _Flow:
    cdef object user
    cdef _Level level
    cdef list heap
    cdef long credit
    cdef _Flow before, after  # the ring of its level


@cython.final
cdef class _Level:
    cdef long priority
    cdef dict users  # user -> _Flow
    cdef _Flow turn
    cdef bint granted  # whether `turn` has had its credit already
    cdef Py_ssize_t flows


cdef inline bint precedes(_Entry a, _Entry b) noexcept:
    return a.deadline < b.deadline or (a.deadline == b.deadline and a.number < b.number)


cdef void place(list heap, _Entry entry, Py_ssize_t at) noexcept:
    heap[at] = entry
    entry.place = at


cdef void sift_up(list heap, _Entry entry, Py_ssize_t at) noexcept:
    cdef _Entry parent
    while at > 0:
        parent = <_Entry>heap[(at - 1) >> 1]
        if not precedes(entry, parent):
            break
        place(heap, parent, at)
        at = (at - 1) >> 1
    place(heap, entry, at)


cdef void sift_down(list heap, _Entry entry, Py_ssize_t at) noexcept:
    cdef Py_ssize_t size = len(heap), child
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and precedes(<_Entry>heap[child + 1], <_Entry>heap[child]):
            child += 1
        if not precedes(<_Entry>heap[child], entry):
            break
        place(heap, <_Entry>heap[child], at)
        at = child
    place(heap, entry, at)


@cython.final
cdef class Assembly:
    """Items that wait for a batch of at most `max_batch` items and `max_cost` of cost.

    Raises ValueError for limits that no batch could keep. `released_by` says what ended the last batch: "full",
    "cost", or "empty" when nothing more was waiting. `clock()` gives seconds in the place of the monotonic clock.
    """

    cdef readonly Py_ssize_t max_batch
    cdef readonly double max_cost
    cdef readonly str released_by
    cdef dict entries  # address of the item -> _Entry
    cdef dict levels  # priority -> _Level
    cdef list priorities  # sorted
    cdef _Entry first, last  # in order of arrival
    cdef long long arrivals, fills
    cdef object clock
    cdef double budget  # what the batch being filled may still cost

    def __cinit__(self, max_batch, max_cost=INFINITY, clock=None):
        self.max_batch = max_batch
        self.max_cost = max_cost
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {max_batch!r}; a batch holds at least 1 item")
        if not self.max_cost > 0:
            raise ValueError(f"max_cost is {max_cost!r}; it must be above 0")
        self.released_by, self.clock = "empty", clock
        self.entries, self.levels, self.priorities = {}, {}, []

    def __len__(self):
        return len(self.entries)

    @property
    def oldest(self):
        """When the item that waits longest came, on the monotonic clock; None when nothing waits."""
        return None if self.first is None else self.first.at

    def append(self, item, user=None, long priority=0, double deadline=INFINITY, double cost=1.0):
        """Let `item` wait; an object can wait only once.

        Raises ValueError for a cost that is negative, NaN or infinite, and for a deadline that is NaN.
        """
        cdef _Entry entry
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"cost is {cost!r}; it must be a finite number of at least 0")
        if isnan(deadline):
            raise ValueError("deadline is nan; it must be a point in time")
        if name_of(item) in self.entries:
            raise ValueError("this item is waiting already")
        entry = _Entry.__new__(_Entry)
        entry.item, entry.deadline, entry.cost, entry.at = item, deadline, cost, self._now()
        entry.units = self._units(cost)
        entry.seen = self.fills
        entry.number = self.arrivals
        self.arrivals += 1
        self._join(entry, self._flow(user, priority))

    def remove(self, item):
        """Take `item` out; return whether it was waiting."""
        cdef _Entry entry = self.entries.get(name_of(item))
        if entry is None:
            return False
        self._part(entry)
        return True

    def fill(self):
        """Take out the next batch and return its items; an empty list when nothing waits."""
        cdef list batch = []
        self.fills += 1
        self.budget = self.max_cost
        self.released_by = "empty"
        if self.first is not None and self.fills - self.first.seen > PATIENCE:
            self.first.flow.credit -= self.first.units
            self._hand_in(self.first, batch)
        for priority in self.priorities.copy():
            if not self._serve(<_Level>self.levels[priority], batch):
                break
        return batch

    cdef double _now(self) except? -1:
        return monotonic() if self.clock is None else self.clock()

    cdef long _units(self, double cost) noexcept:
        cdef double units = ceil(<double>self.max_batch * (cost / self.max_cost))
        return <long>max(1.0, min(units, <double>(HEAVIEST * self.max_batch)))

    cdef _Flow _flow(self, object user, long priority):
        cdef _Level level = self.levels.get(priority)
        cdef _Flow flow
        if level is None:
            level = _Level.__new__(_Level)
            level.priority, level.users = priority, {}
            self.levels[priority] = level
            insort(self.priorities, priority)
        flow = level.users.get(user)
        if flow is None:
            flow = _Flow.__new__(_Flow)
            flow.user, flow.level, flow.heap = user, level, []
            level.users[user] = flow
        return flow

    cdef int _join(self, _Entry entry, _Flow flow) except -1:
        if not flow.heap:
            enter_ring(flow)
        entry.flow = flow
        flow.heap.append(entry)
        sift_up(flow.heap, entry, len(flow.heap) - 1)
        entry.sooner = self.last
        if self.last is None:
            self.first = entry
        else:
            self.last.later = entry
        self.last = entry
        self.entries[name_of(entry.item)] = entry
        return 0

    cdef int _part(self, _Entry entry) except -1:
        """Take the entry out of everything."""
        cdef _Flow flow = entry.flow
        cdef _Entry moved = <_Entry>flow.heap.pop()
        if moved is not entry:
            if entry.place > 0 and precedes(moved, <_Entry>flow.heap[(entry.place - 1) >> 1]):
                sift_up(flow.heap, moved, entry.place)
            else:
                sift_down(flow.heap, moved, entry.place)
        if entry.sooner is None:
            self.first = entry.later
        else:
            entry.sooner.later = entry.later
        if entry.later is None:
            self.last = entry.sooner
        else:
            entry.later.sooner = entry.sooner
        entry.sooner = entry.later = entry.flow = None
        del self.entries[name_of(entry.item)]
        if not flow.heap:
            leave_ring(flow)
            del flow.level.users[flow.user]
            if not flow.level.users:
                del self.levels[flow.level.priority]
                self.priorities.remove(flow.level.priority)
        return 0

    cdef int _hand_in(self, _Entry entry, list batch) except -1:
        self._part(entry)
        self.budget -= entry.cost
        batch.append(entry.item)
        return 0

    cdef bint _fits(self, _Entry entry, list batch):
        """Whether the entry may join the batch; notes what ended it otherwise."""
        if not batch:
            return True
        if len(batch) >= self.max_batch:
            self.released_by = "full"
            return False
        if entry.cost > self.budget:
            self.released_by = "cost"
            return False
        return True

    cdef bint _serve(self, _Level level, list batch) except -1:
        """Fill from one level; return whether it was emptied and the batch is still open."""
        cdef Py_ssize_t idle = 0  # turns since the last item
        cdef _Flow flow
        while level.turn is not None:
            flow = level.turn
            if not self._fits(<_Entry>flow.heap[0], batch):
                return False
            if not level.granted:
                flow.credit += 1
                level.granted = True
            idle += 1
            while flow.heap and (<_Entry>flow.heap[0]).units <= flow.credit:
                if not self._fits(<_Entry>flow.heap[0], batch):
                    return False
                flow.credit -= (<_Entry>flow.heap[0]).units
                self._hand_in(<_Entry>flow.heap[0], batch)
                idle = 0
            if flow.heap:
                level.turn = flow.after
                level.granted = False
            if idle > level.flows:
                skip_rounds(level)
                idle = 0
        if len(batch) >= self.max_batch:
            self.released_by = "full"
        return True


cdef void enter_ring(_Flow flow) noexcept:
    """The newcomer's turn comes last."""
    cdef _Level level = flow.level
    flow.credit = 0
    level.flows += 1
    if level.turn is None:
        flow.before = flow.after = level.turn = flow
        level.granted = False
        return
    flow.after, flow.before = level.turn, level.turn.before
    flow.before.after = flow.after.before = flow


cdef void leave_ring(_Flow flow) noexcept:
    cdef _Level level = flow.level
    level.flows -= 1
    if level.turn is flow:
        level.turn = None if flow.after is flow else flow.after
        level.granted = False
    flow.before.after, flow.after.before = flow.after, flow.before
    flow.before = flow.after = None


cdef void skip_rounds(_Level level) noexcept:
    """Give every flow the credit of the rounds in which nobody could have handed in anything."""
    cdef _Flow flow = level.turn
    cdef long missing, rounds = (<_Entry>flow.heap[0]).units - flow.credit
    for _ in range(level.flows):
        missing = (<_Entry>flow.heap[0]).units - flow.credit
        rounds = min(rounds, missing)
        flow = flow.after
    for _ in range(level.flows):
        flow.credit += rounds - 1
        flow = flow.after
