"""What src/recall.h offers."""

from libc.stdint cimport int8_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from lexical cimport wf_postings
from vector cimport wf_hit, wf_rows, wf_scan


cdef extern from "recall.h" nogil:
    enum:
        WF_MOST_TERMS
        WF_NO_SPEAKER
        WF_PARTS

    ctypedef struct wf_words:
        int8_t *rows
        float *scale
        size_t count
        size_t stride

    ctypedef struct wf_kindred:
        const uint16_t *list
        size_t count

    ctypedef struct wf_ask:
        wf_rows rows
        wf_postings *postings
        const wf_words *words
        uint64_t hashes[64]
        uint16_t numbers[64]
        wf_kindred kindred[64]
        size_t terms
        float *vector
        float *mean
        const uint32_t *only
        size_t only_count
        const uint8_t *allowed
        size_t scopes
        double since
        double until
        double now
        double half_life
        uint32_t months
        uint32_t days
        uint16_t speaker
        const float *weights
        wf_scan scan
        size_t k
        wf_hit *hits
        float *parts
        ptrdiff_t found

    size_t wf_find_kindred(const wf_words *words, size_t number, wf_scan scan, int32_t *products, uint16_t *list)
    void wf_answer(wf_ask *ask)
    void wf_answer_all(wf_ask *asks, size_t count, size_t threads)
