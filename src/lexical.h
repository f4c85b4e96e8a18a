/* An inverted index of one user: for each term, by its 64-bit hash, the rows that hold it and how often. */
#ifndef WHISPER_FAST_LEXICAL_H
#define WHISPER_FAST_LEXICAL_H

#include <stddef.h>
#include <stdint.h>

#define WF_MAX_POSTING_ROWS (1u << 24)

/* A posting is row << 8 | count, the count capped at 255. Two of them, and most terms have no more, stand where the
 * pointer to a longer list would. */
typedef struct {
    uint64_t hash;
    union {
        uint32_t here[2];
        uint32_t *far;
    } list;
    uint32_t count;
    uint32_t capacity;   /* 0: this slot was never used */
} wf_term;

typedef struct {
    wf_term *slots;      /* open addressing, linear probing, at most two thirds full */
    size_t mask, used;
    float *lengths;      /* terms of each row, negative once it is removed */
    size_t rows, row_capacity, live;
    uint64_t total;      /* terms of all live rows */
    size_t far_bytes;
} wf_postings;

/* Each returns 0, or -1 without memory; the index is then as it was, but for room that was made. */
int wf_postings_reserve(wf_postings *index, size_t terms);
int wf_postings_add(wf_postings *index, uint64_t hash);        /* to the row that is being appended */
int wf_postings_end_row(wf_postings *index, uint32_t length);

void wf_postings_remove(wf_postings *index, uint32_t row);
void wf_postings_score(const wf_postings *index, uint64_t hash, double k1, double b, float *out);
size_t wf_postings_bytes(const wf_postings *index);
void wf_postings_free(wf_postings *index);

#endif
