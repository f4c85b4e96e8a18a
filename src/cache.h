/* The structure of a cache: entries in an array, named by their slot; an index over them; a queue through them.
 * It knows no Python: keys and values are pointers that it neither compares nor counts. */
#ifndef WHISPER_FAST_CACHE_H
#define WHISPER_FAST_CACHE_H

#include <stdint.h>

#define WF_NO_SLOT (-1)

typedef struct {
    void *key;           /* NULL: the slot is free, and `newer` names the next free one */
    void *value;
    double weight;
    double expires;      /* on the clock; infinite: never */
    uint32_t tag;        /* 32 mixed bits of the key's hash */
    uint32_t visited;
    int32_t newer, older;
} wf_entry;

typedef struct {
    wf_entry *entries;
    int32_t *index;      /* open addressing with linear probing, at most half full; holds slots */
    int32_t capacity, count, timed, free;
    int32_t newest, oldest, hand;
    uint32_t mask;
    int shift;           /* a tag's home is tag >> shift */
    uint64_t epoch;      /* changes with every change of structure */
    double weight, max_weight;
    uint64_t evictions, expirations;
} wf_cache;

/* Both return 0, or -1 without memory (or beyond 2^31 entries); the cache is then as it was. */
int wf_cache_begin(wf_cache *cache);
int wf_cache_reserve(wf_cache *cache); /* room for one more */

void wf_cache_insert(wf_cache *cache, void *key, void *value, uint32_t tag, double weight, double expires);

/* What leaves is unlinked and chained through `older`, before `chain`; its slot is in use until it is released. */
int32_t wf_cache_unlink(wf_cache *cache, int32_t slot, int32_t chain);
int32_t wf_cache_unlink_all(wf_cache *cache);
int32_t wf_cache_make_room(wf_cache *cache, double weight, int32_t spared, double now, int32_t chain);
int32_t wf_cache_reweigh(wf_cache *cache, int32_t slot, double weight, double now);
void wf_cache_release(wf_cache *cache, int32_t slot);

#endif
