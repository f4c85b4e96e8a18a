"""The inverted index of one user's texts, scored by BM25."""

cimport cython
from libc.math cimport isfinite
from libc.stdint cimport uint64_t
from libc.string cimport memset

from lexical cimport (
    WF_MAX_POSTING_ROWS,
    wf_postings,
    wf_postings_add,
    wf_postings_bytes,
    wf_postings_end_row,
    wf_postings_free,
    wf_postings_remove,
    wf_postings_reserve,
    wf_postings_score,
)

__all__ = ["Postings"]


@cython.final
cdef class Postings:
    cdef wf_postings index
    cdef readonly double k1
    cdef readonly double b

    def __cinit__(self, double k1=0.8, double b=0.2):
        memset(&self.index, 0, sizeof(self.index))
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

    def append(self, list terms not None):
        cdef size_t row = self.index.rows
        if row >= WF_MAX_POSTING_ROWS:
            raise ValueError(f"{row} rows are the most that one index holds")
        hashes = [hash(term) for term in terms]
        if wf_postings_reserve(&self.index, len(hashes)):
            raise MemoryError
        for value in hashes:
            if wf_postings_add(&self.index, <uint64_t><Py_hash_t>value):
                wf_postings_remove(&self.index, row)
                raise MemoryError
        if wf_postings_end_row(&self.index, len(hashes)):
            wf_postings_remove(&self.index, row)
            raise MemoryError
        return row

    def remove(self, Py_ssize_t row):
        if not 0 <= row < <Py_ssize_t>self.index.rows:
            raise IndexError(f"row {row} of {self.index.rows}")
        wf_postings_remove(&self.index, row)

    def score(self, list terms not None, float[::1] out):
        if out.shape[0] < <Py_ssize_t>self.index.rows:
            raise ValueError(f"out has {out.shape[0]} places; there are {self.index.rows} rows")
        for term in dict.fromkeys(terms):
            wf_postings_score(&self.index, <uint64_t><Py_hash_t>hash(term), self.k1, self.b, &out[0])
