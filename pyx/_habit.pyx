"""When a user will return, from when the user returned before: 64 bytes a user, under a microsecond a message.

A visit begins with a message that comes more than `gap` seconds after the one before. Two predictors watch how visits
follow each other; each says in which window the next one begins, and each is believed only after its own record:

    period   the mean m and the mean deviation d of the seconds between beginnings, both moving by 1/8 (1/n at first);
             the window is m +- (4 d + 30), if that is at most m / 4 to either side and m at most 15 days
    day      for each of 32 parts of the day the share p of days on which a visit began there, moving by 1/8; the
             window is the next run of at most 6 parts with p > 1/40, and half a part to either side, if its p add up
             to 0.47: what is less has not been seen for long enough to be judged
    record   the share of a predictor's windows in which the visit began, moving by 1/8 from 0. At 0.63 (the eighth
             right one in a row) it is believed; of two that are, the narrower window counts

Who returns at random (exponential gaps, d = 0.74 m) has no window by the period and hardly ever a run of parts. The
thresholds are those at which `benches/preload_irc.py` finds most returns at a precision of 0.99. Seconds are those of
the wall clock; a message that is older than the last one changes nothing but when the user wrote last.
"""

cimport cython
from libc.math cimport fabs
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

__all__ = ["Habits"]

cdef enum:
    PARTS = 32
    PART = 2700  # seconds
    WAYS = 8
    BELIEVED = 160  # of 255


cdef struct Record:
    uint64_t name  # the user's hash, 0 for none
    uint32_t begun, last  # the visit's first message, and its newest
    float mean, deviation
    uint16_t visits
    uint8_t period, day  # the predictors' records
    uint8_t parts[PARTS]

cdef struct Window:
    uint32_t opens, closes  # both 0 where there is none


@cython.final
cdef class Habits:
    """The habits of about the `users` that wrote last, in a table of so many records, rounded up to a power of two.

    Each may stand in one of two sets of 8; where both are full, whoever of the 16 has not written for longest makes
    room. Of 100,000 users a table for 131,072 forgets two, of 118,000 in it 0.7 %, of 131,072 4 %.
    """

    cdef Record *records
    cdef uint64_t sets
    cdef uint32_t gap

    def __cinit__(self, Py_ssize_t users, *, double gap):
        if users < 1 or not 0 < gap < 1e8:
            raise ValueError(f"users is {users} and gap {gap}; both must be more than 0")
        self.sets = 1
        while self.sets * WAYS < <uint64_t>users:
            self.sets *= 2
        self.gap = <uint32_t>gap
        self.records = <Record *>calloc(self.sets * WAYS, sizeof(Record))
        if self.records == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.records)

    @property
    def nbytes(self):
        """Bytes of the table."""
        return self.sets * WAYS * sizeof(Record)

    def seen(self, str user not None, double now):
        """Note a message; return None within a visit, else the window (opens, closes) of the next visit.

        Both are epoch seconds, and 0 where none is foreseen.
        """
        if not 1 <= now < 4e9:  # also NaN: a clock that says so has nothing to teach
            return None
        cdef Record *record = self._find(<uint64_t>hash(user) | 1)
        cdef uint32_t at = <uint32_t>now
        cdef bint begins = record.visits == 0 or at > record.last + <uint64_t>self.gap
        if begins:
            if record.visits:
                learn(record, at)
            if record.visits < 65535:
                record.visits += 1
            record.begun = at
        record.last = at
        if not begins:
            return None
        cdef Window window = foreseen(record)
        return window.opens, window.closes

    def last(self, str user not None):
        """Return when the user wrote last in epoch seconds, 0 for somebody unknown."""
        cdef Record *record = self._known(<uint64_t>hash(user) | 1)
        return 0 if record == NULL else record.last

    def forget(self, str user not None):
        """Forget a user's habits."""
        cdef Record *record = self._known(<uint64_t>hash(user) | 1)
        if record != NULL:
            memset(record, 0, sizeof(Record))

    cdef Record *_set(self, uint64_t name, bint second) noexcept:
        return self.records + (mixed(name, second) & (self.sets - 1)) * WAYS

    cdef Record *_known(self, uint64_t name) noexcept:
        cdef Record *ways
        cdef int second, way
        for second in range(2):
            ways = self._set(name, second)
            for way in range(WAYS):
                if ways[way].name == name:
                    return ways + way
        return NULL

    cdef Record *_find(self, uint64_t name) noexcept:
        """Return the record of a user; a new one takes a free place, or that of whoever has not written for longest.

        Of two sets with free places the emptier one has it, so that both fill alike.
        """
        cdef Record *found = self._known(name)
        cdef Record *ways
        cdef Record *oldest
        cdef int second, way, empty, most = -1
        if found != NULL:
            return found
        for second in range(2):
            ways = oldest = self._set(name, second)
            empty = 0
            for way in range(WAYS):
                empty += ways[way].name == 0
                if ways[way].last < oldest.last:
                    oldest = ways + way
            if empty > most or (empty == most == 0 and oldest.last < found.last):
                found, most = oldest, empty
        memset(found, 0, sizeof(Record))
        found.name = name
        return found


cdef uint64_t mixed(uint64_t name, bint second) noexcept nogil:
    return (name * (<uint64_t>0xC2B2AE3D27D4EB4F if second else <uint64_t>0x9E3779B97F4A7C15)) >> 20


cdef void learn(Record *record, uint32_t at) noexcept nogil:
    """Judge both predictors by a visit that begins, then let them learn from it."""
    judge(&record.period, by_period(record), at)
    judge(&record.day, by_day(record), at)
    cdef float gap = at - record.begun
    cdef float share = 1.0 / min(<int>record.visits, 8)
    if record.visits > 1:
        record.deviation += (fabs(gap - record.mean) - record.deviation) / min(<int>record.visits - 1, 8)
    record.mean += (gap - record.mean) * share
    cdef uint32_t part = record.begun // PART + 1
    cdef uint32_t now = at // PART
    if now - part > 8 * PARTS:
        part = now - 8 * PARTS
    while part < now:
        move(&record.parts[part % PARTS], False)
        part += 1
    if now > record.begun // PART:
        move(&record.parts[now % PARTS], True)


cdef void judge(uint8_t *score, Window window, uint32_t at) noexcept nogil:
    if window.closes:
        move(score, window.opens <= at <= window.closes)


cdef void move(uint8_t *share, bint up) noexcept nogil:
    if up:
        share[0] += (255 - share[0] + 7) // 8
    else:
        share[0] -= (share[0] + 7) // 8


cdef Window foreseen(Record *record) noexcept nogil:
    cdef Window period = by_period(record), day = by_day(record), none = Window(0, 0)
    if record.period < BELIEVED:
        period = none
    if record.day < BELIEVED:
        day = none
    if not period.closes or (day.closes and day.closes - day.opens < period.closes - period.opens):
        return day
    return period


cdef Window by_period(Record *record) noexcept nogil:
    cdef float slack = 4 * record.deviation + 30
    if record.visits < 4 or slack > record.mean / 4 or record.mean > 1.3e6:
        return Window(0, 0)
    return Window(<uint32_t>(record.begun + <double>record.mean - slack),
                  <uint32_t>(record.begun + <double>record.mean + slack))


cdef Window by_day(Record *record) noexcept nogil:
    """Return the next run of parts of the day that is not the one under way."""
    cdef uint32_t part = record.begun // PART
    cdef uint32_t end = part + PARTS, first = 0
    cdef int total = 0
    while part < end and record.parts[part % PARTS] > 6:
        part += 1  # the run under way
    end = part + PARTS
    while part <= end:
        if record.parts[part % PARTS] > 6:
            first = first if first else part
            total += record.parts[part % PARTS]
        elif first:
            if total >= 120 and part - first <= 6:
                return Window(first * PART - PART // 2, part * PART + PART // 2)
            if total >= 120:
                return Window(0, 0)
            first, total = 0, 0
        part += 1
    return Window(0, 0)
