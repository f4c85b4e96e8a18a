/* Which entry goes: guesses, a window and a main queue, ghosts of what was evicted, the arm that the shadows chose. */
#include "cache.h"

#include <string.h>

#define WAYS 8            /* ghosts in one bucket */
#define USES_SHIFT 16     /* a ghost: 12 bits of the tag (never 0 together with uses), 4 of uses, 16 of time */
#define SAMPLE 512        /* entries of a shadow at most */
#define CREDIT 3          /* rounds that the clock grants at most */
#define ROUNDS 64         /* entries that one eviction by the clock passes at most */
#define FEWEST 4          /* a cache of fewer entries has no shadow */
#define LAZY 32           /* an entry moves at most once in so many parts of a round through the cache */
#define SEEDS 1024        /* of a queue's entries, the newest, that a new shadow may learn from: a walk through more takes long */
#define MOVES 16          /* entries that an eviction moves between the queues at most */

static double window_most(const wf_cache *c)
{
    return WF_ARM[c->arm].window * c->max_weight;
}

static double main_most(const wf_cache *c)
{
    return c->max_weight - window_most(c);
}

static uint32_t mixed(uint32_t tag)
{
    tag *= 0x85EBCA6Bu;
    return tag ^ tag >> 15;
}

static uint32_t worth(const wf_cache *c, const wf_entry *entry)
{
    uint32_t halvings = (c->now - entry->last) >> c->life;
    return halvings > 4 ? 0 : (uint32_t)entry->uses >> halvings;
}

static void use(wf_cache *c, wf_entry *entry, uint32_t before)
{
    entry->uses = before < 15 ? before + 1 : 15;
    entry->last = c->now;
}

/* ---- ghosts */

static uint32_t *bucket(const wf_cache *c, uint32_t tag)
{
    return c->ghosts + WAYS * ((uint64_t)tag * c->buckets >> WF_TAG_BITS);
}

static uint32_t age(const wf_cache *c, uint32_t ghost)
{
    return ((c->now >> c->tick) - ghost) & 0xFFFF;
}

void wf_cache_remember(wf_cache *c, int32_t slot)
{
    const wf_entry *entry = &c->entries[slot];
    if (c->ghosts == NULL || entry->uses == 0)
        return;
    uint32_t *ghost = bucket(c, entry->tag), *oldest = ghost;
    for (int way = 0; way < WAYS; way++) {
        if (ghost[way] == 0 || age(c, ghost[way]) > age(c, *oldest))
            oldest = &ghost[way];
        if (*oldest == 0)
            break;
    }
    uint32_t uses = worth(c, entry);
    *oldest = mixed(entry->tag) >> 20 << 20 | (uses ? uses : 1) << USES_SHIFT | (entry->last >> c->tick & 0xFFFF);
}

/* Returns the ghost of `tag`, which it takes away, or 0. */
static uint32_t recall(wf_cache *c, uint32_t tag)
{
    if (c->ghosts == NULL)
        return 0;
    uint32_t *ghost = bucket(c, tag), piece = mixed(tag) >> 20;
    for (int way = 0; way < WAYS; way++)
        if (ghost[way] != 0 && ghost[way] >> 20 == piece) {
            uint32_t found = ghost[way];
            ghost[way] = 0;
            return found;
        }
    return 0;
}

/* ---- shadows */

/* Shows the shadow the newest of a queue, the oldest of them first. */
static void seed(wf_cache *c, const wf_queue *queue)
{
    uint32_t tags[SEEDS];
    int count = 0, left = SEEDS;
    for (int32_t slot = queue->newest; slot != WF_NO_SLOT && left-- > 0; slot = c->entries[slot].older)
        if (!(mixed(c->entries[slot].tag) & c->unsampled))
            tags[count++] = c->entries[slot].tag;
    while (count-- > 0)
        wf_shadow_seed(c->shadow, tags[count]);
}

/* At the first eviction, and again when the entries have become much fewer or more. */
static void begin_shadow(wf_cache *c)
{
    int64_t capacity = c->count;
    for (c->unsampled = 0; capacity > SAMPLE; capacity = (capacity + 1) / 2)
        c->unsampled = 2 * c->unsampled + 1;
    c->shadows++;
    wf_shadow_free(c->shadow);
    c->shadow = wf_shadow_new((int32_t)capacity, c->arm, c->unsampled != 0);
    if (c->shadow != NULL) {
        seed(c, &c->main);
        seed(c, &c->window);
    }
}

static void tune(wf_cache *c)
{
    int log = 0;
    while (c->count >> log > 1)
        log++;
    c->tick = log > 8 ? log - 8 : 0;
    c->life = log + 4;
    c->lazy = (uint32_t)c->count / LAZY;
}

static void watch(wf_cache *c)
{
    if (c->count < FEWEST)
        return;
    double held = c->shadow == NULL ? 0.0 : (double)wf_shadow_capacity(c->shadow) * (c->unsampled + 1.0);
    if (held > c->count / 1.5 && held < c->count * 1.5)
        return;
    tune(c);
    begin_shadow(c);
}

static void see(wf_cache *c, uint32_t tag)
{
    c->now++;
    if (c->shadow != NULL && !(mixed(tag) & c->unsampled))
        c->arm = wf_shadow_access(c->shadow, tag);
}

/* ---- queues */

static wf_queue *queue_of(wf_cache *c, const wf_entry *entry)
{
    return entry->uses == 0 ? &c->guesses : entry->main ? &c->main : &c->window;
}

void wf_cache_enter(wf_cache *c, int32_t slot, int main)
{
    wf_entry *entry = &c->entries[slot];
    entry->main = main != 0;
    wf_queue *queue = queue_of(c, entry);
    entry->newer = WF_NO_SLOT;
    entry->older = queue->newest;
    if (queue->newest == WF_NO_SLOT)
        queue->oldest = slot;
    else
        c->entries[queue->newest].newer = slot;
    queue->newest = slot;
    queue->weight += entry->weight;
}

void wf_cache_leave(wf_cache *c, int32_t slot)
{
    wf_entry *entry = &c->entries[slot];
    wf_queue *queue = queue_of(c, entry);
    if (entry->newer == WF_NO_SLOT)
        queue->newest = entry->older;
    else
        c->entries[entry->newer].older = entry->older;
    if (entry->older == WF_NO_SLOT)
        queue->oldest = entry->newer;
    else
        c->entries[entry->older].newer = entry->newer;
    queue->weight = queue->newest == WF_NO_SLOT ? 0.0 : queue->weight - entry->weight;
}

static void pass_on(wf_cache *c, int32_t slot, int main)
{
    wf_cache_leave(c, slot);
    wf_cache_enter(c, slot, main);
}

static int hot(const wf_cache *c, uint32_t since)
{
    return WF_ARM[c->arm].recency && c->main.oldest != WF_NO_SLOT && since < c->now - c->entries[c->main.oldest].last;
}

static void fill_main(wf_cache *c, int most)
{
    double window = window_most(c), main = main_most(c);
    while (most-- > 0 && c->window.weight > window && c->window.newest != c->window.oldest &&
           c->main.weight + c->entries[c->window.oldest].weight <= main)
        pass_on(c, c->window.oldest, 1);
}

/* Puts an entry that is in no queue where it belongs. What it drives out of the main queue, or what the window holds
 * too much while the main queue has room, moves over: never more than comes in, so that no access takes long. */
static void place(wf_cache *c, int32_t slot, int main)
{
    double left = c->entries[slot].weight;
    wf_cache_enter(c, slot, main);
    while (main && left > 0.0 && c->main.weight > main_most(c) && c->main.oldest != slot) {
        left -= c->entries[c->main.oldest].weight;
        pass_on(c, c->main.oldest, 0);
    }
    if (!main && !WF_ARM[c->arm].clock)
        fill_main(c, 2);
}

void wf_cache_touch(wf_cache *c, int32_t slot)
{
    wf_entry *entry = &c->entries[slot];
    if (entry->uses == 0) { /* the guess was right: it comes in as if it were put now */
        wf_cache_leave(c, slot);
        wf_cache_settle(c, slot, WF_NO_SLOT);
        return;
    }
    see(c, entry->tag);
    if (WF_ARM[c->arm].clock) {
        use(c, entry, entry->uses < CREDIT ? entry->uses : CREDIT);
        return;
    }
    uint32_t since = c->now - entry->last;
    if (since <= c->lazy && (entry->main || WF_ARM[c->arm].window == 1.0)) {
        entry->uses += entry->uses < 15;
        return;
    }
    int main = (entry->main && WF_ARM[c->arm].window < 1.0) || hot(c, since);
    use(c, entry, worth(c, entry));
    wf_cache_leave(c, slot);
    place(c, slot, main);
}

void wf_cache_settle(wf_cache *c, int32_t slot, int32_t replaced)
{
    wf_entry *entry = &c->entries[slot];
    see(c, entry->tag);
    if (replaced != WF_NO_SLOT && c->entries[replaced].uses) {
        const wf_entry *before = &c->entries[replaced];
        int main = (before->main && WF_ARM[c->arm].window < 1.0) || hot(c, c->now - before->last);
        use(c, entry, worth(c, before));
        place(c, slot, main);
        return;
    }
    uint32_t ghost = recall(c, entry->tag);
    int main = ghost && (WF_ARM[c->arm].clock || hot(c, age(c, ghost) << c->tick));
    use(c, entry, WF_ARM[c->arm].clock ? 0 : ghost >> USES_SHIFT & 15);
    place(c, slot, main);
}

/* A use more than the first is a credit. */
static int32_t victim_by_clock(wf_cache *c)
{
    for (int left = ROUNDS; ; left--) {
        int small = c->window.weight > 0.0 && (c->window.weight >= window_most(c) || c->main.oldest == WF_NO_SLOT);
        int32_t out = small || c->main.oldest == WF_NO_SLOT ? c->window.oldest : c->main.oldest;
        wf_entry *entry = &c->entries[out];
        if (entry->uses <= (small ? 2 : 1) || left == 0)
            return out;
        entry->uses = small ? 1 : entry->uses <= CREDIT ? entry->uses - 1 : CREDIT;
        pass_on(c, out, 1);
    }
}

int32_t wf_cache_expired(const wf_cache *c, double now)
{
    int32_t out = c->window.oldest, rival = c->main.oldest;
    if (out != WF_NO_SLOT && c->entries[out].expires <= now)
        return out;
    return rival != WF_NO_SLOT && c->entries[rival].expires <= now ? rival : WF_NO_SLOT;
}

int32_t wf_cache_victim(wf_cache *c, double now)
{
    int32_t expired = wf_cache_expired(c, now);
    if (expired != WF_NO_SLOT)
        return expired;
    if (c->guesses.oldest != WF_NO_SLOT)
        return c->guesses.oldest;
    watch(c);
    if (!WF_ARM[c->arm].clock)
        fill_main(c, MOVES);
    int32_t out = c->window.oldest, rival = c->main.oldest;
    if (out == WF_NO_SLOT || rival == WF_NO_SLOT)
        return out == WF_NO_SLOT ? rival : out;
    if (WF_ARM[c->arm].clock)
        return victim_by_clock(c);
    if (c->main.weight > main_most(c)) /* the window has just been allowed more: the older of both */
        return c->now - c->entries[out].last > c->now - c->entries[rival].last ? out : rival;
    if (WF_ARM[c->arm].frequency && worth(c, &c->entries[out]) > worth(c, &c->entries[rival])) {
        pass_on(c, out, 1);
        return rival;
    }
    return out;
}
