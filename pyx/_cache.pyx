"""The table under `whisper_fast.cache`: entries, weights, expiry, eviction and counters, all in plain C memory.

Entries live in one array and are named by their slot in it. Two structures hold slots (src/cache.c):

    index   open addressing with linear probing over 32 mixed bits of the key's hash (Fibonacci hashing), at most
            half full; removal shifts the run back, so that there are no tombstones
    queue   a doubly linked list from the newest entry to the oldest, in order of insertion

Eviction is SIEVE (Zhang et al., NSDI 2024): a hit only sets the entry's `visited` bit; to make room a hand walks the
queue from the oldest entry to the newest, clears the bits it meets, and takes the first entry without one; it stays
where it stopped. A hit thus moves nothing, which keeps it as cheap as a look into a dict, and entries that were never
asked for again leave before those that were: on web-like traffic a lower miss ratio than LRU. (Segmented LRU moves
list nodes on every hit and needs the size of its segments tuned.) An expired entry that the hand meets goes first.

Python code (a key's `__eq__`, the weigher, the clock, `on_evict`, a value's `__del__`) runs only while the structure
is whole. Whatever leaves is first unlinked and chained through `older`; callbacks and references follow when the new
state stands. A search whose comparison changed the table starts again.
"""

cimport cython
from cpython.object cimport Py_EQ, PyObject_RichCompareBool
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from _entries cimport (
    WF_NO_SLOT,
    wf_cache,
    wf_cache_begin,
    wf_cache_insert,
    wf_cache_make_room,
    wf_cache_release,
    wf_cache_reserve,
    wf_cache_reweigh,
    wf_cache_unlink,
    wf_cache_unlink_all,
)
from _gc cimport PyTypeObject, inquiry, traverseproc, visitproc

from types import GenericAlias

__all__ = ["Table"]

cdef enum:
    RESTARTS = 1000  # searches that a comparison may upset before we give up


cdef inline uint32_t tag_of(object key) except? 0:
    return <uint32_t>((<uint64_t>hash(key) * <uint64_t>0x9E3779B97F4A7C15) >> 32)


cdef double monotonic() noexcept:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <double>now.tv_sec + 1e-9 * <double>now.tv_nsec


cdef double checked(object number, str name) except -1:
    """Return `number` as a float that is not negative; raises ValueError, TypeError."""
    cdef double value = number
    if not value >= 0:
        raise ValueError(f"{name} is {number!r}; it must be a number of at least 0")
    return value


cdef class Table:
    """A bounded map; see `whisper_fast.cache.Cache`, which is its public face (and the reason it is not final)."""

    cdef wf_cache table
    cdef double lifetime
    cdef bint pairwise
    cdef object weigher, on_evict, clock
    cdef readonly dict _loading  # key -> who is loading it now; a change of the key takes the right to store away
    cdef readonly uint64_t hits, misses, puts, refused, removals

    __class_getitem__ = classmethod(GenericAlias)

    def __cinit__(self, *args, **kwargs):
        self._loading = {}
        if wf_cache_begin(&self.table) < 0:
            raise MemoryError()

    def __init__(self, max_weight, *, weigher=None, pairwise=False, ttl=None, on_evict=None, clock=None):
        if self.table.count:
            raise ValueError("a cache that holds entries cannot be set up again")
        for name, given in (("weigher", weigher), ("on_evict", on_evict), ("clock", clock)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} is {type(given).__name__}; it must be callable or None")
        self.table.max_weight = checked(max_weight, "max_weight")
        if not isfinite(self.table.max_weight):
            raise ValueError("max_weight is infinite; a cache must be bounded")
        self.lifetime = INFINITY if ttl is None else checked(ttl, "ttl")
        self.weigher, self.on_evict, self.clock, self.pairwise = weigher, on_evict, clock, pairwise

    def __dealloc__(self):
        cdef int32_t slot
        for slot in range(self.table.capacity):
            if self.table.entries[slot].key != NULL:
                Py_DECREF(<object>self.table.entries[slot].key)
                Py_DECREF(<object>self.table.entries[slot].value)
        free(self.table.entries)
        free(self.table.index)

    # ---- reading

    @cython.binding(False)  # a plain method descriptor: the interpreter calls it with less ado
    def get(self, key, default=None):
        """Return the value under `key`, or `default`; raises TypeError for an unhashable key."""
        return self._get(key, default)

    def get_many(self, keys, default=None):
        """Return the values under `keys` in their order, `default` where there is none."""
        return [self._get(key, default) for key in keys]

    def keys(self):
        """Return the keys held now, oldest first, as a list; it reads nothing and expires nothing."""
        cdef list held = [None] * self.table.count  # made first: making a list may run a finaliser
        cdef int32_t slot = self.table.oldest
        cdef Py_ssize_t at = 0
        while slot != WF_NO_SLOT and at < len(held):
            held[at] = <object>self.table.entries[slot].key
            slot = self.table.entries[slot].newer
            at += 1
        return held[:at]

    def __contains__(self, key):
        return self._read(key) >= 0

    def __len__(self):
        return self.table.count

    @property
    def max_weight(self):
        """The bound."""
        return self.table.max_weight

    @property
    def evictions(self):
        """Entries that went to make room."""
        return self.table.evictions

    @property
    def expirations(self):
        """Entries found when their time was over."""
        return self.table.expirations

    @property
    def weight(self):
        """The weight held now; never above `max_weight`."""
        return self.table.weight

    # ---- writing

    def put(self, key, value, *, weight=None, ttl=None):
        """Store `value`; return False if it is heavier than the whole cache (nothing is then held under `key`).

        `weight` and `ttl` (seconds; infinite: never expires) win over the cache's own. Raises ValueError for one that
        is negative or NaN, TypeError for an unhashable key.
        """
        return self._put(key, value, self._weigh(key, value, weight), self._lifetime(ttl))

    def put_many(self, items, *, weight=None, ttl=None):
        """Store a mapping, or pairs of key and value; return how many were stored."""
        cdef double lifetime = self._lifetime(ttl)
        cdef Py_ssize_t stored = 0
        for key, value in (items.items() if hasattr(items, "items") else items):
            stored += self._put(key, value, self._weigh(key, value, weight), lifetime)
        return stored

    def reweigh(self, key, weight=None):
        """Weigh again a value that was changed in place; return whether it is still held.

        Others make room if it grew; if it alone is heavier than the bound it goes itself, as an eviction.
        """
        cdef int32_t slot = self._read(key), leaving = WF_NO_SLOT
        cdef double heavy, now
        if slot < 0:
            return False
        value = <object>self.table.entries[slot].value
        heavy = self._weigh(key, value, weight)
        now = self._now()
        slot = self._find(key, tag_of(key))
        if slot < 0 or self.table.entries[slot].value != <void *>value:
            return slot >= 0  # replaced meanwhile, and weighed when it was
        if heavy > self.table.max_weight:
            leaving = wf_cache_unlink(&self.table, slot, WF_NO_SLOT)
            self.table.evictions += 1
        else:
            leaving = wf_cache_reweigh(&self.table, slot, heavy, now)
        self._let_go(leaving, True)
        return heavy <= self.table.max_weight

    def pop(self, key, default=None):
        """Remove `key` and return its value, or `default`."""
        if self._loading:
            self._loading.pop(key, None)
        cdef int32_t slot = self._read(key)
        if slot < 0:
            return default
        value = <object>self.table.entries[slot].value
        self.removals += 1
        self._let_go(wf_cache_unlink(&self.table, slot, WF_NO_SLOT), False)
        return value

    def clear(self):
        """Remove everything; loads under way still answer their waiters, but are not stored."""
        self._loading.clear()
        self._let_all_go()

    # ---- inside: what may run Python code

    @cython.final
    cdef object _get(self, object key, object default):
        cdef int32_t slot = self._read(key)
        if slot < 0:
            self.misses += 1
            return default
        self.hits += 1
        self.table.entries[slot].visited = 1
        return <object>self.table.entries[slot].value

    @cython.final
    cdef int32_t _read(self, object key) except -2:
        """Return the slot of a live entry, or WF_NO_SLOT; one that has expired goes."""
        cdef double now = self._now() if self.table.timed else -INFINITY
        cdef int32_t slot = self._find(key, tag_of(key))
        if slot >= 0 and self.table.entries[slot].expires <= now:
            self.table.expirations += 1
            self._let_go(wf_cache_unlink(&self.table, slot, WF_NO_SLOT), True)
            return WF_NO_SLOT
        return slot

    @cython.final
    cdef int32_t _find(self, object key, uint32_t tag) except -2:
        """Return the slot under `key`, or WF_NO_SLOT; nothing has changed since its last comparison."""
        cdef uint64_t epoch
        cdef uint32_t at
        cdef int32_t slot
        cdef bint same
        for _ in range(RESTARTS):
            epoch = self.table.epoch
            at = tag >> self.table.shift
            while True:
                slot = self.table.index[at]
                if slot == WF_NO_SLOT:
                    return WF_NO_SLOT
                if self.table.entries[slot].tag == tag:
                    if self.table.entries[slot].key == <void *>key:
                        return slot
                    held = <object>self.table.entries[slot].key
                    same = PyObject_RichCompareBool(held, key, Py_EQ)
                    if self.table.epoch != epoch:
                        break
                    if same:
                        return slot
                at = (at + 1) & self.table.mask
        kind = type(key).__name__
        raise RuntimeError(f"comparing {kind} keys changes the cache each time; it cannot be searched")

    @cython.final
    cdef double _now(self) except? -1:
        return monotonic() if self.clock is None else self.clock()

    @cython.final
    cdef double _weigh(self, object key, object value, object weight) except -1:
        if weight is None:
            if self.weigher is None:
                return 1.0
            weight = self.weigher(key, value) if self.pairwise else self.weigher(value)
        return checked(weight, "weight")

    @cython.final
    cdef double _lifetime(self, object ttl) except -1:
        return self.lifetime if ttl is None else checked(ttl, "ttl")

    @cython.final
    cdef bint _put(self, object key, object value, double weight, double lifetime) except -1:
        cdef uint32_t tag = tag_of(key)
        cdef int32_t slot, leaving = WF_NO_SLOT, replaced = WF_NO_SLOT
        cdef double now = self._now() if self.table.timed or lifetime != INFINITY else -INFINITY, expires
        if self._loading:
            self._loading.pop(key, None)
        slot = self._find(key, tag)
        # From here to the last lines no Python code runs.
        if wf_cache_reserve(&self.table) < 0:
            raise MemoryError("there is no room for one more entry")
        if slot >= 0:
            if self.table.entries[slot].expires <= now:
                self.table.expirations += 1
                leaving = wf_cache_unlink(&self.table, slot, WF_NO_SLOT)
            else:
                self.removals += 1
                replaced = wf_cache_unlink(&self.table, slot, WF_NO_SLOT)
        if weight > self.table.max_weight:
            self.refused += 1
        else:
            leaving = wf_cache_make_room(&self.table, weight, WF_NO_SLOT, now, leaving)
            expires = now + lifetime if lifetime != INFINITY else INFINITY
            Py_INCREF(key)
            Py_INCREF(value)
            wf_cache_insert(&self.table, <void *>key, <void *>value, tag, weight, expires)
            if replaced != WF_NO_SLOT:
                self.table.entries[self.table.newest].visited = 1  # asked for twice is asked for again
            self.puts += 1
        self._let_go(replaced, False)
        self._let_go(leaving, True)
        return weight <= self.table.max_weight

    @cython.final
    cdef int _let_all_go(self) except -1:
        self.removals += self.table.count
        return self._let_go(wf_cache_unlink_all(&self.table), False)

    @cython.final
    cdef int _let_go(self, int32_t slot, bint tell) except -1:
        """Free the chained slots and drop what they held; `tell` on_evict. Its first error is raised at the end."""
        cdef int32_t following
        failure = None
        while slot != WF_NO_SLOT:
            following = self.table.entries[slot].older
            try:
                self._drop(slot, tell)
            except BaseException as error:
                if failure is None:
                    failure = error
            slot = following
        if failure is not None:
            raise failure
        return 0

    @cython.final
    cdef int _drop(self, int32_t slot, bint tell) except -1:
        key = <object>self.table.entries[slot].key
        value = <object>self.table.entries[slot].value
        wf_cache_release(&self.table, slot)
        Py_DECREF(key)
        Py_DECREF(value)
        if tell and self.on_evict is not None:
            self.on_evict(key, value)
        return 0


cdef traverseproc traverse_attributes = (<PyTypeObject *>Table).tp_traverse
cdef inquiry clear_attributes = (<PyTypeObject *>Table).tp_clear


cdef int traverse(PyObject *cell, visitproc visit, void *arg) noexcept:
    cdef wf_cache *table = &(<Table>cell).table
    cdef int32_t slot
    cdef int found = traverse_attributes(cell, visit, arg)
    for slot in range(table.capacity):
        if found:
            break
        if table.entries[slot].key != NULL:
            found = visit(<PyObject *>table.entries[slot].key, arg)
            found = found or visit(<PyObject *>table.entries[slot].value, arg)
    return found


cdef int clear(PyObject *cell) noexcept:
    clear_attributes(cell)
    (<Table>cell)._let_all_go()
    return 0


# The references in the entries are plain C memory, which Cython's own functions know nothing of.
(<PyTypeObject *>Table).tp_traverse = traverse
(<PyTypeObject *>Table).tp_clear = clear
