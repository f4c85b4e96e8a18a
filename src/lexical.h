/* An inverted index of one user: for each term, by its 64-bit hash, the rows that hold it and how often. */
#ifndef WHISPER_FAST_LEXICAL_H
#define WHISPER_FAST_LEXICAL_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define WF_MAX_POSTING_ROWS (1u << 24)
#define WF_MAX_TERMS (1u << 30)

/* A posting is row << 8 | count, the count capped at 255. Two of them, and most terms have no more, stand where the
 * pointer to a longer list would. */
typedef struct {
    uint64_t hash;
    union {
        uint32_t here[2];
        uint32_t *far;
    } list;
    uint32_t count;
    uint16_t word;       /* its row in a table of word vectors, WF_NO_WORD for none */
    uint8_t log2;        /* of the capacity; 1: the list stands here */
} wf_term;

#define WF_NO_WORD UINT16_MAX

static inline const uint32_t *wf_list(const wf_term *term)
{
    return term->log2 > 1 ? term->list.far : term->list.here;
}

/* A compact dictionary: the terms stand side by side, and slots of four bytes say where. */
typedef struct {
    wf_term *terms;
    size_t used, capacity;
    uint32_t *slots;     /* number of the term and 1, 0 if free; linear probing, at most two thirds full */
    size_t mask;
    float *lengths;      /* terms of each row, negative once it is removed */
    size_t rows, row_capacity, live;
    uint64_t total;      /* terms of all live rows */
    size_t far_bytes;
    pthread_rwlock_t lock; /* held by whoever reads without the GIL, and by whoever writes */
} wf_postings;

int wf_postings_open(wf_postings *index); /* 0, or -1 */

/* Each returns 0, or -1 without memory; the index is then as it was, but for room that was made. */
int wf_postings_reserve(wf_postings *index, size_t terms);
int wf_postings_add(wf_postings *index, uint64_t hash, uint16_t word); /* to the row that is being appended */
int wf_postings_end_row(wf_postings *index, uint32_t length);

void wf_postings_remove(wf_postings *index, uint32_t row);
const wf_term *wf_postings_find(const wf_postings *index, uint64_t hash); /* NULL if no row holds it */
void wf_postings_score(const wf_postings *index, uint64_t hash, double k1, double b, float *out);
size_t wf_postings_bytes(const wf_postings *index);
void wf_postings_free(wf_postings *index);

#endif
