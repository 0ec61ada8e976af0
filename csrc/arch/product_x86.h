/* The variants in product_avx2.c and recurrent_avx2.c, which avx2.c lists, and what the first shares with vnni.c. */
#ifndef OCS_PRODUCT_X86_H
#define OCS_PRODUCT_X86_H

#include "kernels.h"

void ocs_unpack_tile_avx2(uint8_t *restrict codes, const uint8_t *tile, int bits);
void ocs_product_i8_avx2(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t T, int64_t R,
                         int64_t stride, int bits, bool is_signed);
void ocs_product_f32_avx2(float *restrict sum, const uint8_t *tiles, const float *x, int64_t T, int64_t R,
                          int64_t stride, int bits);
void ocs_cut_row_avx2(int8_t *restrict bytes, const float *x, int64_t N, int64_t stride, float step);
void ocs_cell_avx2(float *restrict h, float *restrict c, const float *from_x, const float *from_h, int64_t H,
                   int64_t first, ocs_cell_kind kind);

/* Calls an inline function with `bits` as a constant last argument, so that shifts and masks are constants, too. */
#define OCS_WITH_CONSTANT_BITS(bits, function, ...)                                                                    \
    switch (bits) {                                                                                                    \
    case 2: function(__VA_ARGS__, 2); break;                                                                           \
    case 3: function(__VA_ARGS__, 3); break;                                                                           \
    case 4: function(__VA_ARGS__, 4); break;                                                                           \
    case 5: function(__VA_ARGS__, 5); break;                                                                           \
    case 6: function(__VA_ARGS__, 6); break;                                                                           \
    case 7: function(__VA_ARGS__, 7); break;                                                                           \
    default: function(__VA_ARGS__, 8);                                                                                 \
    }

#endif
