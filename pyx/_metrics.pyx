"""Counters and histograms that cost a message next to nothing: one native call, no lock, fixed memory.

A histogram sorts values by the upper bits of their IEEE 754 pattern, as HdrHistogram does with whole numbers: each
power of two from 2^-30 (0.93 ns) to 2^34 is cut into 32 buckets of equal width, so that the middle of a bucket is
within 1/64 (1.6 %) of every value in it, at any percentile. What is smaller counts in the first bucket, what is
larger in the last. Histograms of several processes are merged by adding their buckets, without a further error.

A step holds the GIL and calls nothing of Python's, so that no other thread sees half of it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_Next
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.ref cimport PyObject
from cpython.unicode cimport PyUnicode_Check
from libc.math cimport INFINITY, ceil, ldexp
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

__all__ = ["OTHER", "Counter", "Counters", "Histogram", "Histograms"]

OTHER = "other"  # the name of whatever comes after the `most` names that a family keeps apart

cdef enum:
    SMALLEST = -30  # powers of two
    OCTAVES = 64
    PARTS_BITS = 5
    PARTS = 1 << PARTS_BITS
    BUCKETS = OCTAVES * PARTS + 1  # the first is for all that is below 2^SMALLEST
    MAGIC = 0x31484657  # "WFH1"

cdef struct Head:
    uint32_t magic, pairs
    double sum, largest

cdef struct Pair:
    uint64_t bucket, count


@cython.final
cdef class Counter:
    """A number that only grows."""

    cdef readonly double value

    def inc(self, double amount=1.0):
        """Add `amount`. Raises ValueError for one that is negative or not finite."""
        if not 0 <= amount < INFINITY:
            raise ValueError(f"a counter only grows; {amount} is not allowed")
        self.value += amount


@cython.final
cdef class Histogram:
    """How often which values of at least 0 were seen: seconds, bytes or numbers. 16 kB, whatever it is told."""

    cdef uint64_t _counts[BUCKETS]
    cdef readonly double sum
    cdef readonly double largest

    def observe(self, double value):
        """Count a value. Raises ValueError for one that is negative, infinite or NaN."""
        self._observe(checked(value))

    cdef void _observe(self, double value) noexcept:
        self._counts[bucket_of(value)] += 1
        self.sum += value
        if value > self.largest:
            self.largest = value

    @property
    def count(self):
        """How many values were seen."""
        return self._count()

    cdef uint64_t _count(self) noexcept:
        cdef uint64_t total = 0
        cdef int bucket
        for bucket in range(BUCKETS):
            total += self._counts[bucket]
        return total

    def quantile(self, double share):
        """Return the value that `share` (0 to 1) of all values do not exceed, within 1.6 %; 0 where there is none."""
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; 0 to 1 is allowed")
        cdef uint64_t total = self._count()
        cdef uint64_t rank = max(<uint64_t>1, <uint64_t>ceil(share * <double>total))
        cdef uint64_t seen = 0
        cdef int bucket
        if total == 0:
            return 0.0
        for bucket in range(BUCKETS):
            seen += self._counts[bucket]
            if seen >= rank:
                break
        return min(0.5 * (edge(bucket) + edge(bucket + 1)), self.largest)

    def below(self, bounds):
        """Return for each of the ascending `bounds` how many values are smaller; exact for powers of two."""
        cdef uint64_t seen = 0
        cdef int bucket = 0, end
        below = []
        for bound in bounds:
            end = bucket_of(max(0.0, <double>bound))
            while bucket < end:
                seen += self._counts[bucket]
                bucket += 1
            below.append(seen)
        return below

    def since(self, Histogram earlier not None):
        """Return what was seen after `earlier`, a copy of this histogram; `largest` is that of all time."""
        cdef Histogram later = Histogram.__new__(Histogram)
        cdef int bucket
        for bucket in range(BUCKETS):
            if earlier._counts[bucket] > self._counts[bucket]:
                raise ValueError("the earlier histogram holds values that this one never saw")
            later._counts[bucket] = self._counts[bucket] - earlier._counts[bucket]
        later.sum = max(0.0, self.sum - earlier.sum)
        later.largest = self.largest
        return later

    def copy(self):
        """Return the histogram as it is now."""
        cdef Histogram now = Histogram.__new__(Histogram)
        now.merge(self)
        return now

    def merge(self, Histogram other not None):
        """Add what another histogram has seen."""
        cdef int bucket
        for bucket in range(BUCKETS):
            self._counts[bucket] += other._counts[bucket]
        self.sum += other.sum
        self.largest = max(self.largest, other.largest)

    def dump(self):
        """Return it as bytes for another process of this machine."""
        cdef uint32_t pairs = 0
        cdef int bucket
        for bucket in range(BUCKETS):
            pairs += self._counts[bucket] > 0
        whole = PyBytes_FromStringAndSize(NULL, sizeof(Head) + pairs * sizeof(Pair))
        cdef Head head = Head(MAGIC, pairs, self.sum, self.largest)
        cdef char *place = PyBytes_AS_STRING(whole)
        cdef Pair pair
        memcpy(place, &head, sizeof(Head))
        place += sizeof(Head)
        for bucket in range(BUCKETS):
            if self._counts[bucket]:
                pair = Pair(bucket, self._counts[bucket])
                memcpy(place, &pair, sizeof(Pair))
                place += sizeof(Pair)
        return whole

    @staticmethod
    def load(bytes dumped not None):
        """Return what `dump` has dumped. Raises ValueError for anything else."""
        cdef Histogram made = Histogram.__new__(Histogram)
        cdef const char *place = PyBytes_AS_STRING(dumped)
        cdef Head head
        cdef Pair pair
        if not read_head(&head, place, len(dumped)):
            raise ValueError("these bytes are no histogram")
        made.sum, made.largest = head.sum, head.largest
        place += sizeof(Head)
        for _ in range(head.pairs):
            memcpy(&pair, place, sizeof(Pair))
            place += sizeof(Pair)
            if pair.bucket >= BUCKETS:
                raise ValueError("these bytes are no histogram")
            made._counts[pair.bucket] += pair.count
        return made


cdef class _Family:
    """What counters and histograms of one meaning share: they are told apart by a name, at most `most` of them."""

    cdef dict _named
    cdef readonly Py_ssize_t most

    def __cinit__(self, *, Py_ssize_t most=100):
        if most < 1:
            raise ValueError(f"most is {most}; at least 1 is allowed")
        self.most = most
        self._named = {}

    def __getitem__(self, str name not None):
        """Return the one of that name, which is made if it is new, or the common one of all that are too many."""
        return self._of(name)

    def __len__(self):
        return len(self._named)

    def items(self):
        """Return a list of every name with its counter or histogram."""
        return list(self._named.items())

    cdef object _of(self, str name):
        known = self._named.get(name)
        if known is None:
            if len(self._named) >= self.most:
                name = OTHER
            known = self._named.setdefault(name, self._new())
        return known

    cdef object _new(self):
        raise NotImplementedError


@cython.final
cdef class Counters(_Family):
    """Counters by name."""

    def inc(self, str name not None, double amount=1.0):
        """Add to the counter of that name. Raises ValueError for an amount that is negative or not finite."""
        (<Counter>self._of(name)).inc(amount)

    cdef object _new(self):
        return Counter()


@cython.final
cdef class Histograms(_Family):
    """Histograms by name."""

    def observe(self, str name not None, double value):
        """Count a value of that name. Raises ValueError for one that is negative, infinite or NaN."""
        (<Histogram>self._of(name))._observe(checked(value))

    def observe_all(self, dict values not None):
        """Count one value for each name. Raises ValueError and TypeError for what `observe` would not take."""
        cdef Py_ssize_t position = 0
        cdef PyObject *key
        cdef PyObject *value
        while PyDict_Next(values, &position, &key, &value):
            if not PyUnicode_Check(<object>key) or not PyFloat_CheckExact(<object>value):
                raise TypeError(f"{<object>key!r} has {<object>value!r}; a str and a float are wanted")
            (<Histogram>self._of(<str><object>key))._observe(checked(PyFloat_AS_DOUBLE(<object>value)))

    cdef object _new(self):
        return Histogram()


cdef inline double checked(double value) except -1.0:
    if not 0 <= value < INFINITY:
        raise ValueError(f"a histogram takes finite values of at least 0; {value} is not allowed")
    return value


cdef inline int bucket_of(double value) noexcept nogil:
    cdef uint64_t bits
    memcpy(&bits, &value, sizeof(bits))
    cdef int64_t part = <int64_t>(bits >> (52 - PARTS_BITS)) - ((1023 + SMALLEST) << PARTS_BITS)
    if part < 0:
        return 0
    return BUCKETS - 1 if part >= BUCKETS - 1 else <int>part + 1


cdef double edge(int bucket) noexcept nogil:
    """Return the smallest value of a bucket."""
    if bucket == 0:
        return 0.0
    return ldexp(1.0 + <double>((bucket - 1) % PARTS) / PARTS, SMALLEST + (bucket - 1) // PARTS)


cdef bint read_head(Head *head, const char *dumped, Py_ssize_t size) noexcept nogil:
    if size < <Py_ssize_t>sizeof(Head):
        return False
    memcpy(head, dumped, sizeof(Head))
    return (head.magic == MAGIC and head.pairs <= BUCKETS
            and size == <Py_ssize_t>(sizeof(Head) + head.pairs * sizeof(Pair))
            and 0 <= head.sum < INFINITY and 0 <= head.largest < INFINITY)
