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
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.math cimport INFINITY, ceil, isfinite, isnan
from libc.string cimport memcpy

from monotonic cimport wf_monotonic

from bisect import insort
from contextlib import suppress

__all__ = ["Assembly", "Entry", "Group", "deliver", "still_wanted"]

cdef enum:
    PATIENCE = 16  # batches that may pass an item by
    HEAVIEST = 16  # batches that one item may be charged


@cython.final
cdef class Group:
    """The results of `size` items, in order, and the future that gets None when the last of them is there.

    `failed` is the first index, by place, that holds an error instead of a result; -1 when there is none. With
    `packing` rows of float32 matrices are copied side by side into `packed`, [size, width], and `results` holds None
    in their places; `rows` says how many came so.
    """

    cdef readonly object future
    cdef readonly list results
    cdef readonly Py_ssize_t left, failed, rows
    cdef readonly bytearray packed
    cdef bint packing
    cdef Py_ssize_t size, width

    def __cinit__(self, Py_ssize_t size, future, bint packing=False):
        self.future, self.results = future, [None] * size
        self.left, self.failed, self.size, self.packing = size, -1, size, packing

    @cython.boundscheck(True)  # the list can be reached from outside
    cdef int put(self, Py_ssize_t index, object value, bint failed) except -1:
        self.results[index] = value
        if failed and (self.failed < 0 or index < self.failed):
            self.failed = index
        return self.came()

    cdef bint pack(self, Py_ssize_t index, const float *row, Py_ssize_t width) except -1:
        """Copy a row to its place; return whether there is one for it."""
        if self.packed is None:
            self.packed, self.width = bytearray(self.size * width * sizeof(float)), width
        if width != self.width or len(self.packed) != self.size * width * <Py_ssize_t>sizeof(float):
            return False
        memcpy(<float *>PyByteArray_AS_STRING(self.packed) + index * width, row, width * sizeof(float))
        self.rows += 1
        self.came()
        return True

    cdef int came(self) except -1:
        self.left -= 1
        if not self.left and not self.future.done():
            self.future.set_result(None)
        return 0


@cython.final
@cython.freelist(256)
cdef class Entry:
    """One item and who waits for its result: a future, or a place in a group. Only its first answer counts.

    A run stands for all of a group that still wait, the next one at `index`, and makes their entries as they are
    handed in: ten thousand come in as fast as one. Raises IndexError for a place that the group does not have.
    """

    cdef readonly object item
    cdef object future
    cdef Group group
    cdef Py_ssize_t index
    cdef list run  # all items of the group
    cdef bint answered
    cdef Assembly home  # where it waits; None once it has been taken out
    cdef _Flow flow
    cdef double deadline, cost, at
    cdef long long number, seen  # order of arrival; batches that had gone when it came
    cdef long units
    cdef Py_ssize_t place  # in its flow's heap
    cdef Entry sooner, later  # in order of arrival

    def __cinit__(self, item, to=None, Py_ssize_t index=0):
        give(self, item, to, index)

    def answer(self, value):
        """Hand over the result."""
        settle(self, value, False)

    def fail(self, BaseException error not None):
        """Hand over the error itself; a caller that tells several makes a copy for each."""
        settle(self, error, True)


cdef int give(Entry entry, object item, object to, Py_ssize_t index) except -1:
    entry.item = item
    if isinstance(to, Group):
        entry.group, entry.index = to, index
        entry.future = entry.group.future
        if not 0 <= index < len(entry.group.results):
            raise IndexError(f"place {index} of a group of {len(entry.group.results)}")
    else:
        entry.future = to
    return 0


cdef int settle(Entry entry, object value, bint failed) except -1:
    if entry.answered:
        return 0
    entry.answered = True
    if entry.group is not None:
        return entry.group.put(entry.index, value, failed)
    if entry.future is None or entry.future.done():
        return 0
    if failed:
        entry.future.set_exception(value)
        entry.future.exception()  # seen, even if its task is being cancelled at this moment
    else:
        entry.future.set_result(value)
    return 0


def still_wanted(list entries not None):
    """Return the entries whose future is not done, and their items."""
    cdef list wanted = [], items = []
    cdef Entry entry
    for entry in entries:
        if entry.future is None or not entry.future.done():
            wanted.append(entry)
            items.append(entry.item)
    return wanted, items


def deliver(list entries not None, results):
    """Hand each entry its result; return (entry, error) of those whose result is an exception, which get nothing.

    Raises ValueError, before anyone has had anything, unless there is one result an entry.
    """
    cdef list waiting = entries.copy(), errors = []
    cdef const float[:, ::1] matrix = matrix_of(results, waiting)
    cdef list values = list(results) if matrix is None else None
    cdef Py_ssize_t i, found = len(values) if matrix is None else matrix.shape[0]
    cdef Entry entry
    if found != len(waiting):
        raise ValueError(f"{found} results for {len(waiting)} entries")
    for i in range(found):
        entry = <Entry?>waiting[i]
        if matrix is not None and packs(entry) and entry.group.pack(entry.index, &matrix[i, 0], matrix.shape[1]):
            entry.answered = True
            continue
        value = results[i] if values is None else values[i]
        if isinstance(value, Exception):
            errors.append((entry, value))
        else:
            settle(entry, value, False)
    return errors


cdef inline bint packs(Entry entry) noexcept:
    return entry.group is not None and entry.group.packing and not entry.answered


cdef const float[:, ::1] matrix_of(object results, list entries):
    """The results as rows, if somebody wants them so and they are some."""
    cdef const float[:, ::1] rows = None
    for entry in entries:
        if packs(<Entry?>entry):
            with suppress(BufferError, TypeError, ValueError):
                rows = results
            break
    return None if rows is None or not rows.shape[1] else rows


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


cdef inline bint precedes(Entry a, Entry b) noexcept:
    return a.deadline < b.deadline or (a.deadline == b.deadline and a.number < b.number)


cdef void place(list heap, Entry entry, Py_ssize_t at) noexcept:
    heap[at] = entry
    entry.place = at


cdef void sift_up(list heap, Entry entry, Py_ssize_t at) noexcept:
    cdef Entry parent
    while at > 0:
        parent = <Entry>heap[(at - 1) >> 1]
        if not precedes(entry, parent):
            break
        place(heap, parent, at)
        at = (at - 1) >> 1
    place(heap, entry, at)


cdef void sift_down(list heap, Entry entry, Py_ssize_t at) noexcept:
    cdef Py_ssize_t size = len(heap), child
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and precedes(<Entry>heap[child + 1], <Entry>heap[child]):
            child += 1
        if not precedes(<Entry>heap[child], entry):
            break
        place(heap, <Entry>heap[child], at)
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
    cdef dict levels  # priority -> _Level
    cdef list priorities  # sorted
    cdef Py_ssize_t waiting
    cdef Entry first, last  # in order of arrival
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
        self.levels, self.priorities = {}, []

    def __len__(self):
        return self.waiting

    @property
    def oldest(self):
        """When the item that waits longest came, on the monotonic clock; None when nothing waits."""
        return None if self.first is None else self.first.at

    def append(
        self, item, to=None, user=None, long priority=0, double deadline=INFINITY, double cost=1.0, Py_ssize_t index=0
    ):
        """Let `item` wait and return its entry; `to` is a future, or the group in which `index` is its place.

        Raises ValueError for a cost that is negative, NaN or infinite, and for a deadline that is NaN.
        """
        cdef Entry entry
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"cost is {cost!r}; it must be a finite number of at least 0")
        if isnan(deadline):
            raise ValueError("deadline is nan; it must be a point in time")
        entry = Entry.__new__(Entry, item, to, index)
        entry.deadline, entry.cost, entry.at = deadline, cost, self._now()
        entry.units = self._units(cost)
        self._join(entry, self._flow(user, priority))
        return entry

    def append_many(
        self, list items not None, Group group not None, user=None, long priority=0, double deadline=INFINITY
    ):
        """Let the items of one user wait, at a cost of 1 each; return the run of them, None if there are none."""
        cdef Entry entry
        if isnan(deadline):
            raise ValueError("deadline is nan; it must be a point in time")
        if len(items) != len(group.results):
            raise ValueError(f"{len(items)} items for a group of {len(group.results)}")
        if not items:
            return None
        entry = Entry.__new__(Entry, None, group)
        entry.run = items.copy()
        entry.deadline, entry.cost, entry.at, entry.units = deadline, 1.0, self._now(), self._units(1.0)
        self._join(entry, self._flow(user, priority))
        self.waiting += len(entry.run) - 1
        return entry

    def remove(self, Entry entry not None):
        """Take `entry` out, a run with all that is left of it; return whether it was waiting here."""
        if entry.home is not self:
            return False
        if entry.run is not None:
            self.waiting -= len(entry.run) - entry.index - 1
        self._part(entry)
        return True

    def fill(self):
        """Take out the next batch and return its entries; an empty list when nothing waits."""
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
        return wf_monotonic() if self.clock is None else self.clock()

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

    cdef int _join(self, Entry entry, _Flow flow) except -1:
        if not flow.heap:
            enter_ring(flow)
        entry.flow, entry.home = flow, self
        entry.seen, entry.number = self.fills, self.arrivals
        self.arrivals += 1
        self.waiting += 1
        flow.heap.append(entry)
        sift_up(flow.heap, entry, len(flow.heap) - 1)
        entry.sooner = self.last
        if self.last is None:
            self.first = entry
        else:
            self.last.later = entry
        self.last = entry
        return 0

    cdef int _part(self, Entry entry) except -1:
        """Take the entry out of everything."""
        cdef _Flow flow = entry.flow
        cdef Entry moved = <Entry>flow.heap.pop()
        if moved is not entry:
            if entry.place > 0 and precedes(moved, <Entry>flow.heap[(entry.place - 1) >> 1]):
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
        entry.sooner = entry.later = None
        entry.flow = entry.home = None
        self.waiting -= 1
        if not flow.heap:
            leave_ring(flow)
            del flow.level.users[flow.user]
            if not flow.level.users:
                del self.levels[flow.level.priority]
                self.priorities.remove(flow.level.priority)
        return 0

    cdef int _hand_in(self, Entry entry, list batch) except -1:
        self.budget -= entry.cost
        if entry.run is None:
            self._part(entry)
            batch.append(entry)
            return 0
        batch.append(Entry.__new__(Entry, entry.run[entry.index], entry.group, entry.index))
        if entry.index + 1 < len(entry.run):
            entry.index += 1
            self.waiting -= 1
        else:
            self._part(entry)
        return 0

    cdef bint _fits(self, Entry entry, list batch):
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
            if not self._fits(<Entry>flow.heap[0], batch):
                return False
            if not level.granted:
                flow.credit += 1
                level.granted = True
            idle += 1
            while flow.heap and (<Entry>flow.heap[0]).units <= flow.credit:
                if not self._fits(<Entry>flow.heap[0], batch):
                    return False
                flow.credit -= (<Entry>flow.heap[0]).units
                self._hand_in(<Entry>flow.heap[0], batch)
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
    cdef long missing, rounds = (<Entry>flow.heap[0]).units - flow.credit
    for _ in range(level.flows):
        missing = (<Entry>flow.heap[0]).units - flow.credit
        rounds = min(rounds, missing)
        flow = flow.after
    for _ in range(level.flows):
        flow.credit += rounds - 1
        flow = flow.after
