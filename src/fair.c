#include "fair.h"

#include <stdlib.h>
#include <string.h>

#define SMALLEST 16

/* ---- heaps of flows */

static int precedes(const wf_flow *a, const wf_flow *b)
{
    return a->counter < b->counter || (a->counter == b->counter && a->order < b->order);
}

static void put(wf_fair *q, wf_heap *h, int32_t flow, int32_t place)
{
    h->at[place] = flow;
    q->flows[flow].place = place;
}

static void rise(wf_fair *q, wf_heap *h, int32_t flow, int32_t place)
{
    while (place > 0) {
        int32_t parent = h->at[(place - 1) >> 1];
        if (!precedes(&q->flows[flow], &q->flows[parent]))
            break;
        put(q, h, parent, place);
        place = (place - 1) >> 1;
    }
    put(q, h, flow, place);
}

static void sink(wf_fair *q, wf_heap *h, int32_t flow, int32_t place)
{
    for (;;) {
        int32_t child = 2 * place + 1;
        if (child >= h->size)
            break;
        if (child + 1 < h->size && precedes(&q->flows[h->at[child + 1]], &q->flows[h->at[child]]))
            child++;
        if (!precedes(&q->flows[h->at[child]], &q->flows[flow]))
            break;
        put(q, h, h->at[child], place);
        place = child;
    }
    put(q, h, flow, place);
}

static void settle(wf_fair *q, wf_heap *h, int32_t flow)
{
    int32_t place = q->flows[flow].place;
    if (place > 0 && precedes(&q->flows[flow], &q->flows[h->at[(place - 1) >> 1]]))
        rise(q, h, flow, place);
    else
        sink(q, h, flow, place);
}

static void enter(wf_fair *q, wf_heap *h, int32_t flow)
{
    q->flows[flow].order = q->orders++;
    rise(q, h, flow, h->size++);
}

static void depart(wf_fair *q, wf_heap *h, int32_t flow)
{
    int32_t place = q->flows[flow].place, last = h->at[--h->size];
    if (last != flow) {
        put(q, h, last, place);
        settle(q, h, last);
    }
}

static wf_heap *heap_of(wf_fair *q, int32_t flow)
{
    wf_level *level = q->levels[q->flows[flow].level];
    return q->flows[flow].first == WF_NOBODY ? &level->idle : &level->waiting;
}

/* ---- memory */

static int grow(void **array, int32_t *capacity, size_t size)
{
    if (*capacity > INT32_MAX / 2 - SMALLEST)
        return -1;
    int32_t larger = *capacity + (*capacity >> 1) + SMALLEST;
    void *grown = realloc(*array, (size_t)larger * size);
    if (grown == NULL)
        return -1;
    *array = grown;
    *capacity = larger;
    return 0;
}

static int more_entries(wf_fair *q)
{
    int32_t old = q->entry_capacity;
    if (grow((void **)&q->entries, &q->entry_capacity, sizeof *q->entries))
        return -1;
    for (int32_t at = q->entry_capacity - 1; at >= old; at--) {
        q->entries[at] = (wf_waiter){.item = NULL, .generation = 0, .later = q->free_entry};
        q->free_entry = at;
    }
    return 0;
}

static int more_flows(wf_fair *q)
{
    int32_t old = q->flow_capacity;
    if (grow((void **)&q->flows, &q->flow_capacity, sizeof *q->flows))
        return -1;
    for (int32_t at = q->flow_capacity - 1; at >= old; at--) {
        q->flows[at].last = q->free_flow;
        q->free_flow = at;
    }
    return 0;
}

/* Room for every flow of the level: an idle one becomes a waiting one, and back, without asking for memory. */
static int more_places(wf_level *level)
{
    int32_t flows = level->waiting.size + level->idle.size;
    if (flows >= level->waiting.capacity
        && grow((void **)&level->waiting.at, &level->waiting.capacity, sizeof *level->waiting.at))
        return -1;
    if (flows >= level->idle.capacity && grow((void **)&level->idle.at, &level->idle.capacity, sizeof *level->idle.at))
        return -1;
    return 0;
}

void wf_fair_begin(wf_fair *q)
{
    memset(q, 0, sizeof *q);
    q->free_entry = q->free_flow = q->oldest = q->newest = WF_NOBODY;
}

void wf_fair_end(wf_fair *q)
{
    for (int level = 0; level < WF_LEVELS; level++) {
        if (q->levels[level] == NULL)
            continue;
        free(q->levels[level]->waiting.at);
        free(q->levels[level]->idle.at);
        free(q->levels[level]);
    }
    free(q->entries);
    free(q->flows);
    wf_fair_begin(q);
}

int wf_fair_reserve(wf_fair *q, int32_t level)
{
    if (q->levels[level] == NULL && (q->levels[level] = calloc(1, sizeof(wf_level))) == NULL)
        return -1;
    if (q->free_entry == WF_NOBODY && more_entries(q))
        return -1;
    if (q->free_flow == WF_NOBODY && more_flows(q))
        return -1;
    return more_places(q->levels[level]);
}

/* ---- flows */

int32_t wf_fair_open(wf_fair *q, void *user, int32_t level, double counter)
{
    int32_t flow = q->free_flow;
    q->free_flow = q->flows[flow].last;
    q->flow_count++;
    q->flows[flow] = (wf_flow){
        .user = user, .counter = counter, .level = level, .first = WF_NOBODY, .last = WF_NOBODY};
    enter(q, &q->levels[level]->idle, flow);
    return flow;
}

void wf_fair_close(wf_fair *q, int32_t flow)
{
    depart(q, &q->levels[q->flows[flow].level]->idle, flow);
    q->flows[flow].last = q->free_flow;
    q->free_flow = flow;
    q->flow_count--;
}

int32_t wf_fair_forgettable(const wf_fair *q, int32_t level)
{
    const wf_level *l = q->levels[level];
    if (l->idle.size == 0)
        return WF_NOBODY;
    int32_t flow = l->idle.at[0];
    return q->flows[flow].counter <= l->clock || l->idle.size > WF_DEBTORS ? flow : WF_NOBODY;
}

void wf_fair_serve(wf_fair *q, int32_t flow, double charge)
{
    wf_flow *f = &q->flows[flow];
    wf_level *level = q->levels[f->level];
    if (f->counter > level->clock)
        level->clock = f->counter;
    level->served = ++q->pops;
    f->counter += charge;
    f->order = q->orders++;
    settle(q, heap_of(q, flow), flow);
}

void wf_fair_charge(wf_fair *q, int32_t flow, double amount)
{
    wf_flow *f = &q->flows[flow];
    double clock = q->levels[f->level]->clock;
    f->counter = f->counter + amount > clock ? f->counter + amount : clock;
    settle(q, heap_of(q, flow), flow);
}

/* ---- entries */

static void begin_waiting(wf_fair *q, int32_t level)
{
    int32_t at = q->busy_count++;
    for (; at > 0 && q->busy[at - 1] > level; at--)
        q->busy[at] = q->busy[at - 1];
    q->busy[at] = level;
    q->levels[level]->served = q->pops;
}

static void end_waiting(wf_fair *q, int32_t level)
{
    int32_t at = 0;
    while (q->busy[at] != level)
        at++;
    for (q->busy_count--; at < q->busy_count; at++)
        q->busy[at] = q->busy[at + 1];
}

static void link_into_flow(wf_fair *q, int32_t entry, int32_t flow)
{
    wf_flow *f = &q->flows[flow];
    wf_level *level = q->levels[f->level];
    q->entries[entry].before = f->last;
    q->entries[entry].after = WF_NOBODY;
    if (f->first != WF_NOBODY) {
        q->entries[f->last].after = entry;
    } else {
        depart(q, &level->idle, flow);
        f->first = entry;
        enter(q, &level->waiting, flow);
    }
    f->last = entry;
    if (level->count++ == 0)
        begin_waiting(q, f->level);
}

int32_t wf_fair_append(wf_fair *q, int32_t flow, void *item, double charge)
{
    int32_t entry = q->free_entry;
    wf_waiter *e = &q->entries[entry];
    q->free_entry = e->later;
    e->item = item;
    e->charge = charge;
    e->flow = flow;
    e->sooner = q->newest;
    e->later = WF_NOBODY;
    if (q->newest == WF_NOBODY)
        q->oldest = entry;
    else
        q->entries[q->newest].later = entry;
    q->newest = entry;
    q->count++;
    link_into_flow(q, entry, flow);
    return entry;
}

int32_t wf_fair_next(const wf_fair *q)
{
    if (q->busy_count == 0)
        return WF_NOBODY;
    int32_t chosen = q->busy[0];
    uint64_t longest = WF_PATIENCE - 1;
    for (int32_t at = 1; at < q->busy_count; at++) {
        uint64_t passed = q->pops - q->levels[q->busy[at]]->served;
        if (passed > longest) {
            longest = passed;
            chosen = q->busy[at];
        }
    }
    return q->flows[q->levels[chosen]->waiting.at[0]].first;
}

static void unlink_from_flow(wf_fair *q, const wf_waiter *e)
{
    wf_flow *f = &q->flows[e->flow];
    wf_level *level = q->levels[f->level];
    if (e->after != WF_NOBODY)
        q->entries[e->after].before = e->before;
    else
        f->last = e->before;
    if (e->before != WF_NOBODY)
        q->entries[e->before].after = e->after;
    else if (e->after != WF_NOBODY)
        f->first = e->after;
    else {
        depart(q, &level->waiting, e->flow);
        f->first = WF_NOBODY;
        enter(q, &level->idle, e->flow);
    }
    if (--level->count == 0)
        end_waiting(q, f->level);
}

void wf_fair_remove(wf_fair *q, int32_t entry)
{
    wf_waiter *e = &q->entries[entry];
    unlink_from_flow(q, e);
    if (e->sooner != WF_NOBODY)
        q->entries[e->sooner].later = e->later;
    else
        q->oldest = e->later;
    if (e->later != WF_NOBODY)
        q->entries[e->later].sooner = e->sooner;
    else
        q->newest = e->sooner;
    e->item = NULL;
    e->generation++;
    e->later = q->free_entry;
    q->free_entry = entry;
    q->count--;
}
