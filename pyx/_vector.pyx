"""Rows of int8 vectors of one user, and the exact search for the nearest of them."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport INFINITY, isfinite, isnan
from libc.stdint cimport int8_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcpy, memset

from vector cimport (
    WF_ALIGNMENT,
    WF_ASKS,
    WF_NO_ROW,
    WF_REMOVED,
    WF_SPEAKERS,
    aligned_alloc,
    wf_hit,
    wf_pack,
    wf_path,
    wf_paths,
    wf_question,
    wf_rows,
    wf_scan,
    wf_table,
    wf_table_bytes,
    wf_table_grown,
    wf_table_release,
    wf_top_k,
)

__all__ = ["Rows", "paths", "simd"]

cdef size_t DIMENSIONS = 65_536          # at most: 127 * 127 * 65,536 still fits the sum's 31 bits
cdef size_t HELD_BYTES = 1 << 20         # a scan below this keeps the GIL: getting it back may take longer

cdef const wf_path *PATHS
cdef size_t PATH_COUNT = wf_paths(&PATHS)


def paths():
    return tuple([PATHS[i].name.decode() for i in range(PATH_COUNT)])


def simd():
    return PATHS[0].name.decode()


cdef wf_scan scan_of(str path) except NULL:
    if path is None:
        return PATHS[0].scan
    for i in range(PATH_COUNT):
        if PATHS[i].name.decode() == path:
            return PATHS[i].scan
    raise ValueError(f"path is {path!r}; this machine runs {', '.join(paths())}")


cdef list as_tuples(const wf_hit *hits, Py_ssize_t count):
    return [(hits[i].row, hits[i].score) for i in range(count)]


@cython.final
cdef class Rows:
    cdef wf_rows rows

    def __cinit__(self, Py_ssize_t dimension):
        if not 1 <= dimension <= <Py_ssize_t>DIMENSIONS:
            raise ValueError(f"dimension is {dimension}; it must be from 1 to {DIMENSIONS}")
        self.rows.dimension = dimension
        self.rows.sum = <double *>calloc(dimension, sizeof(double))
        if self.rows.sum == NULL:
            raise MemoryError
        self.rows.stride = (dimension + WF_ALIGNMENT - 1) & ~(<size_t>WF_ALIGNMENT - 1)

    def __dealloc__(self):
        wf_table_release(self.rows.table)
        free(self.rows.sum)

    @property
    def dimension(self):
        return self.rows.dimension

    @property
    def kernel(self):
        return PyCapsule_New(&self.rows, "whisper_fast.rows", NULL)

    def __len__(self):
        return self.rows.count

    @property
    def live(self):
        return self.rows.count - self.rows.removed

    @property
    def nbytes(self):
        table = wf_table_bytes(self.rows.table) if self.rows.table else 0
        return sizeof(Rows) + self.rows.dimension * sizeof(double) + table

    def append(self, const float[::1] vector, Py_ssize_t scope, double at, Py_ssize_t previous=-1,
               Py_ssize_t speaker=0, bint asks=False):
        self._check_dimension(vector)
        cdef int8_t *row = self._reserve(scope, at, previous, speaker)
        cdef float scale = wf_pack(&vector[0], <Py_ssize_t>self.rows.dimension, row)
        if scale < 0:
            raise ValueError("the vector holds a value that is not finite")
        return self._take(row, scale, scope, at, previous, speaker, asks)

    def append_packed(self, bytes row, float scale, Py_ssize_t scope, double at, Py_ssize_t previous=-1,
                      Py_ssize_t speaker=0, bint asks=False):
        if PyBytes_GET_SIZE(row) != <Py_ssize_t>self.rows.dimension:
            raise ValueError(f"the packed row has {len(row)} bytes; these rows have {self.dimension}")
        if memchr(PyBytes_AS_STRING(row), 0x80, <Py_ssize_t>self.rows.dimension) or not isfinite(scale) or scale < 0:
            raise ValueError("not a packed row: a value is -128, or the scale is not finite and positive")
        cdef int8_t *to = self._reserve(scope, at, previous, speaker)
        memcpy(to, PyBytes_AS_STRING(row), <Py_ssize_t>self.rows.dimension)
        return self._take(to, scale, scope, at, previous, speaker, asks)

    def packed(self, Py_ssize_t row):
        self._check_row(row)
        cdef char *start = <char *>self.rows.table.packed + row * self.rows.stride
        return PyBytes_FromStringAndSize(start, <Py_ssize_t>self.rows.dimension), self.rows.table.scale[row]

    def told(self, Py_ssize_t row):
        self._check_row(row)
        return self.rows.table.scope[row], self.rows.table.at[row]

    def remove(self, Py_ssize_t row):
        self._check_row(row)
        if self.rows.table.scope[row] != WF_REMOVED:
            self._add_to_sum(row, -1.0)
            self.rows.table.scope[row] = WF_REMOVED
            self.rows.removed += 1

    def top_k(self, const float[::1] query not None, Py_ssize_t k, *, bytes allowed=None,
              double since=-INFINITY, double until=INFINITY, str path=None):
        cdef wf_question question
        cdef int8_t *packed
        if k < 0:
            raise ValueError(f"k is {k}; it must not be negative")
        self._check_dimension(query)
        memset(&question, 0, sizeof(question))
        question.scan = scan_of(path)
        question.since, question.until = since, until
        if allowed is not None:
            question.allowed = <const uint8_t *>PyBytes_AS_STRING(allowed)
            question.scopes = PyBytes_GET_SIZE(allowed)
        packed = <int8_t *>aligned_alloc(WF_ALIGNMENT, self.rows.stride)
        if packed == NULL:
            raise MemoryError
        try:
            memset(packed, 0, self.rows.stride)
            question.query = packed
            question.query_scale = wf_pack(&query[0], self.rows.dimension, packed)
            if question.query_scale < 0:
                raise ValueError("the query holds a value that is not finite")
            return self._best(&question, min(<size_t>k, self.rows.count))
        finally:
            free(packed)

    cdef list _best(self, const wf_question *question, size_t k):
        cdef Py_ssize_t found
        cdef size_t count = self.rows.count
        cdef wf_table *table = self.rows.table
        if k == 0:
            return []
        cdef wf_hit *hits = <wf_hit *>malloc(k * sizeof(wf_hit))
        if hits == NULL:
            raise MemoryError
        table.references += 1
        try:
            if count * self.rows.stride <= HELD_BYTES:
                found = wf_top_k(table, count, question, k, hits)
            else:
                with nogil:
                    found = wf_top_k(table, count, question, k, hits)
            return as_tuples(hits, found)
        finally:
            wf_table_release(table)
            free(hits)

    cdef int8_t *_reserve(self, Py_ssize_t scope, double at, Py_ssize_t previous, Py_ssize_t speaker) except NULL:
        if not 0 <= scope < WF_REMOVED:
            raise ValueError(f"scope is {scope}; it must be from 0 to {WF_REMOVED - 1}")
        if not 0 <= speaker < WF_SPEAKERS:
            raise ValueError(f"speaker is {speaker}; it must be from 0 to {WF_SPEAKERS - 1}")
        if isnan(at):
            raise ValueError("at is not a number")
        if not -1 <= previous < <Py_ssize_t>self.rows.count:
            raise ValueError(f"previous is {previous}; it must be a row before {self.rows.count}, or -1")
        if self.rows.table == NULL or self.rows.count == self.rows.table.capacity:
            self._grow()
        cdef int8_t *row = self.rows.table.packed + self.rows.count * self.rows.stride
        memset(row + <Py_ssize_t>self.rows.dimension, 0, self.rows.stride - <Py_ssize_t>self.rows.dimension)
        return row

    cdef int _grow(self) except -1:
        cdef size_t count = self.rows.count
        cdef wf_table *larger = wf_table_grown(self.rows.table, count, count + count // 8 + 4, self.rows.stride)
        if larger == NULL:
            raise MemoryError(f"no memory for more than {self.rows.count} rows")
        wf_table_release(self.rows.table)
        self.rows.table = larger
        return 0

    cdef _take(self, int8_t *row, float scale, Py_ssize_t scope, double at, Py_ssize_t previous, Py_ssize_t speaker,
               bint asks):
        cdef size_t i = self.rows.count
        self.rows.table.scale[i] = scale
        self.rows.table.scope[i] = scope
        self.rows.table.at[i] = at
        self.rows.table.mark[i] = speaker | (WF_ASKS if asks else 0)
        self._add_to_sum(i, 1.0)
        self.rows.table.previous[i] = WF_NO_ROW if previous < 0 else previous
        self.rows.count = i + 1
        return i

    cdef int _check_dimension(self, const float[::1] vector) except -1:
        if vector.shape[0] != <Py_ssize_t>self.rows.dimension:
            raise ValueError(f"the vector has {vector.shape[0]} dimensions; these rows have {self.dimension}")
        return 0

    cdef int _check_row(self, Py_ssize_t row) except -1:
        if not 0 <= row < <Py_ssize_t>self.rows.count:
            raise IndexError(f"row {row} of {self.rows.count}")
        return 0

    cdef void _add_to_sum(self, size_t row, double sign) noexcept:
        cdef const int8_t *packed = self.rows.table.packed + row * self.rows.stride
        cdef double scale = sign * self.rows.table.scale[row]
        cdef size_t j
        for j in range(self.rows.dimension):
            self.rows.sum[j] += scale * packed[j]
