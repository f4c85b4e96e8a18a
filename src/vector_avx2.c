/* AVX2: |row| times (query with the row's signs), as unsigned by signed bytes. */
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static inline __m256i products(__m256i row, __m256i query)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(query, row));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

__attribute__((target("avx2"))) static inline int32_t sum(__m256i v)
{
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}

__attribute__((target("avx2")))
void wf_scan_avx2(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out)
{
    for (size_t i = 0; i < count; i++, rows += stride) {
        __m256i even = _mm256_setzero_si256(), odd = even;
        for (size_t j = 0; j < stride; j += 64) {
            even = _mm256_add_epi32(even, products(_mm256_load_si256((const __m256i *)(rows + j)),
                                                   _mm256_load_si256((const __m256i *)(query + j))));
            odd = _mm256_add_epi32(odd, products(_mm256_load_si256((const __m256i *)(rows + j + 32)),
                                                 _mm256_load_si256((const __m256i *)(query + j + 32))));
        }
        out[i] = sum(_mm256_add_epi32(even, odd));
    }
}
#endif
