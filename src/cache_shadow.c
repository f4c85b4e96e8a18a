#include "cache_shadow.h"

#include <stdlib.h>
#include <string.h>

#define NONE (-1)
#define GHOSTS 2       /* for each entry of a shadow: others remembered */
#define LIFETIMES 10   /* uses count half after so many accesses for each entry of a shadow */
#define PARTS 4        /* judgements in a round */
#define DECAY 0.975    /* of the scores from one judgement to the next */
#define MARGIN 0.005   /* of the accesses that a score covers: a lead below it is noise */
#define FAST_DECAY 0.7 /* as DECAY, for what happened lately */
#define LEAST 8        /* judgements taken for seen from the start, so that the first do not mislead */
#define LEAST_SAMPLED 24 /* the same where only a sample of the keys is seen */
#define CHANGE 0.2     /* of the accesses of late: a lead above it is another time */

const wf_arm WF_ARM[WF_ARMS] = {
    {0.01, 1, 0, 0}, {0.05, 1, 1, 0}, {0.2, 1, 1, 0}, {0.2, 0, 0, 1}, {1.0, 0, 0, 0}, {0.05, 0, 1, 0},
};

typedef struct {
    uint32_t tag, last;
    uint8_t uses, credit;   /* credit: hits that count for the arm with a clock */
    uint8_t resident, main; /* a bit for each arm */
    int16_t newer[WF_ARMS + 1], older[WF_ARMS + 1]; /* in the queues of each arm; at WF_ARMS: among the ghosts */
} node;

typedef struct {
    int32_t newest, oldest, count;
} queue;

struct wf_shadow {
    int32_t capacity, most, made, free, period, left, least, arm;
    uint32_t now, mask;
    queue window[WF_ARMS], main[WF_ARMS], ghosts;
    int32_t windows[WF_ARMS]; /* how many each arm's window holds */
    uint32_t hits[WF_ARMS];
    double score[WF_ARMS], late[WF_ARMS], seen, lately; /* hits and accesses, the older the less */
    node *nodes;              /* grows to `most`; their links are 16 bits wide */
    int16_t *index;           /* over tags: open addressing, at most half full */
};

static void enter(wf_shadow *s, int arm, queue *q, int32_t x)
{
    s->nodes[x].older[arm] = (int16_t)q->newest;
    s->nodes[x].newer[arm] = NONE;
    if (q->newest == NONE)
        q->oldest = x;
    else
        s->nodes[q->newest].newer[arm] = (int16_t)x;
    q->newest = x;
    q->count++;
}

static void leave(wf_shadow *s, int arm, queue *q, int32_t x)
{
    int16_t newer = s->nodes[x].newer[arm], older = s->nodes[x].older[arm];
    if (newer == NONE)
        q->newest = older;
    else
        s->nodes[newer].older[arm] = older;
    if (older == NONE)
        q->oldest = newer;
    else
        s->nodes[older].newer[arm] = newer;
    q->count--;
}

static uint32_t home(const wf_shadow *s, uint32_t tag)
{
    return (tag * 0x9E3779B1u >> 7) & s->mask;
}

static int32_t find(const wf_shadow *s, uint32_t tag)
{
    uint32_t at = home(s, tag);
    while (s->index[at] != NONE && s->nodes[s->index[at]].tag != tag)
        at = (at + 1) & s->mask;
    return s->index[at];
}

static void forget(wf_shadow *s, int32_t x)
{
    uint32_t at = home(s, s->nodes[x].tag), hole;
    while (s->index[at] != x)
        at = (at + 1) & s->mask;
    for (hole = at; ; ) {
        at = (at + 1) & s->mask;
        int16_t y = s->index[at];
        if (y == NONE)
            break;
        if (((at - home(s, s->nodes[y].tag)) & s->mask) >= ((at - hole) & s->mask)) {
            s->index[hole] = y;
            hole = at;
        }
    }
    s->index[hole] = NONE;
    s->nodes[x].newer[WF_ARMS] = (int16_t)s->free;
    s->free = x;
}

/* Returns a node without a place in any queue; the oldest ghost gives its own where there are enough. */
static int32_t fresh(wf_shadow *s)
{
    if (s->free == NONE && s->ghosts.count < GHOSTS * s->capacity && s->made < s->most) {
        int32_t more = s->made + s->made / 2 + 64 < s->most ? s->made + s->made / 2 + 64 : s->most;
        node *grown = realloc(s->nodes, (size_t)more * sizeof *grown);
        if (grown != NULL) {
            s->nodes = grown;
            while (s->made < more) {
                grown[s->made].newer[WF_ARMS] = (int16_t)s->free;
                s->free = s->made++;
            }
        }
    }
    if (s->free == NONE || s->ghosts.count >= GHOSTS * s->capacity) {
        int32_t oldest = s->ghosts.oldest;
        if (oldest == NONE)
            return NONE;
        leave(s, WF_ARMS, &s->ghosts, oldest);
        forget(s, oldest);
    }
    int32_t x = s->free;
    s->free = s->nodes[x].newer[WF_ARMS];
    return x;
}

static int32_t learn(wf_shadow *s, uint32_t tag)
{
    int32_t x = fresh(s);
    if (x == NONE)
        return NONE;
    s->nodes[x].tag = tag;
    s->nodes[x].uses = s->nodes[x].resident = s->nodes[x].main = 0;
    uint32_t at = home(s, tag);
    while (s->index[at] != NONE)
        at = (at + 1) & s->mask;
    s->index[at] = (int16_t)x;
    return x;
}

static uint32_t worth(const wf_shadow *s, int32_t x)
{
    uint32_t halvings = (s->now - s->nodes[x].last) / (LIFETIMES * (uint32_t)s->capacity);
    return halvings > 4 ? 0 : (uint32_t)s->nodes[x].uses >> halvings;
}

/* Moves the oldest of one queue of `arm` to the front of its other. */
static void pass_on(wf_shadow *s, int arm, queue *from, queue *to, int32_t x)
{
    leave(s, arm, from, x);
    s->nodes[x].main ^= (uint8_t)(1 << arm);
    enter(s, arm, to, x);
}

static void gone(wf_shadow *s, int arm, int32_t x)
{
    s->nodes[x].resident &= (uint8_t)~(1 << arm);
    if (!s->nodes[x].resident)
        enter(s, WF_ARMS, &s->ghosts, x);
}

static void evict(wf_shadow *s, int arm)
{
    queue *window = &s->window[arm], *main = &s->main[arm];
    int32_t out = window->oldest, rival = main->oldest;
    if (WF_ARM[arm].frequency && rival != NONE && worth(s, out) > worth(s, rival)) {
        pass_on(s, arm, window, main, out);
        leave(s, arm, main, rival);
        out = rival;
    } else
        leave(s, arm, window, out);
    gone(s, arm, out);
}

static void evict_by_clock(wf_shadow *s, int arm)
{
    queue *window = &s->window[arm], *main = &s->main[arm];
    for (;;) {
        int small = window->count > s->windows[arm] || main->count == 0;
        int32_t out = small ? window->oldest : main->oldest;
        uint8_t credit = s->nodes[out].credit;
        if (credit <= (small ? 1 : 0)) {
            leave(s, arm, small ? window : main, out);
            gone(s, arm, out);
            return;
        }
        s->nodes[out].credit = small ? 0 : credit - 1;
        leave(s, arm, small ? window : main, out);
        s->nodes[out].main |= (uint8_t)(1 << arm);
        enter(s, arm, main, out);
    }
}

static int step_by_clock(wf_shadow *s, int arm, int32_t x, int known)
{
    uint8_t bit = (uint8_t)(1 << arm);
    if (s->nodes[x].resident & bit) {
        s->nodes[x].credit += s->nodes[x].credit < 3;
        return 1;
    }
    queue *window = &s->window[arm], *main = &s->main[arm];
    int up = known || (window->count >= s->windows[arm] && main->count < s->capacity - s->windows[arm]);
    s->nodes[x].credit = 0;
    s->nodes[x].resident |= bit;
    s->nodes[x].main = (uint8_t)((s->nodes[x].main & ~bit) | (up ? bit : 0));
    enter(s, arm, up ? main : window, x);
    if (window->count + main->count > s->capacity)
        evict_by_clock(s, arm);
    return 0;
}

/* One access in one arm; `last` is the time of the one before, if it is `known`. Returns whether it hit. */
static int step(wf_shadow *s, int arm, int32_t x, uint32_t last, int known)
{
    queue *window = &s->window[arm], *main = &s->main[arm];
    uint8_t bit = (uint8_t)(1 << arm);
    int32_t most = s->capacity - s->windows[arm];
    int hit = (s->nodes[x].resident & bit) != 0;
    int hot = hit && s->nodes[x].main & bit;
    if (hit)
        leave(s, arm, hot ? main : window, x);
    hot = hot || (known && WF_ARM[arm].recency && main->count && (int32_t)(last - s->nodes[main->oldest].last) > 0);
    s->nodes[x].resident |= bit;
    s->nodes[x].main = (uint8_t)((s->nodes[x].main & ~bit) | (hot ? bit : 0));
    enter(s, arm, hot ? main : window, x);
    if (main->count > most)
        pass_on(s, arm, main, window, main->oldest);
    if (window->count > s->windows[arm] && main->count < most)
        pass_on(s, arm, window, main, window->oldest);
    if (window->count + main->count > s->capacity)
        evict(s, arm);
    return hit;
}

static int best(const wf_shadow *s, const double *score)
{
    int leader = s->arm;
    for (int arm = 0; arm < WF_ARMS; arm++)
        if (score[arm] > score[leader])
            leader = arm;
    return leader;
}

/* A long memory tells small differences apart; a short one sees that another time has begun, and clears the long. */
static void judge(wf_shadow *s)
{
    s->seen = s->seen * DECAY + s->period;
    s->lately = s->lately * FAST_DECAY + s->period;
    for (int arm = 0; arm < WF_ARMS; arm++) {
        s->score[arm] = s->score[arm] * DECAY + s->hits[arm];
        s->late[arm] = s->late[arm] * FAST_DECAY + s->hits[arm];
        s->hits[arm] = 0;
    }
    if (s->late[best(s, s->late)] - s->late[s->arm] > CHANGE * s->lately) {
        memcpy(s->score, s->late, sizeof s->score);
        s->seen = s->lately;
    }
    int leader = best(s, s->score);
    if (s->score[leader] - s->score[s->arm] > MARGIN * (s->seen + s->least * s->period))
        s->arm = leader;
    s->left = s->period;
}

static void see(wf_shadow *s, uint32_t tag, int counts)
{
    int32_t x = find(s, tag);
    int known = x != NONE;
    s->now++;
    if (!known && (x = learn(s, tag)) == NONE)
        return;
    node *n = &s->nodes[x];
    uint32_t last = n->last, uses = known ? worth(s, x) : 0;
    n->uses = (uint8_t)(uses < 15 ? uses + 1 : 15);
    n->last = s->now;
    if (known && !n->resident)
        leave(s, WF_ARMS, &s->ghosts, x);
    for (int arm = 0; arm < WF_ARMS; arm++)
        s->hits[arm] += (uint32_t)((WF_ARM[arm].clock ? step_by_clock(s, arm, x, known)
                                                      : step(s, arm, x, last, known)) && counts);
}

wf_shadow *wf_shadow_new(int32_t capacity, int arm, int sampled)
{
    wf_shadow *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->capacity = capacity;
    s->most = (WF_ARMS + GHOSTS) * capacity + 2;
    s->period = s->left = capacity > 32 * PARTS ? capacity / PARTS : 32;
    s->arm = arm;
    s->least = sampled ? LEAST_SAMPLED : LEAST;
    s->free = NONE;
    for (s->mask = 15; s->mask < 2 * (uint32_t)s->most; )
        s->mask = 2 * s->mask + 1;
    for (int each = 0; each < WF_ARMS; each++) {
        int32_t share = (int32_t)(WF_ARM[each].window * capacity + 0.5);
        s->windows[each] = share < 1 ? 1 : share;
        s->window[each] = s->main[each] = (queue){NONE, NONE, 0};
    }
    s->ghosts = (queue){NONE, NONE, 0};
    s->index = malloc(((size_t)s->mask + 1) * sizeof *s->index);
    if (s->index == NULL) {
        free(s);
        return NULL;
    }
    memset(s->index, 0xFF, ((size_t)s->mask + 1) * sizeof *s->index);
    return s;
}

void wf_shadow_free(wf_shadow *s)
{
    if (s != NULL) {
        free(s->nodes);
        free(s->index);
        free(s);
    }
}

int32_t wf_shadow_capacity(const wf_shadow *s)
{
    return s->capacity;
}

size_t wf_shadow_bytes(const wf_shadow *s)
{
    return sizeof *s + (size_t)s->made * sizeof *s->nodes + ((size_t)s->mask + 1) * sizeof *s->index;
}

void wf_shadow_seed(wf_shadow *s, uint32_t tag)
{
    see(s, tag, 0);
}

int wf_shadow_access(wf_shadow *s, uint32_t tag)
{
    see(s, tag, 1);
    if (--s->left == 0)
        judge(s);
    return s->arm;
}
