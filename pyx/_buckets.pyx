"""What waits for a batch whose items have about the same length, and which of it goes next.

Most models pay a batch as its number of items times the longest: the rest is padding. Here a batch is begun by the
item whose turn it is, and filled with others of its length:

    bucket    lengths between two powers of 1 / (1 - max_padding): together they stay within the bound
    flow      what one user has waiting in one bucket: a heap by deadline, then order of arrival
    account   one user in one level (all that has one priority), and the cost of what was handed in for it

The leader is the first item, by deadline, of the account that was served least in the level with the smallest number.
Then come the levels in their order, in each the leader's bucket and the buckets beside it, the nearest first, in each
bucket the flow whose account was served least, as long as

    items * longest <= max_cost    and    items * longest - sum of lengths <= max_padding * items * longest

A newcomer begins where the least served account stands: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM
1996) with the smallest start tag as its clock. An item above the budget makes a batch of its own.

Nothing starves: of the items that have seen 16 batches go by the oldest leads a batch, but only one batch in 16: in a
flood all are old, and whose user was served least must lead as well.
"""

cimport cython
from libc.math cimport INFINITY, floor, isfinite, isnan, log, log1p

from monotonic cimport wf_monotonic

from bisect import bisect_left, insort

from ._batch import Entry

__all__ = ["Buckets"]

cdef enum:
    PATIENCE = 16  # batches that may pass an item by, and from one that was led for its age to the next

cdef double ROUNDING = 1e-12


cdef class _Ranked:
    """What a heap orders: smaller keys first, then smaller numbers."""

    cdef double key
    cdef long long number
    cdef Py_ssize_t place  # in its heap


@cython.final
cdef class _Node(_Ranked):
    cdef object entry
    cdef double cost, at
    cdef long long seen  # batches that had gone when it came
    cdef _Flow flow
    cdef _Node sooner, later  # in order of arrival


@cython.final
cdef class _Flow(_Ranked):
    cdef _Account account  # whose key and number it has had when it was last looked at
    cdef _Bucket bucket
    cdef list heap


@cython.final
cdef class _Account(_Ranked):
    cdef object user
    cdef _Level level
    cdef dict flows  # bucket's index -> _Flow


@cython.final
cdef class _Bucket:
    cdef double index
    cdef list flows  # heap


@cython.final
cdef class _Level:
    cdef long priority
    cdef dict accounts  # user -> _Account
    cdef list ranking  # heap of accounts
    cdef dict buckets  # index -> _Bucket
    cdef list order  # indexes, sorted


cdef inline bint precedes(_Ranked a, _Ranked b) noexcept:
    return a.key < b.key or (a.key == b.key and a.number < b.number)


cdef inline void put(list heap, _Ranked it, Py_ssize_t at) noexcept:
    heap[at] = it
    it.place = at


cdef void rise(list heap, _Ranked it, Py_ssize_t at) noexcept:
    cdef _Ranked parent
    while at > 0:
        parent = <_Ranked>heap[(at - 1) >> 1]
        if not precedes(it, parent):
            break
        put(heap, parent, at)
        at = (at - 1) >> 1
    put(heap, it, at)


cdef void sink(list heap, _Ranked it, Py_ssize_t at) noexcept:
    cdef Py_ssize_t size = len(heap), child
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and precedes(<_Ranked>heap[child + 1], <_Ranked>heap[child]):
            child += 1
        if not precedes(<_Ranked>heap[child], it):
            break
        put(heap, <_Ranked>heap[child], at)
        at = child
    put(heap, it, at)


cdef int push(list heap, _Ranked it) except -1:
    heap.append(it)
    rise(heap, it, len(heap) - 1)
    return 0


cdef int pull(list heap, _Ranked it) except -1:
    """Take `it` out of the heap, wherever it is."""
    cdef _Ranked moved = <_Ranked>heap.pop()
    if moved is not it:
        if it.place > 0 and precedes(moved, <_Ranked>heap[(it.place - 1) >> 1]):
            rise(heap, moved, it.place)
        else:
            sink(heap, moved, it.place)
    return 0


@cython.final
cdef class Buckets:
    """Items that wait for batches of at most `max_batch` items and `max_cost`, at most `max_padding` of it padding.

    An item's cost is its length. Raises ValueError for limits that no batch could keep, or a `max_padding` outside
    [0, 1). `released_by` says what ended the last batch: "full", "cost", "padding" when what waits has other lengths,
    or "empty"; `padded` is the share of padding in all batches so far, from 0 to 1. `clock()` gives seconds in the
    place of the monotonic clock.
    """

    cdef readonly Py_ssize_t max_batch
    cdef readonly double max_cost, max_padding
    cdef readonly str released_by
    cdef dict nodes  # entry -> _Node
    cdef dict levels  # priority -> _Level
    cdef list priorities  # sorted
    cdef _Node first, last  # in order of arrival
    cdef long long arrivals, fills, turns
    cdef long long aged  # the last batch that an item led which had waited too long
    cdef object clock
    cdef double step  # logarithm of a bucket's width
    cdef Py_ssize_t size  # of the batch being filled
    cdef double longest, total
    cdef double lengths, area  # of all batches: what was handed in, and with its padding

    def __cinit__(self, max_batch, max_cost=INFINITY, max_padding=0.05, clock=None):
        self.max_batch, self.max_cost, self.max_padding = max_batch, max_cost, max_padding
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {max_batch!r}; a batch holds at least 1 item")
        if not self.max_cost > 0:
            raise ValueError(f"max_cost is {max_cost!r}; it must be above 0")
        if not 0 <= self.max_padding < 1:
            raise ValueError(f"max_padding is {max_padding!r}; it must be at least 0 and below 1")
        self.step = -log1p(-self.max_padding)
        self.released_by, self.clock = "empty", clock
        self.nodes, self.levels, self.priorities = {}, {}, []

    def __len__(self):
        return len(self.nodes)

    @property
    def oldest(self):
        """When the item that waits longest came, on the monotonic clock; None when nothing waits."""
        return None if self.first is None else self.first.at

    @property
    def padded(self):
        return 1.0 - self.lengths / self.area if self.area > 0 else 0.0

    def append(
        self, item, to=None, user=None, long priority=0, double deadline=INFINITY, double cost=1.0,
        Py_ssize_t index=0,
    ):
        """Let `item` wait and return its entry; `to` is a future, or the group in which `index` is its place.

        Raises ValueError for a cost that is negative, NaN or infinite, and for a deadline that is NaN.
        """
        cdef _Node node
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"cost is {cost!r}; it must be a finite number of at least 0")
        if isnan(deadline):
            raise ValueError("deadline is nan; it must be a point in time")
        node = _Node.__new__(_Node)
        node.entry, node.cost, node.at = Entry(item, to, index), cost, self._now()
        node.key, node.number = deadline, self.arrivals
        node.flow = self._flow(self._account(user, priority), self._index(cost))
        push(node.flow.heap, node)
        self.nodes[node.entry] = node
        self.arrivals += 1
        self._arrive(node)
        return node.entry

    def remove(self, entry not None):
        """Take `entry` out; return whether it was waiting here."""
        cdef _Node node = self.nodes.get(entry)
        if node is None:
            return False
        self._part(node)
        return True

    def fill(self):
        """Take out the next batch and return its entries; an empty list when nothing waits."""
        cdef list batch = []
        cdef _Level level
        cdef double index
        cdef _Node leader
        self.fills += 1
        leader = self._leader()
        self.size, self.longest, self.total, self.released_by = 0, 0.0, 0.0, "empty"
        if leader is None:
            return batch
        index = leader.flow.bucket.index
        self._hand_in(leader, batch)
        for priority in self.priorities.copy():
            level = self.levels.get(priority)
            if level is not None:
                self._fill_around(level, index, batch)
        self.lengths += self.total
        self.area += self.size * self.longest
        if self.size >= self.max_batch:
            self.released_by = "full"
        elif (self.size + 1) * self.longest > self.max_cost:
            self.released_by = "cost"
        elif self.nodes:
            self.released_by = "padding"
        return batch

    cdef double _now(self) except? -1:
        return wf_monotonic() if self.clock is None else self.clock()

    cdef double _index(self, double cost) noexcept:
        if cost <= 0:
            return -INFINITY
        return floor(log(cost) / self.step) if self.step > 0 else cost

    # ---- what waits

    cdef _Account _account(self, object user, long priority):
        cdef _Level level = self.levels.get(priority)
        cdef _Account account = None if level is None else level.accounts.get(user)
        if account is not None and account.flows:
            return account
        account = _Account.__new__(_Account)
        account.user, account.flows = user, {}
        level = self.levels.get(priority)  # again: a user's __eq__ may have changed it
        if level is None:
            level = _Level.__new__(_Level)
            level.priority, level.accounts, level.ranking = priority, {}, []
            level.buckets, level.order = {}, []
            level.accounts[user] = account
            self.levels[priority] = level
            insort(self.priorities, priority)
        else:
            level.accounts[user] = account
        account.level = level
        account.key = (<_Account>level.ranking[0]).key if level.ranking else 0.0
        self.turns += 1
        account.number = self.turns
        push(level.ranking, account)
        return account

    cdef _Flow _flow(self, _Account account, double index):
        cdef _Level level = account.level
        cdef _Flow flow = account.flows.get(index)
        cdef _Bucket bucket
        if flow is not None:
            return flow
        bucket = level.buckets.get(index)
        if bucket is None:
            bucket = _Bucket.__new__(_Bucket)
            bucket.index, bucket.flows = index, []
            level.buckets[index] = bucket
            insort(level.order, index)
        flow = _Flow.__new__(_Flow)
        flow.account, flow.bucket, flow.heap = account, bucket, []
        flow.key, flow.number = account.key, account.number
        account.flows[index] = flow
        push(bucket.flows, flow)
        return flow

    cdef void _arrive(self, _Node node) noexcept:
        node.seen = self.fills
        node.sooner = self.last
        if self.last is None:
            self.first = node
        else:
            self.last.later = node
        self.last = node

    cdef int _part(self, _Node node) except -1:
        """Take the node out of everything."""
        cdef _Flow flow = node.flow
        del self.nodes[node.entry]
        if node.sooner is None:
            self.first = node.later
        else:
            node.sooner.later = node.later
        if node.later is None:
            self.last = node.sooner
        else:
            node.later.sooner = node.sooner
        node.sooner = node.later = None
        node.flow = None
        pull(flow.heap, node)
        if not flow.heap:
            self._end_flow(flow)
        return 0

    cdef int _end_flow(self, _Flow flow) except -1:
        cdef _Account account = flow.account
        cdef _Level level = account.level
        cdef _Bucket bucket = flow.bucket
        del account.flows[bucket.index]
        pull(bucket.flows, flow)
        if not bucket.flows:
            del level.buckets[bucket.index]
            del level.order[bisect_left(level.order, bucket.index)]
        if account.flows:
            return 0
        pull(level.ranking, account)
        if not level.ranking:
            del self.levels[level.priority]
            self.priorities.remove(level.priority)
        try:
            del level.accounts[account.user]
        except Exception:  # noqa: BLE001 - a user whose __eq__ raises stays here, empty; no batch may fail for it
            pass
        return 0

    # ---- the next batch

    cdef _Node _leader(self):
        """The item that begins the next batch: one that waited too long, or the first of the user served least."""
        cdef _Account account
        cdef _Flow flow
        cdef _Node node, found = None
        if self.first is None:
            return None
        if self.fills - max(self.first.seen, self.aged) > PATIENCE:
            self.aged = self.fills
            return self.first
        account = <_Account>(<_Level>self.levels[self.priorities[0]]).ranking[0]
        for flow in account.flows.values():
            node = <_Node>flow.heap[0]
            if found is None or precedes(node, found):
                found = node
        return found

    cdef int _fill_around(self, _Level level, double index, list batch) except -1:
        """Fill from one level: the leader's bucket and those beside it, the nearest first, each side to its end."""
        cdef list order = level.order.copy()
        cdef Py_ssize_t up = bisect_left(order, index), down = up - 1, count = len(order)
        while down >= 0 or up < count:
            if down < 0 or (up < count and <double>order[up] - index <= index - <double>order[down]):
                up = up + 1 if self._empty(level.buckets.get(order[up]), batch) else count
            else:
                down = down - 1 if self._empty(level.buckets.get(order[down]), batch) else -1
        return 0

    cdef bint _empty(self, _Bucket bucket, list batch) except -1:
        """Hand in from a bucket, the user served least first; return whether all of it fitted."""
        cdef _Flow flow
        cdef _Node node
        while bucket is not None and bucket.flows:
            flow = <_Flow>bucket.flows[0]
            if flow.number != flow.account.number:  # its account was served since
                flow.key, flow.number = flow.account.key, flow.account.number
                sink(bucket.flows, flow, 0)
                continue
            node = <_Node>flow.heap[0]
            if not self._fits(node.cost):
                return False
            self._hand_in(node, batch)
        return True

    cdef bint _fits(self, double cost) noexcept:
        cdef double padded = (self.size + 1) * max(self.longest, cost)
        if self.size >= self.max_batch or padded > self.max_cost:
            return False
        return padded - self.total - cost <= (self.max_padding + ROUNDING) * padded

    cdef int _hand_in(self, _Node node, list batch) except -1:
        cdef _Account account = node.flow.account
        account.key += node.cost
        self.turns += 1
        account.number = self.turns
        sink(account.level.ranking, account, account.place)
        self.size += 1
        self.longest = max(self.longest, node.cost)
        self.total += node.cost
        batch.append(node.entry)
        self._part(node)
        return 0
