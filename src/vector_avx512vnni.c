/* AVX-512 VNNI multiplies unsigned by signed bytes: 128 is added to the row (the flipped top bit), and what that
 * adds to the product, 128 times the query's sum, is taken off at the end. Two rows share each load of the query. */
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))

TARGET static inline __m512i shifted(const int8_t *row)
{
    return _mm512_xor_si512(_mm512_load_si512(row), _mm512_set1_epi8((char)0x80));
}

TARGET void wf_scan_avx512vnni(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out)
{
    int32_t excess = 0;
    for (size_t j = 0; j < stride; j++)
        excess += 128 * query[j];
    size_t i = 0;
    for (; i + 2 <= count; i += 2, rows += 2 * stride) {
        __m512i first = _mm512_setzero_si512(), second = first;
        for (size_t j = 0; j < stride; j += 64) {
            __m512i q = _mm512_load_si512(query + j);
            first = _mm512_dpbusd_epi32(first, shifted(rows + j), q);
            second = _mm512_dpbusd_epi32(second, shifted(rows + stride + j), q);
        }
        out[i] = _mm512_reduce_add_epi32(first) - excess;
        out[i + 1] = _mm512_reduce_add_epi32(second) - excess;
    }
    if (i < count) {
        __m512i last = _mm512_setzero_si512();
        for (size_t j = 0; j < stride; j += 64)
            last = _mm512_dpbusd_epi32(last, shifted(rows + j), _mm512_load_si512(query + j));
        out[i] = _mm512_reduce_add_epi32(last) - excess;
    }
}
#endif
