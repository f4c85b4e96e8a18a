/* NEON, part of every aarch64: 16-bit products of two halves are added, then widened pair by pair. */
#include "vector.h"

#if defined(__aarch64__)
#include <arm_neon.h>

void wf_scan_neon(const int8_t *rows, size_t stride, const int8_t *query, size_t count, int32_t *out)
{
    for (size_t i = 0; i < count; i++, rows += stride) {
        int32x4_t sum = vdupq_n_s32(0);
        for (size_t j = 0; j < stride; j += 16) {
            int8x16_t r = vld1q_s8(rows + j), q = vld1q_s8(query + j);
            int16x8_t pairs = vmull_s8(vget_low_s8(r), vget_low_s8(q));
            sum = vpadalq_s16(sum, vmlal_s8(pairs, vget_high_s8(r), vget_high_s8(q)));
        }
        out[i] = vaddvq_s32(sum);
    }
}
#endif
