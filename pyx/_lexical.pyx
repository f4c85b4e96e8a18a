"""The inverted index of one user's texts, scored by BM25."""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport isfinite
from libc.stdint cimport uint64_t

from lexical cimport (
    WF_MAX_POSTING_ROWS,
    WF_NO_WORD,
    pthread_rwlock_unlock,
    pthread_rwlock_wrlock,
    wf_postings,
    wf_postings_add,
    wf_postings_bytes,
    wf_postings_end_row,
    wf_postings_free,
    wf_postings_open,
    wf_postings_remove,
    wf_postings_reserve,
    wf_postings_score,
)

from array import array

__all__ = ["Postings"]


@cython.final
cdef class Postings:
    cdef wf_postings index
    cdef readonly double k1
    cdef readonly double b

    def __cinit__(self, double k1=0.8, double b=0.2):
        if wf_postings_open(&self.index):
            raise MemoryError
        if not (isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
            raise ValueError(f"k1 is {k1}, b is {b}; k1 must not be negative and b must be from 0 to 1")
        self.k1 = k1
        self.b = b

    def __dealloc__(self):
        wf_postings_free(&self.index)

    def __len__(self):
        return self.index.rows

    @property
    def live(self):
        return self.index.live

    @property
    def nbytes(self):
        return sizeof(Postings) + wf_postings_bytes(&self.index)

    @property
    def kernel(self):
        return PyCapsule_New(&self.index, "whisper_fast.postings", NULL)

    def append(self, list terms not None, list words=None):
        cdef size_t row = self.index.rows, count = len(terms)
        if row >= WF_MAX_POSTING_ROWS:
            raise ValueError(f"{row} rows are the most that one index holds")
        hashes = array("q", map(hash, terms))
        numbers = array("H", [WF_NO_WORD]) * count if words is None else array("H", words)
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} words do not fit {count} terms")
        if self._append(hashes, numbers, count):
            raise MemoryError
        return row

    cdef int _append(self, const long long[::1] hashes, const unsigned short[::1] words, size_t count):
        """Append a row; return -1 without memory, the rows are then as they were. The lock is held meanwhile."""
        cdef size_t row = self.index.rows, i
        cdef int failed
        pthread_rwlock_wrlock(&self.index.lock)
        failed = wf_postings_reserve(&self.index, count)
        for i in range(0 if failed else count):
            failed = failed or wf_postings_add(&self.index, <uint64_t>hashes[i], words[i])
        if failed or wf_postings_end_row(&self.index, count):
            wf_postings_remove(&self.index, row)
            failed = -1
        pthread_rwlock_unlock(&self.index.lock)
        return failed

    def remove(self, Py_ssize_t row):
        if not 0 <= row < <Py_ssize_t>self.index.rows:
            raise IndexError(f"row {row} of {self.index.rows}")
        pthread_rwlock_wrlock(&self.index.lock)
        wf_postings_remove(&self.index, row)
        pthread_rwlock_unlock(&self.index.lock)

    def score(self, list terms not None, float[::1] out):
        if out.shape[0] < <Py_ssize_t>self.index.rows:
            raise ValueError(f"out has {out.shape[0]} places; there are {self.index.rows} rows")
        for term in dict.fromkeys(terms):
            wf_postings_score(&self.index, <uint64_t><Py_hash_t>hash(term), self.k1, self.b, &out[0])
