/* The variants in product_avx2.c and recurrent_avx2.c, which avx2.c lists, and what the first shares with vnni.c. */
#ifndef OCS_PRODUCT_X86_H
#define OCS_PRODUCT_X86_H

#include "kernels.h"

void ocs_unpack_tile_avx2(uint8_t *restrict codes, const uint8_t *tile, int lines, int bits);
void ocs_product_avx2(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t B, int64_t V, int64_t R,
                      int64_t block, int64_t stride, int bits, bool is_signed);
void ocs_cut_row_avx2(int8_t *restrict bytes, const float *x, int64_t N, int64_t stride, float step);
void ocs_cell_avx2(float *restrict h, float *restrict c, const float *from_x, const float *from_h, int64_t H,
                   int64_t first, ocs_cell_kind kind);

#endif
