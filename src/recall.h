/* One question to one user's memories: words, vectors, sessions, times and speakers in one score. */
#ifndef WHISPER_FAST_RECALL_H
#define WHISPER_FAST_RECALL_H

#include "lexical.h"
#include "vector.h"

#define WF_MOST_TERMS 64     /* unique terms of a question that count */
#define WF_NO_SPEAKER UINT16_MAX

/* Vectors of whole words, centred and of unit length, int8 with a scale each. */
typedef struct {
    int8_t *rows;            /* [count][stride] */
    float *scale;
    size_t count, stride;
} wf_words;

/* The words that match one of them at all. */
typedef struct {
    const uint16_t *list;    /* NULL: not known, it may be any */
    size_t count;
} wf_kindred;

enum {                       /* the parts of a score, see pyx/_recall.pyx */
    WF_COVERAGE, WF_SESSION, WF_COSINE, WF_AROUND, WF_REPLY, WF_DATE, WF_SPEAKER, WF_QUESTION, WF_RECENCY, WF_PARTS
};

typedef struct {
    wf_rows rows;            /* as they were when the question was asked; holds a reference to the table */
    wf_postings *postings;
    const wf_words *words;
    uint64_t hashes[WF_MOST_TERMS];
    uint16_t numbers[WF_MOST_TERMS]; /* the terms' words, WF_NO_WORD for none */
    wf_kindred kindred[WF_MOST_TERMS];
    size_t terms;
    float *vector;           /* [dimension] of unit length, NULL for none */
    float *mean;             /* [dimension], of the rows' vectors */
    const uint32_t *only;    /* [only_count] rows that are compared with the vector, NULL for all */
    size_t only_count;
    const uint8_t *allowed;  /* by scope */
    size_t scopes;
    double since, until;     /* seconds, both inclusive */
    double now, half_life;   /* seconds; a half life of 0: age plays no part */
    uint32_t months, days;   /* bit n: the question names the month, the day of the month */
    uint16_t speaker;        /* the one person whom it names, or WF_NO_SPEAKER */
    const float *weights;    /* [WF_PARTS] */
    wf_scan scan;
    size_t k;
    wf_hit *hits;            /* [k] */
    float *parts;            /* [WF_PARTS][rows.count], wanted by tests and fits; else NULL */
    ptrdiff_t found;         /* hits, best first; -1 without memory */
} wf_ask;

/* The words kindred to the one of that number, to `list` [count]; returns how many; `products` has room for [count]. */
size_t wf_find_kindred(const wf_words *words, size_t number, wf_scan scan, int32_t *products, uint16_t *list);

void wf_answer(wf_ask *ask);
void wf_answer_all(wf_ask *asks, size_t count, size_t threads); /* on at most `threads` threads, the caller's among them */

#endif
