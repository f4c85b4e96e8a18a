/* Shadows: what each of a few policies would have hit in a small cache that sees a sample of the accesses. */
#ifndef WHISPER_FAST_CACHE_SHADOW_H
#define WHISPER_FAST_CACHE_SHADOW_H

#include <stddef.h>
#include <stdint.h>

#define WF_ARMS 6

typedef struct {
    double window;  /* the window's share of the bound */
    int recency;    /* who returns sooner than the main queue's oldest was used moves into the main queue */
    int frequency;  /* who leaves the window replaces the main queue's oldest if it was used more often */
    int clock;      /* hits move nothing: who leaves the window with two of them, or returns, goes to the main queue,
                       and leaves that only when it comes round without one */
} wf_arm;

extern const wf_arm WF_ARM[WF_ARMS];

typedef struct wf_shadow wf_shadow;

wf_shadow *wf_shadow_new(int32_t capacity, int arm, int sampled); /* NULL without memory */
void wf_shadow_free(wf_shadow *shadow);
int32_t wf_shadow_capacity(const wf_shadow *shadow);
void wf_shadow_seed(wf_shadow *shadow, uint32_t tag);  /* an access that counts for none */
int wf_shadow_access(wf_shadow *shadow, uint32_t tag); /* returns the arm that does best */
size_t wf_shadow_bytes(const wf_shadow *shadow);

#endif
