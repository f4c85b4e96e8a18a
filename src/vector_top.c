/* The questions: filter, score, keep the best. Scores are computed here once for all scan paths, so that equal
 * integers give equal floats. */
#include "vector.h"

#include <math.h>
#include <stdlib.h>

#include "top.h"

#define CHUNK 256 /* rows scanned at a time: their products stay in the first-level cache */

static int visible(const wf_table *table, size_t row, const wf_question *question)
{
    uint32_t scope = table->scope[row];
    if (scope == WF_REMOVED || (question->allowed && (scope >= question->scopes || !question->allowed[scope])))
        return 0;
    return table->at[row] >= question->since && table->at[row] <= question->until;
}

static void cosines(const wf_table *table, size_t first, size_t count, const wf_question *question, float *out)
{
    int32_t products[CHUNK];
    question->scan(table->packed + first * table->stride, table->stride, question->query, count, products);
    for (size_t i = 0; i < count; i++)
        out[i] = (float)products[i] * (table->scale[first + i] * question->query_scale);
}

ptrdiff_t wf_top_k(const wf_table *table, size_t count, const wf_question *question, size_t k, wf_hit *hits)
{
    size_t size = 0;
    float cosine[CHUNK];
    for (size_t first = 0; first < count; first += CHUNK) {
        size_t n = count - first < CHUNK ? count - first : CHUNK;
        cosines(table, first, n, question, cosine);
        for (size_t i = 0; i < n; i++)
            if ((size < k || cosine[i] >= hits[0].score) && visible(table, first + i, question))
                size = wf_offer(hits, size, k, (wf_hit){(uint32_t)(first + i), cosine[i]});
    }
    wf_best_first(hits, size);
    return (ptrdiff_t)size;
}

/* own[row] becomes the row's own score, NaN where the row is not visible. */
static void score_rows(const wf_table *table, size_t count, const wf_question *question, float *own)
{
    double sum = 0.0, squares = 0.0;
    size_t seen = 0;
    for (size_t first = 0; first < count; first += CHUNK) {
        size_t n = count - first < CHUNK ? count - first : CHUNK;
        if (question->query)
            cosines(table, first, n, question, own + first);
        for (size_t i = first; i < first + n; i++) {
            if (!visible(table, i, question)) {
                own[i] = NAN;
                continue;
            }
            if (!question->query || table->scale[i] == 0.0f) {
                own[i] = INFINITY; /* without a direction: of average cosine */
                continue;
            }
            sum += own[i];
            squares += (double)own[i] * own[i];
            seen++;
        }
    }
    double mean = seen ? sum / (double)seen : 0.0;
    double variance = seen ? squares / (double)seen - mean * mean : 0.0;
    double weight = variance > 1e-12 ? question->dense_weight / sqrt(variance) : 0.0;
    for (size_t i = 0; i < count; i++)
        own[i] = (isinf(own[i]) ? 0.0f : (float)((own[i] - mean) * weight)) +
                 (question->lexical ? question->lexical[i] : 0.0f);
}

static uint32_t visible_before(const wf_table *table, uint32_t row, const float *own)
{
    do
        row = table->previous[row];
    while (row != WF_NO_ROW && isnan(own[row]));
    return row;
}

static void share(float *total, const float *own, uint32_t row, uint32_t other, float part)
{
    total[row] += part * own[other];
    total[other] += part * own[row];
}

static void add_neighbours(const wf_table *table, size_t count, const float *own, float *total)
{
    for (size_t i = 0; i < count; i++)
        total[i] = own[i];
    for (size_t i = 0; i < count; i++) {
        if (isnan(own[i]))
            continue;
        uint32_t one = visible_before(table, (uint32_t)i, own);
        if (one == WF_NO_ROW)
            continue;
        share(total, own, (uint32_t)i, one, 0.4f);
        uint32_t two = visible_before(table, one, own);
        if (two != WF_NO_ROW)
            share(total, own, (uint32_t)i, two, 0.2f);
    }
}

ptrdiff_t wf_recall(const wf_table *table, size_t count, const wf_question *question, size_t k, wf_hit *hits)
{
    float *own = malloc((2 * count + 1) * sizeof *own), *total = own + count;
    if (!own)
        return -1;
    score_rows(table, count, question, own);
    add_neighbours(table, count, own, total);
    size_t size = 0;
    for (size_t i = 0; i < count; i++)
        if (!isnan(total[i]))
            size = wf_offer(hits, size, k, (wf_hit){(uint32_t)i, total[i]});
    wf_best_first(hits, size);
    free(own);
    return (ptrdiff_t)size;
}
