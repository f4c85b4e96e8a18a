# The structure of a cache, in plain C: see src/cache.h.
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "cache.h" nogil:
    enum:
        WF_NO_SLOT
        WF_GUESS
        WF_LEAVING
        WF_TAG_BITS

    ctypedef struct wf_entry:
        void *key
        void *value
        double weight
        double expires
        uint32_t tag
        int32_t newer
        int32_t older

    ctypedef struct wf_queue:
        int32_t newest
        int32_t oldest

    ctypedef struct wf_cache:
        wf_entry *entries
        int32_t *index
        uint32_t size
        int32_t capacity
        int32_t count
        int32_t timed
        int32_t arm
        wf_queue window
        wf_queue main
        wf_queue guesses
        uint64_t epoch
        double weight
        double max_weight
        uint64_t evictions
        uint64_t expirations

    double wf_cache_chance(uint64_t *dice)
    int wf_cache_begin(wf_cache *cache)
    int wf_cache_reserve(wf_cache *cache)
    void wf_cache_end(wf_cache *cache)
    size_t wf_cache_bytes(const wf_cache *cache)
    int32_t wf_cache_insert(
        wf_cache *cache, void *key, void *value, uint32_t tag, double weight, double expires, int32_t replaced
    )
    int wf_cache_find_room(wf_cache *cache, double weight, double now, int32_t *chain)
    void wf_cache_touch(wf_cache *cache, int32_t slot)
    int32_t wf_cache_unlink(wf_cache *cache, int32_t slot, int32_t chain)
    int32_t wf_cache_unlink_all(wf_cache *cache)
    int32_t wf_cache_make_room(wf_cache *cache, double weight, double now, int32_t chain)
    int32_t wf_cache_shed(wf_cache *cache, double bound, int32_t most, double now)
    int32_t wf_cache_reweigh(wf_cache *cache, int32_t slot, double weight, double now)
    void wf_cache_release(wf_cache *cache, int32_t slot)
