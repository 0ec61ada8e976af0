/* What the files for AVX2 share: avx2.c lists the variants in product_avx2.c and recurrent_avx2.c. */
#ifndef OCS_ARCH_AVX2_H
#define OCS_ARCH_AVX2_H

#include "kernels.h"

#include <immintrin.h>

/* Four vectors of 32-bit integers as 32 saturated bytes, in order. */
__attribute__((target("avx2"))) static inline __m256i ocs_pack_bytes(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void ocs_unpack_tile_avx2(uint8_t *restrict codes, const uint8_t *tile, int lines, int bits);
void ocs_product_avx2(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t B, int64_t V, int64_t R,
                      int64_t tile_step, int64_t x_step, int64_t stride, int bits, bool is_signed);
void ocs_cut_row_avx2(int8_t *restrict bytes, const float *x, int64_t N, int64_t stride, float step);
void ocs_cell_avx2(float *restrict h, float *restrict c, const float *from_x, const float *from_h, int64_t H,
                   int64_t first, int64_t last, ocs_cell_kind kind);

#endif
