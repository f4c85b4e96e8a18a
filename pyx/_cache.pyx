"""The table under `whisper_fast.cache`: entries, weights, expiry, eviction and counters, all in plain C memory.

Entries live in one array and are named by their slot in it. An index (open addressing with linear probing over 27
mixed bits of the key's hash, four sevenths full; removal shifts the run back, so that there are no tombstones) finds
them, and each is in one of two queues in order of last use: the window or the main queue. A third holds guesses: the
first to go, and nothing to the policy until somebody asks for them. A slot takes 62 bytes (48 the entry, 7 the index,
7 the ghosts). There are as many as the bound will hold, where the entries so far tell; else they grow by a third, and
from 8,192 by an eighth: 83 and 70 bytes an entry at worst. The shadows take 100 KB more at most, so a full cache of
1,000 entries takes up to 162 bytes each, of 10,000 67 and of 100,000 63.

Which entry goes (src/cache_policy.c). Two rules decide who is in the main queue; `now` counts accesses:

    recency     who returns, from the window or as a ghost of an evicted entry, moves into the main queue if
                now - its last use < now - last use of the main queue's oldest, which moves back into the window
    frequency   who is the oldest of a full window takes the place of the main queue's oldest if it was used
                more often, where uses count half after each 8 to 16 rounds of accesses; the loser is evicted

The first alone is LIRS (Jiang and Zhang, SIGMETRICS 2002) without its stack: an entry is in LIRS' stack exactly while
its last use is more recent than that of the main queue's oldest. The second alone is TinyLFU (Einziger et al., ACM
TOS 2017), its sketch replaced by 4 bits in each entry and ghost. A window of the whole cache is LRU. A third manner,
`clock`, is S3-FIFO (Yang et al., SOSP 2023). None is good everywhere: a loop wants LIRS, a drifting working set LRU,
a few popular entries among many both rules, the web S3-FIFO. So six arms, each a window's share and a choice of rules
(src/cache_shadow.c), run in shadows that hold no values, on every key whose mixed hash has enough zero bits: a shadow
of at most 512 entries sees the traffic of the whole (Waldspurger et al., FAST 2015). Each quarter round of a shadow:

    score(arm) = 0.975 * score(arm) + its hits in this quarter round; seen likewise, of the accesses
    the cache follows the best arm if it leads by more than 0.005 * (seen + 2 rounds, 6 for a sample)
    an arm that leads by more than 0.2 where 0.7 stands for 0.975 begins a new time: the older scores are forgotten

The long memory tells arms apart that differ little, where following noise costs more than it brings; the short one
sees in one or two rounds that the traffic is of another kind. To follow another arm changes two numbers; entries
move between the queues as accesses come, none is evicted for it.

Python code (a key's `__eq__`, the weigher, the clock, `on_evict`, a value's `__del__`) runs only while the structure
is whole. Whatever leaves is first unlinked and chained through `older`; callbacks and references follow when the new
state stands. A search whose comparison changed the table starts again.
"""

cimport cython
from cpython.object cimport Py_EQ, PyObject_RichCompareBool
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport INFINITY, isfinite, log
from libc.stdint cimport int32_t, uint32_t, uint64_t

from _entries cimport (
    WF_GUESS, WF_LEAVING, WF_NO_SLOT, WF_TAG_BITS, wf_cache, wf_cache_begin, wf_cache_bytes, wf_cache_chance,
    wf_cache_end, wf_cache_find_room, wf_cache_insert, wf_cache_make_room, wf_cache_release,
    wf_cache_reserve, wf_cache_reweigh, wf_cache_shed, wf_cache_touch, wf_cache_unlink, wf_cache_unlink_all, wf_entry,
)
from _gc cimport PYGEN_RETURN, PySendResult, PyTypeObject, inquiry, traverseproc, visitproc
from monotonic cimport wf_monotonic

from types import GenericAlias

__all__ = ["Held", "Table", "bounded"]

cdef enum:
    RESTARTS = 1000  # searches that a comparison may upset before we give up
    SLICE = 16       # evictions between two looks at the time


cdef inline uint32_t tag_of(object key) except? 0xFFFFFFFF:
    return <uint32_t>((<uint64_t>hash(key) * <uint64_t>0x9E3779B97F4A7C15) >> (64 - WF_TAG_BITS))


cdef double checked(object number, str name) except -1:
    """Return `number` as a float that is not negative; raises ValueError, TypeError."""
    cdef double value = number
    if not value >= 0:
        raise ValueError(f"{name} is {number!r}; it must be a number of at least 0")
    return value


cpdef double bounded(object max_weight) except -1:
    """Return a bound as a float; raises ValueError if it is negative, NaN or infinite."""
    cdef double bound = checked(max_weight, "max_weight")
    if not isfinite(bound):
        raise ValueError("max_weight is infinite; a cache must be bounded")
    return bound


cdef class Table:
    """A bounded map; see `whisper_fast.cache.Cache`, which is its public face (and the reason it is not final)."""

    cdef wf_cache table
    cdef double lifetime, ahead
    cdef uint64_t dice  # of xorshift; never 0
    cdef public double _took  # seconds of a load, lately
    cdef public object _resizing  # what may change the bound now
    cdef bint pairwise
    cdef object weigher, on_evict, clock
    cdef readonly dict _loading  # key -> who is loading it now; a change of the key takes the right to store away
    cdef readonly uint64_t hits, misses, puts, refused, removals

    __class_getitem__ = classmethod(GenericAlias)

    def __cinit__(self, *args, **kwargs):
        self._loading = {}
        if wf_cache_begin(&self.table) < 0:
            raise MemoryError()

    def __init__(self, max_weight, *, weigher=None, pairwise=False, ttl=None, on_evict=None, clock=None, ahead=0.0):
        if self.table.count:
            raise ValueError("a cache that holds entries cannot be set up again")
        for name, given in (("weigher", weigher), ("on_evict", on_evict), ("clock", clock)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} is {type(given).__name__}; it must be callable or None")
        self.table.max_weight = bounded(max_weight)
        self.lifetime = INFINITY if ttl is None else checked(ttl, "ttl")
        self.ahead = checked(ahead, "refresh_ahead")
        self.dice = 0x9E3779B97F4A7C15 ^ <uint64_t><size_t><void *>self
        self.weigher, self.on_evict, self.clock, self.pairwise = weigher, on_evict, clock, pairwise

    def __dealloc__(self):
        cdef int32_t slot
        for slot in range(self.table.capacity):
            if self.table.entries[slot].key != NULL:
                Py_DECREF(<object>self.table.entries[slot].key)
                Py_DECREF(<object>self.table.entries[slot].value)
        wf_cache_end(&self.table)

    # ---- reading

    @cython.binding(False)  # a plain method descriptor: the interpreter calls it with less ado
    def get(self, key, default=None):
        """Return the value under `key`, or `default`; raises TypeError for an unhashable key."""
        return self._get(key, default)

    def get_many(self, keys, default=None):
        """Return the values under `keys` in their order, `default` where there is none."""
        return [self._get(key, default) for key in keys]

    def keys(self):
        """Return the keys held now as a list; it reads nothing and expires nothing."""
        cdef list held = [None] * self.table.count  # made first: making a list may run a finaliser
        cdef Py_ssize_t at = 0
        cdef int32_t slot
        cdef wf_entry *entry
        for slot in range(self.table.capacity):
            entry = &self.table.entries[slot]
            if entry.key != NULL and entry.newer != WF_LEAVING and at < len(held):
                held[at] = <object>entry.key
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

    @cython.binding(False)
    def get_or_load(self, key, loader):
        """Return the value under `key`; one that is missing is loaded once for all who ask, and stored. Await it.

        `loader` is called with the key, or with nothing if it needs no argument; sync or async. Every caller may be
        cancelled alone; the load is cancelled when its last caller has gone. What the loader raises each caller gets
        as a copy of its own, and nothing is stored. A key that is put, popped or cleared during its load keeps that
        change: the load still answers those who waited for it. Raises LoadCycle instead of waiting for itself,
        TypeError for an unhashable key.
        """
        cdef int32_t slot = self._read(key)
        cdef Held held
        if slot < 0:
            self.misses += 1
            return self._load(key, loader)
        self.hits += 1
        wf_cache_touch(&self.table, slot)
        cdef double expires = self.table.entries[slot].expires
        value = <object>self.table.entries[slot].value
        held = Held.__new__(Held)  # which may run a finaliser that changes the cache: from here on `slot` is nothing
        held.value = value
        if self.ahead > 0.0 and self._due(expires):
            self._refresh(key, loader)
        return held

    def peek(self, key, default=None):
        """Return the value under `key`, or `default`, without counting it as asked for."""
        cdef int32_t slot = self._read(key)
        return default if slot < 0 else <object>self.table.entries[slot].value

    @property
    def nbytes(self):
        """Bytes of memory that the table itself takes, without keys and values."""
        return sizeof(Table) + wf_cache_bytes(&self.table)

    # ---- writing

    def put(self, key, value, *, weight=None, ttl=None):
        """Store `value`; return False if it is heavier than the whole cache (nothing is then held under `key`).

        `weight` and `ttl` (seconds; infinite: never expires) win over the cache's own. Raises ValueError for one that
        is negative or NaN, TypeError for an unhashable key.
        """
        return self._put(key, value, self._weigh(key, value, weight), self._lifetime(ttl))

    def guess(self, key, value, *, weight=None, ttl=None):
        """Store what nobody has asked for yet, on probation; return whether there was room, and nothing under `key`.

        It takes only room that is free, or held by what has expired or by other guesses, and is the first to go until
        somebody asks for it: then it is as if it were put at that moment.
        """
        return self._put(key, value, self._weigh(key, value, weight), self._lifetime(ttl), True)

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

    def shrink(self, max_weight, seconds=INFINITY, by=None):
        """Evict towards a lower bound for about `seconds`; return whether it holds now. Raises ValueError.

        Until then the bound is what is held. `by` is who resizes; if `_resizing` is another, nothing is left to do.
        """
        cdef double bound = bounded(max_weight), until = wf_monotonic() + <double>seconds
        cdef double now = self._now() if self.table.timed else -INFINITY
        cdef int32_t leaving
        while self._resizing is by and self.table.count and self.table.weight > bound:
            leaving = wf_cache_shed(&self.table, bound, SLICE, now)
            self.table.max_weight = max(bound, self.table.weight)
            self._let_go(leaving, True)
            if wf_monotonic() >= until:
                break
        if self._resizing is by and not self.table.weight > bound:
            self.table.max_weight = bound
        return self._resizing is not by or self.table.max_weight == bound

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
        wf_cache_touch(&self.table, slot)
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
            at = <uint32_t>(<uint64_t>tag * self.table.size >> WF_TAG_BITS)
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
                at += 1
                if at == self.table.size:
                    at = 0
        kind = type(key).__name__
        raise RuntimeError(f"comparing {kind} keys changes the cache each time; it cannot be searched")

    @cython.final
    cdef bint _due(self, double expires) except -1:
        """Return whether to load again already: now + took * ahead * -ln(u) >= expires, with u uniform in (0, 1]."""
        if expires == INFINITY or self._took <= 0.0:
            return False
        return self._now() - self._took * self.ahead * log(wf_cache_chance(&self.dice)) >= expires

    @cython.final
    cdef double _now(self) except? -1:
        return wf_monotonic() if self.clock is None else self.clock()

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
    cdef bint _put(self, object key, object value, double weight, double lifetime, bint guess=False) except -1:
        cdef uint32_t tag = tag_of(key)
        cdef int32_t slot, leaving = WF_NO_SLOT, replaced = WF_NO_SLOT, stored
        cdef double now = self._now() if self.table.timed or lifetime != INFINITY else -INFINITY, expires
        if self._loading and not guess:
            self._loading.pop(key, None)
        slot = self._find(key, tag)
        # From here to the last lines no Python code runs.
        if wf_cache_reserve(&self.table) < 0:
            raise MemoryError("there is no room for one more entry")
        if slot >= 0:
            if self.table.entries[slot].expires <= now:
                self.table.expirations += 1
                leaving = wf_cache_unlink(&self.table, slot, WF_NO_SLOT)
            elif guess:
                return False
            else:
                self.removals += 1
                replaced = wf_cache_unlink(&self.table, slot, WF_NO_SLOT)
        stored = weight <= self.table.max_weight
        self.refused += not stored
        if guess:
            stored = wf_cache_find_room(&self.table, weight, now, &leaving)
        elif stored:
            leaving = wf_cache_make_room(&self.table, weight, now, leaving)
        if stored:
            expires = now + lifetime if lifetime != INFINITY else INFINITY
            Py_INCREF(key)
            Py_INCREF(value)
            wf_cache_insert(
                &self.table, <void *>key, <void *>value, tag, weight, expires, WF_GUESS if guess else replaced
            )
            self.puts += 1
        self._let_go(replaced, False)
        self._let_go(leaving, True)
        return stored != 0

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


@cython.final
@cython.freelist(16)
cdef class Held:
    """An awaitable that has its value and never suspends. It is a coroutine to asyncio, so it may become a task."""

    cdef object value

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration(self.value)

    def send(self, value):
        """End with the value."""
        raise StopIteration(self.value)

    def throw(self, *error):
        """Raise `error` where the value would have been."""
        raise error[0] if isinstance(error[0], BaseException) else error[0](*error[1:2])

    def close(self):
        """Do nothing: there is nothing to end."""


cdef PySendResult send_held(PyObject *held, PyObject *value, PyObject **result) noexcept:
    Py_INCREF((<Held>held).value)
    result[0] = <PyObject *>(<Held>held).value
    return PYGEN_RETURN


# What `await` asks first: no StopIteration is made.
(<PyTypeObject *>Held).tp_as_async.am_send = send_held

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
