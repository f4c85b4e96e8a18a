# The structure of a cache, in plain C: see src/cache.h.
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "cache.h" nogil:
    enum:
        WF_NO_SLOT

    ctypedef struct wf_entry:
        void *key
        void *value
        double weight
        double expires
        uint32_t tag
        uint32_t visited
        int32_t newer
        int32_t older

    ctypedef struct wf_cache:
        wf_entry *entries
        int32_t *index
        int32_t capacity
        int32_t count
        int32_t timed
        int32_t oldest
        int32_t newest
        uint32_t mask
        int shift
        uint64_t epoch
        double weight
        double max_weight
        uint64_t evictions
        uint64_t expirations

    int wf_cache_begin(wf_cache *cache)
    int wf_cache_reserve(wf_cache *cache)
    void wf_cache_insert(wf_cache *cache, void *key, void *value, uint32_t tag, double weight, double expires)
    int32_t wf_cache_unlink(wf_cache *cache, int32_t slot, int32_t chain)
    int32_t wf_cache_unlink_all(wf_cache *cache)
    int32_t wf_cache_make_room(wf_cache *cache, double weight, int32_t spared, double now, int32_t chain)
    int32_t wf_cache_reweigh(wf_cache *cache, int32_t slot, double weight, double now)
    void wf_cache_release(wf_cache *cache, int32_t slot)
