/* int8 rows with float columns beside them, and the kernels that scan them. */
#ifndef WHISPER_FAST_VECTOR_H
#define WHISPER_FAST_VECTOR_H

#include <stddef.h>
#include <stdint.h>

#define WF_ALIGNMENT 64      /* bytes: rows start on a cache line and are padded with zeros to whole ones */
#define WF_REMOVED UINT32_MAX /* the scope of a row that was removed */
#define WF_NO_ROW UINT32_MAX

/* Writes the integer products of `count` rows, each `stride` bytes (a multiple of 64), with `query` to `out`.
 * No value may be -128: the sums of pairs of products must fit 16 bits. */
typedef void (*wf_scan)(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out);

typedef struct {
    const char *name;
    wf_scan scan;
} wf_path;

/* The scan paths that this processor and operating system can run, best first; returns their number. */
size_t wf_paths(const wf_path **paths);

void wf_scan_scalar(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out);
void wf_scan_avx2(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out);
void wf_scan_avx512vnni(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out);
void wf_scan_neon(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out);

/* The columns of a table of rows, in one allocation. It is counted, so that a scan may go on in another thread
 * while an append moves the table to a larger one; the count is only touched under the GIL. */
typedef struct {
    size_t references;
    size_t capacity;
    size_t stride;
    int8_t *packed;       /* [capacity][stride] */
    float *scale;         /* component = packed * scale */
    double *at;
    uint32_t *previous;   /* the row said before in the same session, WF_NO_ROW for the first */
    uint32_t *scope;
    uint16_t *mark;       /* who said it, and WF_ASKS if it ends with a question mark */
} wf_table;

#define WF_ASKS 0x8000u
#define WF_SPEAKERS 0x8000u /* speakers are numbered below */

/* What the rows of one user are to another kernel, which takes a reference to the table under the GIL. */
typedef struct {
    wf_table *table;
    size_t count, removed, stride, dimension;
    double *sum;          /* [dimension], of all live rows */
} wf_rows;

/* A larger copy of `old` (may be NULL) with one reference, NULL without memory. */
wf_table *wf_table_grown(const wf_table *old, size_t count, size_t capacity, size_t stride);
void wf_table_release(wf_table *table);
size_t wf_table_bytes(const wf_table *table);

/* Unit length, then symmetric int8. Returns the scale (0 for the zero vector), -1 if a component is not finite. */
float wf_pack(const float *vector, size_t dimension, int8_t *packed);

typedef struct {
    const int8_t *query;      /* packed and padded like a row */
    float query_scale;
    const uint8_t *allowed;   /* by scope, NULL for all */
    size_t scopes;            /* length of `allowed` */
    double since, until;      /* seconds, both inclusive */
    wf_scan scan;
} wf_question;

typedef struct {
    uint32_t row;
    float score;
} wf_hit;

/* Writes at most `k` hits, best first, ties by the lower row, and returns their number. */
ptrdiff_t wf_top_k(const wf_table *table, size_t count, const wf_question *question, size_t k, wf_hit *hits);

#endif
