/* The question: filter, score, keep the best. Scores are computed here once for all scan paths, so that equal
 * integers give equal floats. */
#include "vector.h"

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
