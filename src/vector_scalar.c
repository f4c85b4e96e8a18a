/* The reference: every other path must give the same integers. */
#include "vector.h"

void wf_scan_scalar(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out)
{
    for (size_t i = 0; i < count; i++, rows += stride) {
        int32_t sum = 0;
        for (size_t j = 0; j < stride; j++)
            sum += (int32_t)rows[j] * query[j];
        out[i] = sum;
    }
}
