"""What src/lexical.h offers."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t


cdef extern from "lexical.h" nogil:
    enum:
        WF_MAX_POSTING_ROWS
        WF_NO_WORD

    ctypedef struct pthread_rwlock_t:
        pass

    int pthread_rwlock_wrlock(pthread_rwlock_t *lock)
    int pthread_rwlock_unlock(pthread_rwlock_t *lock)

    ctypedef struct wf_postings:
        size_t rows
        size_t live
        pthread_rwlock_t lock

    int wf_postings_open(wf_postings *index)
    int wf_postings_reserve(wf_postings *index, size_t terms)
    int wf_postings_add(wf_postings *index, uint64_t hash, uint16_t word)
    int wf_postings_end_row(wf_postings *index, uint32_t length)
    void wf_postings_remove(wf_postings *index, uint32_t row)
    void wf_postings_score(const wf_postings *index, uint64_t hash, double k1, double b, float *out)
    size_t wf_postings_bytes(const wf_postings *index)
    void wf_postings_free(wf_postings *index)
