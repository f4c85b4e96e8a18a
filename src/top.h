/* The k best of what is offered: a heap with the worst on top, ties by the lower row. */
#ifndef WHISPER_FAST_TOP_H
#define WHISPER_FAST_TOP_H

#include "vector.h"

static inline int wf_better(wf_hit a, wf_hit b)
{
    return a.score > b.score || (a.score == b.score && a.row < b.row);
}

static inline void wf_sink(wf_hit *hits, size_t size, size_t i)
{
    wf_hit moved = hits[i];
    for (size_t child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && wf_better(hits[child], hits[child + 1]))
            child++;
        if (wf_better(hits[child], moved))
            break;
        hits[i] = hits[child];
    }
    hits[i] = moved;
}

/* Offers one hit to the heap of at most `k`; returns its new size. */
static inline size_t wf_offer(wf_hit *hits, size_t size, size_t k, wf_hit hit)
{
    if (size == k) {
        if (k && wf_better(hit, hits[0])) {
            hits[0] = hit;
            wf_sink(hits, k, 0);
        }
        return size;
    }
    size_t i = size;
    for (; i && wf_better(hits[(i - 1) / 2], hit); i = (i - 1) / 2)
        hits[i] = hits[(i - 1) / 2];
    hits[i] = hit;
    return size + 1;
}

static inline void wf_best_first(wf_hit *hits, size_t size)
{
    while (size > 1) {
        wf_hit worst = hits[0];
        hits[0] = hits[--size];
        wf_sink(hits, size, 0);
        hits[size] = worst;
    }
}

#endif
