/* The structure of a cache: entries in an array, named by their slot; an index over them; two queues through them.
 * It knows no Python: keys and values are pointers that it neither compares nor counts. */
#ifndef WHISPER_FAST_CACHE_H
#define WHISPER_FAST_CACHE_H

#include "cache_shadow.h"

#include <stdint.h>

#define WF_NO_SLOT (-1)
#define WF_LEAVING (-2) /* `newer` of a slot that is unlinked and not yet released */
#define WF_GUESS (-3)   /* for `replaced`: nobody has asked for what is inserted */
#define WF_TAG_BITS 27

typedef struct {
    void *key;           /* NULL: the slot is free, and `newer` names the next free one */
    void *value;
    double weight;
    double expires;      /* on the clock; infinite: never */
    uint32_t tag : WF_TAG_BITS; /* mixed bits of the key's hash */
    uint32_t uses : 4;   /* how often it was asked for, halved as time passes; 0: never, it is a guess */
    uint32_t main : 1;   /* which queue holds it */
    uint32_t last;       /* the access at which it last moved to the front of its queue */
    int32_t newer, older;
} wf_entry;

typedef struct {
    int32_t newest, oldest;
    double weight;
} wf_queue;

typedef struct {
    wf_entry *entries;
    int32_t *index;      /* open addressing with linear probing, at most four sevenths full; holds slots */
    uint32_t *ghosts;    /* of entries evicted: a piece of the tag, the uses, the time; see cache_policy.c */
    wf_shadow *shadow;   /* NULL until the first eviction */
    uint32_t size;       /* of the index */
    uint32_t buckets;    /* of ghosts */
    int32_t capacity, count, timed, free;
    wf_queue window, main, guesses;
    uint32_t now;        /* accesses so far: the policy's time */
    uint32_t lazy;       /* an entry that moved less than this ago stays where it is */
    int tick;            /* log2 of the accesses in one unit of a ghost's time */
    int life;            /* log2 of the accesses after which uses count half */
    int arm;
    uint32_t shadows;    /* how many were begun */
    uint32_t unsampled;  /* a tag is sampled if its mixed bits have none of these */
    uint64_t epoch;      /* changes with every change of structure */
    double weight, max_weight;
    uint64_t evictions, expirations;
} wf_cache;

double wf_cache_chance(uint64_t *dice); /* uniform in (0, 1]; `dice` is never 0 */

/* Both return 0, or -1 without memory (or beyond 2^30 entries); the cache is then as it was. */
int wf_cache_begin(wf_cache *cache);
int wf_cache_reserve(wf_cache *cache); /* room for one more */
void wf_cache_end(wf_cache *cache);
size_t wf_cache_bytes(const wf_cache *cache);

/* `replaced` is the slot, already unlinked, of the value that was under the same key, or WF_NO_SLOT. */
int32_t wf_cache_insert(wf_cache *cache, void *key, void *value, uint32_t tag, double weight, double expires,
                        int32_t replaced);
void wf_cache_touch(wf_cache *cache, int32_t slot); /* it was asked for */

/* A guess takes only room that is free, or held by what has expired or by other guesses, and is the first to go.
 * Returns whether there is room for one; what left for it is chained to `*chain`. */
int wf_cache_find_room(wf_cache *cache, double weight, double now, int32_t *chain);

/* What leaves is unlinked and chained through `older`, before `chain`; its slot is in use until it is released. */
int32_t wf_cache_unlink(wf_cache *cache, int32_t slot, int32_t chain);
int32_t wf_cache_unlink_all(wf_cache *cache);
int32_t wf_cache_make_room(wf_cache *cache, double weight, double now, int32_t chain);
/* Evicts towards `bound`, `most` entries or until a new shadow has taken its time. */
int32_t wf_cache_shed(wf_cache *cache, double bound, int32_t most, double now);
int32_t wf_cache_reweigh(wf_cache *cache, int32_t slot, double weight, double now);
void wf_cache_release(wf_cache *cache, int32_t slot);

/* Between cache.c and cache_policy.c. */
void wf_cache_enter(wf_cache *cache, int32_t slot, int main);
void wf_cache_leave(wf_cache *cache, int32_t slot);
void wf_cache_settle(wf_cache *cache, int32_t slot, int32_t replaced);
int32_t wf_cache_expired(const wf_cache *cache, double now); /* the oldest of a queue, if its time is over */
int32_t wf_cache_victim(wf_cache *cache, double now);
void wf_cache_remember(wf_cache *cache, int32_t slot);

#endif
