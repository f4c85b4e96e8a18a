"""Weighted sums of int8 token rows: a text's vector from its token ids, without a temporary for each token."""

cimport cython
from libc.math cimport sqrt
from libc.stddef cimport size_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

__all__ = ["TokenSums"]

# Giving the GIL up and taking it again can cost a thread's whole switch interval: only a long sum is worth it.
cdef Py_ssize_t LONG = 1024  # tokens


cdef void add_up(
    const signed char* rows, const float* factors, Py_ssize_t width, const int* ids, Py_ssize_t count, float* total
) noexcept nogil:
    """Add factors[i] * rows[i] of each id to total[width], in the order of the ids."""
    cdef Py_ssize_t i, j
    cdef const signed char* row
    cdef float factor
    for i in range(count):
        row = rows + ids[i] * width
        factor = factors[ids[i]]
        for j in range(width):
            total[j] += factor * row[j]


cdef void make_unit(float* total, Py_ssize_t width) noexcept nogil:
    """Scale a vector to length 1; a zero vector stays as it is."""
    cdef double square = 0.0
    cdef float shrink
    cdef Py_ssize_t j
    for j in range(width):
        square += <double>total[j] * total[j]
    if square > 0.0:
        shrink = <float>(1.0 / sqrt(square))
        for j in range(width):
            total[j] *= shrink


@cython.final
cdef class TokenSums:
    """Sums over `rows` (int8 [n, d]) with one float32 factor for each row. Immutable; threads may share it."""

    cdef const signed char[:, ::1] _rows
    cdef const float[::1] _factors

    def __cinit__(self, const signed char[:, ::1] rows not None, const float[::1] factors not None, /):
        if rows.shape[0] == 0 or rows.shape[1] == 0 or factors.shape[0] != rows.shape[0]:
            raise ValueError(f"{factors.shape[0]} factors do not fit rows of shape {(rows.shape[0], rows.shape[1])}")
        self._rows = rows
        self._factors = factors

    def sum_into(self, float[:, ::1] out not None, list texts not None, /, *, bint unit=False):
        """Write the sum of each text's rows to out (float32 [len(texts), d]), at unit length if `unit`.

        A text is a list of row numbers; an empty one gives a zero row. Raises IndexError for a row that is not there.
        """
        cdef Py_ssize_t total = 0, n = len(texts), width = self._rows.shape[1]
        cdef list text
        if out.shape[0] != n or out.shape[1] != width:
            raise ValueError(f"out has shape {(out.shape[0], out.shape[1])}, not {(n, width)}")
        if n == 0:
            return
        for text in texts:
            total += len(text)
        cdef Py_ssize_t* ends = <Py_ssize_t*>malloc(<size_t>n * sizeof(Py_ssize_t) + <size_t>total * sizeof(int))
        if ends == NULL:
            raise MemoryError
        cdef int* ids = <int*>(ends + n)
        try:
            self._flatten(texts, ids, ends, total)
            if total < LONG:
                self._sum(ids, ends, n, &out[0, 0], unit)
            else:
                with nogil:
                    self._sum(ids, ends, n, &out[0, 0], unit)
        finally:
            free(ends)

    cdef int _flatten(self, list texts, int* ids, Py_ssize_t* ends, Py_ssize_t total) except -1:
        cdef Py_ssize_t at = 0, t = 0
        cdef int i
        cdef list text
        for text in texts:
            for i in text:
                if at == total:
                    raise RuntimeError("a text grew while it was read")
                if i < 0 or i >= self._rows.shape[0]:
                    raise IndexError(f"row {i} of {self._rows.shape[0]}")
                ids[at] = i
                at += 1
            ends[t] = at
            t += 1
        return 0

    cdef void _sum(
        self, const int* ids, const Py_ssize_t* ends, Py_ssize_t n, float* out, bint unit
    ) noexcept nogil:
        cdef Py_ssize_t t, start = 0, width = self._rows.shape[1]
        memset(out, 0, <size_t>(n * width) * sizeof(float))
        for t in range(n):
            add_up(&self._rows[0, 0], &self._factors[0], width, ids + start, ends[t] - start, out + t * width)
            start = ends[t]
            if unit:
                make_unit(out + t * width, width)
