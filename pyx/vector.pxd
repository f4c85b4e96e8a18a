"""What src/vector.h offers."""

from libc.stdint cimport int8_t, int32_t, uint8_t, uint16_t, uint32_t


cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)  # libc.stdlib does not declare it


cdef extern from "vector.h" nogil:
    enum:
        WF_ALIGNMENT
        WF_REMOVED
        WF_NO_ROW
        WF_ASKS
        WF_SPEAKERS

    ctypedef void (*wf_scan)(const int8_t *, size_t, const int8_t *, size_t, int32_t *) noexcept

    ctypedef struct wf_path:
        const char *name
        wf_scan scan

    ctypedef struct wf_table:
        size_t references
        size_t capacity
        size_t stride
        int8_t *packed
        float *scale
        double *at
        uint32_t *previous
        uint32_t *scope
        uint16_t *mark

    ctypedef struct wf_rows:
        wf_table *table
        size_t count
        size_t removed
        size_t stride
        size_t dimension
        double *sum

    ctypedef struct wf_question:
        const int8_t *query
        float query_scale
        const uint8_t *allowed
        size_t scopes
        double since
        double until
        wf_scan scan

    ctypedef struct wf_hit:
        uint32_t row
        float score

    size_t wf_paths(const wf_path **paths)
    wf_table *wf_table_grown(const wf_table *old, size_t count, size_t capacity, size_t stride)
    void wf_table_release(wf_table *table)
    size_t wf_table_bytes(const wf_table *table)
    float wf_pack(const float *vector, size_t dimension, int8_t *packed)
    ptrdiff_t wf_top_k(const wf_table *, size_t, const wf_question *, size_t, wf_hit *)
