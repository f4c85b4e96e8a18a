/* Memory of a table, and the way of a float vector into it. */
#include "vector.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static size_t padded(size_t bytes)
{
    return (bytes + WF_ALIGNMENT - 1) & ~(size_t)(WF_ALIGNMENT - 1);
}

static size_t row_bytes(size_t stride)
{
    return stride + sizeof(float) + sizeof(double) + 2 * sizeof(uint32_t) + sizeof(uint16_t);
}

size_t wf_table_bytes(const wf_table *table)
{
    size_t n = table->capacity;
    return padded(sizeof *table) + n * table->stride + padded(n * sizeof *table->at) + padded(n * sizeof *table->scale) +
           padded(n * sizeof *table->previous) + padded(n * sizeof *table->scope) + padded(n * sizeof *table->mark);
}

/* Each column starts on a cache line. */
static void lay_out(wf_table *table)
{
    size_t n = table->capacity;
    char *at = (char *)table + padded(sizeof *table);
    table->packed = (int8_t *)at;
    table->at = (double *)(at += n * table->stride);
    table->scale = (float *)(at += padded(n * sizeof *table->at));
    table->previous = (uint32_t *)(at += padded(n * sizeof *table->scale));
    table->scope = (uint32_t *)(at += padded(n * sizeof *table->previous));
    table->mark = (uint16_t *)(at + padded(n * sizeof *table->scope));
}

wf_table *wf_table_grown(const wf_table *old, size_t count, size_t capacity, size_t stride)
{
    if (capacity >= WF_NO_ROW || capacity > (SIZE_MAX / 2) / row_bytes(stride))
        return NULL;
    wf_table shape = {.references = 1, .capacity = capacity, .stride = stride};
    wf_table *table = aligned_alloc(WF_ALIGNMENT, wf_table_bytes(&shape));
    if (!table)
        return NULL;
    *table = shape;
    lay_out(table);
    if (old && count) {
        memcpy(table->packed, old->packed, count * stride);
        memcpy(table->at, old->at, count * sizeof *old->at);
        memcpy(table->scale, old->scale, count * sizeof *old->scale);
        memcpy(table->previous, old->previous, count * sizeof *old->previous);
        memcpy(table->scope, old->scope, count * sizeof *old->scope);
        memcpy(table->mark, old->mark, count * sizeof *old->mark);
    }
    return table;
}

void wf_table_release(wf_table *table)
{
    if (table && --table->references == 0)
        free(table);
}

float wf_pack(const float *vector, size_t dimension, int8_t *packed)
{
    double squares = 0.0;
    float largest = 0.0f;
    for (size_t j = 0; j < dimension; j++) {
        if (!isfinite(vector[j]))
            return -1.0f;
        squares += (double)vector[j] * vector[j];
        largest = fmaxf(largest, fabsf(vector[j]));
    }
    if (largest == 0.0f) {
        memset(packed, 0, dimension);
        return 0.0f;
    }
    double steps = 127.0 / largest;
    for (size_t j = 0; j < dimension; j++)
        packed[j] = (int8_t)lrint(vector[j] * steps);
    return (float)(1.0 / (steps * sqrt(squares)));
}
