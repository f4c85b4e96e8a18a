"""The table under `whisper_fast.cache`: entries, weights, expiry, eviction and counters, all in plain C memory.

Entries live in one array and are named by their slot in it. Two structures hold slots:

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
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport Py_EQ, PyObject_RichCompareBool
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from _gc cimport PyTypeObject, inquiry, traverseproc, visitproc

from types import GenericAlias

__all__ = ["Table"]

cdef enum:
    NONE = -1
    RESTARTS = 1000  # searches that a comparison may upset before we give up
    MOST = 0x7FFFFFFF  # slots
    SMALLEST = 8  # slots of the index and of the array at first

cdef struct Entry:
    PyObject *key  # NULL: the slot is free, and `newer` names the next free one
    PyObject *value
    double weight
    double expires  # on the clock; INFINITY: never
    uint32_t tag  # mixed bits of the key's hash
    uint32_t visited
    int32_t newer
    int32_t older


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

    cdef Entry *entries
    cdef int32_t *index
    cdef int32_t capacity, count, timed, free, newest, oldest, hand
    cdef uint32_t mask
    cdef int shift
    cdef uint64_t epoch  # changes with every change of structure
    cdef double held
    cdef double lifetime
    cdef bint pairwise
    cdef object weigher, on_evict, clock
    cdef readonly double max_weight
    cdef readonly dict _loading  # key -> who is loading it now; a change of the key takes the right to store away
    cdef readonly uint64_t hits, misses, puts, refused, evictions, expirations, removals

    __class_getitem__ = classmethod(GenericAlias)

    def __cinit__(self, *args, **kwargs):
        self.entries = NULL
        self.free = self.newest = self.oldest = self.hand = NONE
        self._loading = {}
        self._new_index(SMALLEST)

    def __init__(self, max_weight, *, weigher=None, pairwise=False, ttl=None, on_evict=None, clock=None):
        if self.count:
            raise ValueError("a cache that holds entries cannot be set up again")
        for name, given in (("weigher", weigher), ("on_evict", on_evict), ("clock", clock)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} is {type(given).__name__}; it must be callable or None")
        self.max_weight = checked(max_weight, "max_weight")
        if not isfinite(self.max_weight):
            raise ValueError("max_weight is infinite; a cache must be bounded")
        self.lifetime = INFINITY if ttl is None else checked(ttl, "ttl")
        self.weigher, self.on_evict, self.clock, self.pairwise = weigher, on_evict, clock, pairwise

    def __dealloc__(self):
        cdef int32_t slot
        for slot in range(self.capacity):
            if self.entries[slot].key != NULL:
                Py_DECREF(<object>self.entries[slot].key)
                Py_DECREF(<object>self.entries[slot].value)
        PyMem_Free(self.entries)
        PyMem_Free(self.index)

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
        cdef list held = [None] * self.count  # made first: making a list may run a finaliser
        cdef int32_t slot = self.oldest
        cdef Py_ssize_t at = 0
        while slot != NONE and at < len(held):
            held[at] = <object>self.entries[slot].key
            slot = self.entries[slot].newer
            at += 1
        return held[:at]

    def __contains__(self, key):
        return self._read(key) >= 0

    def __len__(self):
        return self.count

    @property
    def weight(self):
        """The weight held now; never above `max_weight`."""
        return self.held

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
        cdef int32_t slot = self._read(key), leaving = NONE
        cdef double heavy, now
        if slot < 0:
            return False
        value = <object>self.entries[slot].value
        heavy = self._weigh(key, value, weight)
        now = self._now()
        slot = self._find(key, tag_of(key))
        if slot < 0 or self.entries[slot].value != <PyObject *>value:
            return slot >= 0  # replaced meanwhile, and weighed when it was
        if heavy > self.max_weight:
            leaving = self._chain(slot, NONE)
            self.evictions += 1
        else:
            leaving = self._set_weight(slot, heavy, now)
        self._let_go(leaving, True)
        return heavy <= self.max_weight

    def pop(self, key, default=None):
        """Remove `key` and return its value, or `default`."""
        if self._loading:
            self._loading.pop(key, None)
        cdef int32_t slot = self._read(key)
        if slot < 0:
            return default
        value = <object>self.entries[slot].value
        self.removals += 1
        self._let_go(self._chain(slot, NONE), False)
        return value

    def clear(self):
        """Remove everything; loads under way still answer their waiters, but are not stored."""
        self._loading.clear()
        self._let_go(self._all(), False)

    # ---- inside: what may run Python code

    @cython.final
    cdef object _get(self, object key, object default):
        cdef int32_t slot = self._read(key)
        if slot < 0:
            self.misses += 1
            return default
        self.hits += 1
        self.entries[slot].visited = 1
        return <object>self.entries[slot].value

    @cython.final
    cdef int32_t _read(self, object key) except -2:
        """Return the slot of a live entry, or NONE; one that has expired goes."""
        cdef double now = self._now() if self.timed else -INFINITY
        cdef int32_t slot = self._find(key, tag_of(key))
        if slot >= 0 and self.entries[slot].expires <= now:
            self.expirations += 1
            self._let_go(self._chain(slot, NONE), True)
            return NONE
        return slot

    @cython.final
    cdef int32_t _find(self, object key, uint32_t tag) except -2:
        """Return the slot under `key`, or NONE. When it returns, nothing has changed since its last comparison."""
        cdef uint64_t epoch
        cdef uint32_t at
        cdef int32_t slot
        cdef bint same
        for _ in range(RESTARTS):
            epoch = self.epoch
            at = tag >> self.shift
            while True:
                slot = self.index[at]
                if slot == NONE:
                    return NONE
                if self.entries[slot].tag == tag:
                    if self.entries[slot].key == <PyObject *>key:
                        return slot
                    held = <object>self.entries[slot].key
                    same = PyObject_RichCompareBool(held, key, Py_EQ)
                    if self.epoch != epoch:
                        break
                    if same:
                        return slot
                at = (at + 1) & self.mask
        raise RuntimeError(f"comparing {type(key).__name__} keys changes the cache each time; it cannot be searched")

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
        cdef int32_t slot, leaving = NONE, replaced = NONE
        cdef double now = self._now() if self.timed or lifetime != INFINITY else -INFINITY
        if self._loading:
            self._loading.pop(key, None)
        self._reserve()
        slot = self._find(key, tag)
        # From here to the last lines no Python code runs.
        if slot >= 0:
            if self.entries[slot].expires <= now:
                self.expirations += 1
                leaving = self._chain(slot, NONE)
            else:
                self.removals += 1
                replaced = self._chain(slot, NONE)
        if weight > self.max_weight:
            self.refused += 1
        else:
            leaving = self._make_room(weight, NONE, now, leaving)
            self._insert(key, value, tag, weight, now + lifetime if lifetime != INFINITY else INFINITY)
            if replaced != NONE:
                self.entries[self.newest].visited = 1  # asked for twice is asked for again
            self.puts += 1
        self._let_go(replaced, False)
        self._let_go(leaving, True)
        return weight <= self.max_weight

    @cython.final
    cdef int _let_go(self, int32_t slot, bint tell) except -1:
        """Free the chained slots and drop what they held; `tell` on_evict. Its first error is raised at the end."""
        cdef int32_t following
        failure = None
        while slot != NONE:
            following = self.entries[slot].older
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
        cdef Entry *entry = &self.entries[slot]
        key = <object>entry.key
        value = <object>entry.value
        entry.key = entry.value = NULL
        entry.newer = self.free
        self.free = slot
        Py_DECREF(key)
        Py_DECREF(value)
        if tell and self.on_evict is not None:
            self.on_evict(key, value)
        return 0

    # ---- inside: structure only, no Python code

    @cython.final
    cdef int _reserve(self) except -1:
        """See to it that one more entry fits in."""
        cdef int32_t slot, larger
        cdef void *grown
        if self.free == NONE:
            if self.capacity > MOST - (self.capacity >> 1) - SMALLEST:
                raise MemoryError("a cache holds at most 2**31 entries")
            larger = self.capacity + (self.capacity >> 1) + SMALLEST
            grown = PyMem_Realloc(self.entries, larger * sizeof(Entry))
            if grown == NULL:
                raise MemoryError()
            self.entries = <Entry *>grown
            for slot in range(larger - 1, self.capacity - 1, -1):
                self.entries[slot].key = NULL
                self.entries[slot].newer = self.free
                self.free = slot
            self.capacity = larger
        if 2 * <uint64_t>(self.count + 1) > <uint64_t>self.mask + 1:
            self._new_index(2 * (<uint64_t>self.mask + 1))
        return 0

    @cython.final
    cdef int _new_index(self, uint64_t size) except -1:
        cdef int32_t slot
        cdef int32_t *grown = <int32_t *>PyMem_Malloc(size * sizeof(int32_t))
        if grown == NULL:
            raise MemoryError()
        memset(grown, 0xFF, size * sizeof(int32_t))  # all NONE
        PyMem_Free(self.index)
        self.index = grown
        self.mask = <uint32_t>(size - 1)
        self.shift = 32
        while size > 1:
            self.shift -= 1
            size >>= 1
        self.epoch += 1
        slot = self.oldest
        while slot != NONE:
            self._enter(slot)
            slot = self.entries[slot].newer
        return 0

    @cython.final
    cdef void _enter(self, int32_t slot) noexcept:
        cdef uint32_t at = self.entries[slot].tag >> self.shift
        while self.index[at] != NONE:
            at = (at + 1) & self.mask
        self.index[at] = slot

    @cython.final
    cdef void _leave(self, int32_t slot) noexcept:
        """Take the slot out of the index; what follows in its run and may stand nearer to its home moves up."""
        cdef uint32_t at = self.entries[slot].tag >> self.shift, hole, home
        while self.index[at] != slot:
            at = (at + 1) & self.mask
        hole = at
        while True:
            at = (at + 1) & self.mask
            slot = self.index[at]
            if slot == NONE:
                break
            home = self.entries[slot].tag >> self.shift
            if ((at - home) & self.mask) >= ((at - hole) & self.mask):
                self.index[hole] = slot
                hole = at
        self.index[hole] = NONE

    @cython.final
    cdef void _insert(self, object key, object value, uint32_t tag, double weight, double expires) noexcept:
        cdef int32_t slot = self.free
        cdef Entry *entry = &self.entries[slot]
        self.free = entry.newer
        Py_INCREF(key)
        Py_INCREF(value)
        entry.key, entry.value = <PyObject *>key, <PyObject *>value
        entry.weight, entry.expires, entry.tag, entry.visited = weight, expires, tag, 0
        entry.newer, entry.older = NONE, self.newest
        if self.newest == NONE:
            self.oldest = slot
        else:
            self.entries[self.newest].newer = slot
        self.newest = slot
        self._enter(slot)
        self.held += weight
        self.count += 1
        self.timed += expires != INFINITY
        self.epoch += 1

    @cython.final
    cdef int32_t _chain(self, int32_t slot, int32_t chain) noexcept:
        """Unlink a slot from both structures, put it before `chain`, and return it."""
        cdef Entry *entry = &self.entries[slot]
        self._leave(slot)
        if entry.newer == NONE:
            self.newest = entry.older
        else:
            self.entries[entry.newer].older = entry.older
        if entry.older == NONE:
            self.oldest = entry.newer
        else:
            self.entries[entry.older].newer = entry.newer
        if self.hand == slot:
            self.hand = entry.newer
        self.timed -= entry.expires != INFINITY
        self.count -= 1
        self.held = self.held - entry.weight if self.count else 0.0  # no rounding error outlives its entries
        self.epoch += 1
        entry.older = chain
        return slot

    @cython.final
    cdef int32_t _all(self) noexcept:
        """Unlink everything, as one chain."""
        cdef int32_t chain = self.newest
        memset(self.index, 0xFF, (<size_t>self.mask + 1) * sizeof(int32_t))
        self.newest = self.oldest = self.hand = NONE
        self.removals += self.count
        self.count = self.timed = 0
        self.held = 0.0
        self.epoch += 1
        return chain

    @cython.final
    cdef int32_t _set_weight(self, int32_t slot, double weight, double now) noexcept:
        cdef int32_t leaving
        self.held -= self.entries[slot].weight
        self.entries[slot].weight = 0.0
        leaving = self._make_room(weight, slot, now, NONE)
        self.entries[slot].weight = weight
        self.held += weight
        return leaving

    @cython.final
    cdef int32_t _make_room(self, double weight, int32_t spared, double now, int32_t chain) noexcept:
        """Unlink entries other than `spared` until `weight` fits in; return them before `chain`."""
        cdef int32_t slot
        while self.held + weight > self.max_weight:
            if self.count == (spared != NONE):
                self.held = 0.0  # a rounding error was all that was left
                break
            slot = self._victim(spared, now)
            if self.entries[slot].expires <= now:
                self.expirations += 1
            else:
                self.evictions += 1
            chain = self._chain(slot, chain)
        return chain

    @cython.final
    cdef int32_t _victim(self, int32_t spared, double now) noexcept:
        """Return the entry that goes next (SIEVE); there must be one other than `spared`."""
        cdef int32_t slot = self.hand
        cdef Entry *entry
        while True:
            if slot == NONE:
                slot = self.oldest
            entry = &self.entries[slot]
            if slot != spared:
                if not entry.visited or entry.expires <= now:
                    self.hand = slot  # unlinking it moves the hand on
                    return slot
                entry.visited = 0
            slot = entry.newer


cdef traverseproc traverse_attributes = (<PyTypeObject *>Table).tp_traverse
cdef inquiry clear_attributes = (<PyTypeObject *>Table).tp_clear


cdef int traverse(PyObject *cell, visitproc visit, void *arg) noexcept:
    cdef Entry *entries = (<Table>cell).entries
    cdef int32_t slot
    cdef int found = traverse_attributes(cell, visit, arg)
    if found:
        return found
    for slot in range((<Table>cell).capacity):
        if entries[slot].key != NULL:
            found = visit(entries[slot].key, arg) or visit(entries[slot].value, arg)
            if found:
                return found
    return 0


cdef int clear(PyObject *cell) noexcept:
    clear_attributes(cell)
    (<Table>cell)._let_go((<Table>cell)._all(), False)
    return 0


# The references in `entries` are plain C memory, which Cython's own functions know nothing of.
(<PyTypeObject *>Table).tp_traverse = traverse
(<PyTypeObject *>Table).tp_clear = clear
