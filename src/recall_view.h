/* What one question sees of a user's rows, laid out so that neighbours in a session stand next to each other. */
#ifndef WHISPER_FAST_RECALL_VIEW_H
#define WHISPER_FAST_RECALL_VIEW_H

#include "recall.h"

#define WF_NEAR 3            /* turns to either side that count */
#define WF_BLOCK 64          /* places that are worked on at a time */
#define WF_NOWHERE UINT32_MAX /* the place of a row that may not be seen */

static const float WF_FALL[WF_NEAR + 1] = {1.0f, 0.6f, 0.4f, 0.3f};

/* The visible rows stand session by session, each session in their order, with WF_NEAR empty places between two, so
 * that what a place lends its neighbours never reaches another session. Columns of places hold whole blocks and can
 * be read WF_NEAR places before their first and behind their last; empty places hold 0. */
typedef struct {
    const wf_ask *ask;
    size_t rows, seen, sessions, blocks;
    uint32_t *place;         /* [rows] */
    uint32_t *session;       /* [rows] */
    uint32_t *start, *end;   /* [sessions] the places of each; the same for one of which nothing is seen */
    uint32_t *row;           /* [places] WF_NO_ROW for an empty one */
    float *match;            /* [places] of the term at hand */
    float *coverage, *own;   /* [places] with what neighbours lend, and without */
    float *session_fit, *cosine, *asks; /* [places] */
    uint8_t *touched;        /* [blocks + 2] those that hold a match, from 1 on */
    void *of_rows, *of_places;
} wf_view;

int wf_see(wf_view *view, const wf_ask *ask); /* 0, or -1 without memory; to be freed in either case */
void wf_view_free(wf_view *view);

int wf_match_words(wf_view *view); /* fills coverage, own and session_fit; 0, or -1 without memory */

#endif
