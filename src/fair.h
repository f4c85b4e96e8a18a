/* The structure of a fair queue: what waits, whose it is, and whose turn is next. It knows no Python: items and users
 * are pointers that it neither compares nor counts. See pyx/_fair.pyx for the algorithm. */
#ifndef WHISPER_FAST_FAIR_H
#define WHISPER_FAST_FAIR_H

#include <stdint.h>

#define WF_NOBODY (-1)
#define WF_LEVELS 201      /* priorities from -100 to 100 */
#define WF_PATIENCE 16     /* items that may pass by a level that waits */
#define WF_DEBTORS 65536   /* users without a waiting item whose counter a level remembers at most */

typedef struct {
    void *item;            /* NULL: free, and `later` names the next free one */
    double charge;         /* cost / weight */
    uint32_t generation;   /* counts the uses of this place: an old handle does not fit any more */
    int32_t flow;
    int32_t before, after; /* in its flow */
    int32_t sooner, later; /* in order of arrival, over all flows */
} wf_waiter;

typedef struct {
    void *user;
    double counter;        /* the start tag of its next item */
    uint64_t order;        /* among equal counters the smaller one is first */
    int32_t level, place;  /* place in the heap of its level */
    int32_t first, last;   /* its entries; first is WF_NOBODY: it is idle. Free: `last` names the next free one */
} wf_flow;

typedef struct {
    int32_t *at;
    int32_t size, capacity;
} wf_heap;

typedef struct {
    wf_heap waiting, idle; /* flows by (counter, order) */
    double clock;          /* the start tag of what was served last */
    uint64_t served;       /* when it was served last or began to wait, counted in pops */
    int32_t count;         /* entries */
} wf_level;

typedef struct {
    wf_waiter *entries;
    wf_flow *flows;
    wf_level *levels[WF_LEVELS];
    int32_t busy[WF_LEVELS]; /* the levels that wait, in order */
    int32_t busy_count;
    int32_t entry_capacity, free_entry, flow_capacity, free_flow, flow_count;
    int32_t count, oldest, newest;
    uint64_t orders, pops;
} wf_fair;

void wf_fair_begin(wf_fair *q);
void wf_fair_end(wf_fair *q);

/* Makes room for one more flow and entry in `level`, which exists afterwards; -1: no memory. */
int wf_fair_reserve(wf_fair *q, int32_t level);

/* Returns a new idle flow of `user` at `counter`. */
int32_t wf_fair_open(wf_fair *q, void *user, int32_t level, double counter);

/* Gives an idle flow back. */
void wf_fair_close(wf_fair *q, int32_t flow);

/* Returns an idle flow of `level` that need not be remembered, or WF_NOBODY. */
int32_t wf_fair_forgettable(const wf_fair *q, int32_t level);

/* Appends to a flow; returns the entry. */
int32_t wf_fair_append(wf_fair *q, int32_t flow, void *item, double charge);

/* Returns the entry whose turn it is, or WF_NOBODY. */
int32_t wf_fair_next(const wf_fair *q);

/* Charges the flow of the entry for it, as the one that is served now. */
void wf_fair_serve(wf_fair *q, int32_t flow, double charge);

/* Takes an entry out; its flow stays, idle if it was the last. */
void wf_fair_remove(wf_fair *q, int32_t entry);

/* Moves a flow's counter, never below its level's clock. */
void wf_fair_charge(wf_fair *q, int32_t flow, double amount);

#endif
