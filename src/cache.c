#include "cache.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SMALLEST 8u /* slots of the index at first, and of each growth */
#define MOST INT32_MAX

static void enter_index(wf_cache *c, int32_t slot)
{
    uint32_t at = c->entries[slot].tag >> c->shift;
    while (c->index[at] != WF_NO_SLOT)
        at = (at + 1) & c->mask;
    c->index[at] = slot;
}

/* Takes a slot out; what follows in its run and may stand nearer to its home moves up, so there are no tombstones. */
static void leave_index(wf_cache *c, int32_t slot)
{
    uint32_t at = c->entries[slot].tag >> c->shift, hole, home;
    while (c->index[at] != slot)
        at = (at + 1) & c->mask;
    for (hole = at; ; ) {
        at = (at + 1) & c->mask;
        slot = c->index[at];
        if (slot == WF_NO_SLOT)
            break;
        home = c->entries[slot].tag >> c->shift;
        if (((at - home) & c->mask) >= ((at - hole) & c->mask)) {
            c->index[hole] = slot;
            hole = at;
        }
    }
    c->index[hole] = WF_NO_SLOT;
}

static int new_index(wf_cache *c, uint64_t size)
{
    int32_t *grown = malloc(size * sizeof *grown);
    if (grown == NULL)
        return -1;
    memset(grown, 0xFF, size * sizeof *grown);
    free(c->index);
    c->index = grown;
    c->mask = (uint32_t)(size - 1);
    for (c->shift = 32; size > 1; size >>= 1)
        c->shift--;
    for (int32_t slot = c->oldest; slot != WF_NO_SLOT; slot = c->entries[slot].newer)
        enter_index(c, slot);
    c->epoch++;
    return 0;
}

static int more_entries(wf_cache *c)
{
    if (c->capacity > MOST - (c->capacity >> 1) - (int32_t)SMALLEST)
        return -1;
    int32_t larger = c->capacity + (c->capacity >> 1) + (int32_t)SMALLEST;
    wf_entry *grown = realloc(c->entries, (size_t)larger * sizeof *grown);
    if (grown == NULL)
        return -1;
    c->entries = grown;
    for (int32_t slot = larger - 1; slot >= c->capacity; slot--)
        wf_cache_release(c, slot);
    c->capacity = larger;
    return 0;
}

int wf_cache_begin(wf_cache *c)
{
    memset(c, 0, sizeof *c);
    c->free = c->newest = c->oldest = c->hand = WF_NO_SLOT;
    return new_index(c, SMALLEST);
}

int wf_cache_reserve(wf_cache *c)
{
    uint64_t size = (uint64_t)c->mask + 1;
    if (c->free == WF_NO_SLOT && more_entries(c) < 0)
        return -1;
    return 2 * ((uint64_t)c->count + 1) > size ? new_index(c, 2 * size) : 0;
}

void wf_cache_release(wf_cache *c, int32_t slot)
{
    c->entries[slot].key = c->entries[slot].value = NULL;
    c->entries[slot].newer = c->free;
    c->free = slot;
}

void wf_cache_insert(wf_cache *c, void *key, void *value, uint32_t tag, double weight, double expires)
{
    int32_t slot = c->free;
    c->free = c->entries[slot].newer;
    c->entries[slot] = (wf_entry){key, value, weight, expires, tag, 0, WF_NO_SLOT, c->newest};
    if (c->newest == WF_NO_SLOT)
        c->oldest = slot;
    else
        c->entries[c->newest].newer = slot;
    c->newest = slot;
    enter_index(c, slot);
    c->weight += weight;
    c->count++;
    c->timed += expires != INFINITY;
    c->epoch++;
}

int32_t wf_cache_unlink(wf_cache *c, int32_t slot, int32_t chain)
{
    wf_entry *entry = &c->entries[slot];
    leave_index(c, slot);
    if (entry->newer == WF_NO_SLOT)
        c->newest = entry->older;
    else
        c->entries[entry->newer].older = entry->older;
    if (entry->older == WF_NO_SLOT)
        c->oldest = entry->newer;
    else
        c->entries[entry->older].newer = entry->newer;
    if (c->hand == slot)
        c->hand = entry->newer;
    c->timed -= entry->expires != INFINITY;
    c->count--;
    c->weight = c->count ? c->weight - entry->weight : 0.0; /* no rounding error outlives its entries */
    c->epoch++;
    entry->older = chain;
    return slot;
}

int32_t wf_cache_unlink_all(wf_cache *c)
{
    int32_t chain = c->newest;
    memset(c->index, 0xFF, ((size_t)c->mask + 1) * sizeof *c->index);
    c->newest = c->oldest = c->hand = WF_NO_SLOT;
    c->count = c->timed = 0;
    c->weight = 0.0;
    c->epoch++;
    return chain;
}

/* SIEVE: the next entry to go; there must be one other than `spared`. */
static int32_t victim(wf_cache *c, int32_t spared, double now)
{
    for (int32_t slot = c->hand; ; slot = c->entries[slot].newer) {
        if (slot == WF_NO_SLOT)
            slot = c->oldest;
        wf_entry *entry = &c->entries[slot];
        if (slot == spared)
            continue;
        if (!entry->visited || entry->expires <= now) {
            c->hand = slot; /* unlinking it moves the hand on */
            return slot;
        }
        entry->visited = 0;
    }
}

int32_t wf_cache_make_room(wf_cache *c, double weight, int32_t spared, double now, int32_t chain)
{
    while (c->weight + weight > c->max_weight) {
        if (c->count == (spared != WF_NO_SLOT)) {
            c->weight = 0.0; /* a rounding error was all that was left */
            break;
        }
        int32_t slot = victim(c, spared, now);
        if (c->entries[slot].expires <= now)
            c->expirations++;
        else
            c->evictions++;
        chain = wf_cache_unlink(c, slot, chain);
    }
    return chain;
}

int32_t wf_cache_reweigh(wf_cache *c, int32_t slot, double weight, double now)
{
    c->weight -= c->entries[slot].weight;
    c->entries[slot].weight = 0.0;
    int32_t leaving = wf_cache_make_room(c, weight, slot, now, WF_NO_SLOT);
    c->entries[slot].weight = weight;
    c->weight += weight;
    return leaving;
}
