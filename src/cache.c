#include "cache.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SMALLEST 8    /* slots at first, and of each growth */
#define LARGE (1 << 13) /* slots from which it grows by an eighth at a time; a third below */
#define MOST (1 << 30)
#define EIGHTHS 14    /* of a ghost for each entry; 8 ghosts are a bucket */
#define FIRST_ARM 1   /* which policy rules until the shadows have seen something */

static uint32_t home(const wf_cache *c, uint32_t tag)
{
    return (uint32_t)((uint64_t)tag * c->size >> WF_TAG_BITS);
}

static uint32_t after(const wf_cache *c, uint32_t at)
{
    return at + 1 == c->size ? 0 : at + 1;
}

static uint32_t distance(const wf_cache *c, uint32_t from, uint32_t to)
{
    return to >= from ? to - from : to + c->size - from;
}

static void enter_index(wf_cache *c, int32_t slot)
{
    uint32_t at = home(c, c->entries[slot].tag);
    while (c->index[at] != WF_NO_SLOT)
        at = after(c, at);
    c->index[at] = slot;
}

/* Takes a slot out; what follows in its run and may stand nearer to its home moves up, so there are no tombstones. */
static void leave_index(wf_cache *c, int32_t slot)
{
    uint32_t at = home(c, c->entries[slot].tag), hole;
    while (c->index[at] != slot)
        at = after(c, at);
    for (hole = at; ; ) {
        at = after(c, at);
        slot = c->index[at];
        if (slot == WF_NO_SLOT)
            break;
        if (distance(c, home(c, c->entries[slot].tag), at) >= distance(c, hole, at)) {
            c->index[hole] = slot;
            hole = at;
        }
    }
    c->index[hole] = WF_NO_SLOT;
}

/* Hardly more than what the bound will hold of entries like these. */
static int32_t larger(const wf_cache *c)
{
    double grown = c->capacity + c->capacity / (c->capacity < LARGE ? 3 : 8) + SMALLEST;
    double bound = c->weight > 0.0 ? c->count * (c->max_weight / c->weight) + 2 : grown;
    if (bound > c->capacity && bound < grown)
        grown = bound;
    return grown > MOST ? MOST : (int32_t)grown;
}

/* The ghosts start anew: they are of the time before there was room. */
static void grow_ghosts(wf_cache *c)
{
    uint32_t buckets = (uint32_t)c->capacity * EIGHTHS / 64 + 1;
    uint32_t *grown = calloc(buckets, 8 * sizeof *grown);
    if (grown != NULL) {
        free(c->ghosts);
        c->ghosts = grown;
        c->buckets = buckets;
    }
}

static int grow(wf_cache *c)
{
    int32_t capacity = larger(c);
    uint32_t size = (uint32_t)capacity / 4 * 7 + 7;
    if (capacity <= c->capacity)
        return -1;
    int32_t *index = malloc(size * sizeof *index);
    wf_entry *entries = index == NULL ? NULL : realloc(c->entries, (size_t)capacity * sizeof *entries);
    if (entries == NULL) {
        free(index);
        return -1;
    }
    free(c->index);
    memset(index, 0xFF, size * sizeof *index);
    c->index = index;
    c->size = size;
    c->entries = entries;
    for (int32_t slot = 0; slot < c->capacity; slot++)
        if (entries[slot].key != NULL && entries[slot].newer != WF_LEAVING)
            enter_index(c, slot);
    for (int32_t slot = capacity - 1; slot >= c->capacity; slot--)
        wf_cache_release(c, slot);
    c->capacity = capacity;
    c->epoch++;
    grow_ghosts(c);
    return 0;
}

double wf_cache_chance(uint64_t *dice)
{
    *dice ^= *dice << 13;
    *dice ^= *dice >> 7;
    *dice ^= *dice << 17;
    return (double)((*dice >> 11) + 1) * 0x1p-53;
}

int wf_cache_begin(wf_cache *c)
{
    memset(c, 0, sizeof *c);
    c->free = WF_NO_SLOT;
    c->window = c->main = c->guesses = (wf_queue){WF_NO_SLOT, WF_NO_SLOT, 0.0};
    c->arm = FIRST_ARM;
    return grow(c);
}

int wf_cache_reserve(wf_cache *c)
{
    return c->free == WF_NO_SLOT ? grow(c) : 0;
}

void wf_cache_end(wf_cache *c)
{
    free(c->entries);
    free(c->index);
    free(c->ghosts);
    wf_shadow_free(c->shadow);
}

size_t wf_cache_bytes(const wf_cache *c)
{
    size_t shadow = c->shadow == NULL ? 0 : wf_shadow_bytes(c->shadow);
    return (size_t)c->capacity * sizeof *c->entries + c->size * sizeof *c->index + c->buckets * 8 * sizeof *c->ghosts +
           shadow;
}

void wf_cache_release(wf_cache *c, int32_t slot)
{
    c->entries[slot].key = c->entries[slot].value = NULL;
    c->entries[slot].newer = c->free;
    c->free = slot;
}

int32_t wf_cache_insert(wf_cache *c, void *key, void *value, uint32_t tag, double weight, double expires,
                        int32_t replaced)
{
    int32_t slot = c->free;
    c->free = c->entries[slot].newer;
    c->entries[slot] = (wf_entry){.key = key, .value = value, .weight = weight, .expires = expires, .tag = tag};
    enter_index(c, slot);
    if (replaced == WF_GUESS)
        wf_cache_enter(c, slot, 0);
    else
        wf_cache_settle(c, slot, replaced);
    c->weight += weight;
    c->count++;
    c->timed += expires != INFINITY;
    c->epoch++;
    return slot;
}

int32_t wf_cache_unlink(wf_cache *c, int32_t slot, int32_t chain)
{
    wf_entry *entry = &c->entries[slot];
    leave_index(c, slot);
    wf_cache_leave(c, slot);
    c->timed -= entry->expires != INFINITY;
    c->count--;
    c->weight = c->count ? c->weight - entry->weight : 0.0; /* no rounding error outlives its entries */
    c->epoch++;
    entry->newer = WF_LEAVING;
    entry->older = chain;
    return slot;
}

int32_t wf_cache_unlink_all(wf_cache *c)
{
    int32_t chain = WF_NO_SLOT;
    for (int32_t slot = 0; slot < c->capacity; slot++)
        if (c->entries[slot].key != NULL && c->entries[slot].newer != WF_LEAVING) {
            c->entries[slot].newer = WF_LEAVING;
            c->entries[slot].older = chain;
            chain = slot;
        }
    memset(c->index, 0xFF, c->size * sizeof *c->index);
    c->window = c->main = c->guesses = (wf_queue){WF_NO_SLOT, WF_NO_SLOT, 0.0};
    c->count = c->timed = 0;
    c->weight = 0.0;
    c->epoch++;
    return chain;
}

/* Takes out the next entry to go; there must be one. */
static int32_t evict(wf_cache *c, double now, int32_t chain)
{
    int32_t slot = wf_cache_victim(c, now);
    if (c->entries[slot].expires <= now)
        c->expirations++;
    else {
        c->evictions++;
        wf_cache_remember(c, slot);
    }
    return wf_cache_unlink(c, slot, chain);
}

int wf_cache_find_room(wf_cache *c, double weight, double now, int32_t *chain)
{
    while (c->weight + weight > c->max_weight && wf_cache_expired(c, now) != WF_NO_SLOT)
        *chain = evict(c, now, *chain);
    if (c->weight - c->guesses.weight + weight > c->max_weight)
        return 0;
    while (c->weight + weight > c->max_weight && c->guesses.oldest != WF_NO_SLOT)
        *chain = evict(c, now, *chain);
    return c->weight + weight <= c->max_weight;
}

int32_t wf_cache_make_room(wf_cache *c, double weight, double now, int32_t chain)
{
    while (c->weight + weight > c->max_weight) {
        if (c->window.oldest == WF_NO_SLOT && c->main.oldest == WF_NO_SLOT && c->guesses.oldest == WF_NO_SLOT) {
            c->weight = 0.0; /* a rounding error was all that was left */
            break;
        }
        chain = evict(c, now, chain);
    }
    return chain;
}

int32_t wf_cache_shed(wf_cache *c, double bound, int32_t most, double now)
{
    int32_t chain = WF_NO_SLOT;
    uint32_t shadows = c->shadows;
    while (most-- > 0 && c->count && c->weight > bound && c->shadows == shadows)
        chain = evict(c, now, chain);
    return chain;
}

int32_t wf_cache_reweigh(wf_cache *c, int32_t slot, double weight, double now)
{
    wf_entry *entry = &c->entries[slot];
    int main = entry->main;
    wf_cache_leave(c, slot);
    c->weight -= entry->weight;
    int32_t leaving = wf_cache_make_room(c, weight, now, WF_NO_SLOT);
    entry->weight = weight;
    c->weight += weight;
    wf_cache_enter(c, slot, main);
    return leaving;
}
