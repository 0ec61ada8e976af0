/* Tiles of packed weights on NEON, for neon.c and dotprod.c; see tiles.c for their form.

   NEON multiplies bytes that both have a sign, or both have none. So what a product reads is u = code for most bits,
   and in 8 bits code - 128 where x has a sign, code + 1 where it has none: 255, which stands for no integer, becomes 0
   there, as it does in the plain kernel. The rest is a multiple of the sum of x, the same for all outputs. */
#ifndef OCS_TILE_NEON_H
#define OCS_TILE_NEON_H

#include "arch/product.h"

#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

/* Line v of the codes of a tile of so many lines, 16 bytes of it, which are 4 outputs: a shift and a mask for each
 * plane. */
INLINE uint8x16_t codes_of(const uint8_t *tile, int v, int part, int lines, int bits) {
    uint8x16_t codes = vdupq_n_u8(0);
    int place = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) {
            continue;
        }
        const int fields = 8 / width, left = place - v % fields * width;
        const uint8x16_t plane = vld1q_u8(tile + v / fields * OCS_TILE_LINE + 16 * part);
        const uint8x16_t mask = vdupq_n_u8((uint8_t)(((1 << width) - 1) << place));
        codes = vorrq_u8(codes, vandq_u8(vshlq_u8(plane, vdupq_n_s8((int8_t)left)), mask));
        tile += ocs_plane_bytes(lines, width);
        place += width;
    }
    return codes;
}

/* u of all codes of a tile; see above. */
INLINE void factors_of_tile(uint8_t *restrict u, const uint8_t *tile, int lines, bool is_signed, int bits) {
    const uint8x16_t shift = vdupq_n_u8(bits < 8 ? 0 : is_signed ? 128 : 1); /* 128 is -128 in 8 bits */
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        for (int part = 0; part < 4 && v < lines; ++part) {
            vst1q_u8(u + v * OCS_TILE_LINE + 16 * part, vaddq_u8(codes_of(tile, v, part, lines, bits), shift));
        }
    }
}

/* Four channels of a row, for each of four outputs. */
INLINE uint8x16_t four_bytes(const uint8_t *x) {
    uint32_t word;
    memcpy(&word, x, sizeof word);
    return vreinterpretq_u8_u32(vdupq_n_u32(word));
}

/* sum [16] = the multiple of the sum of a row x [4 V] that u leaves out, modulo 2^32. */
INLINE void begin_row(int32_t *sum, const uint8_t *x, int64_t V, bool is_signed, int bits) {
    uint32_t total = 0;
    int64_t i = 0;
    for (; i + 16 <= OCS_LINE_CHANNELS * V; i += 16) {
        const uint8x16_t bytes = vld1q_u8(x + i);
        total += is_signed ? (uint32_t)vaddlvq_s8(vreinterpretq_s8_u8(bytes)) : vaddlvq_u8(bytes);
    }
    for (; i < OCS_LINE_CHANNELS * V; ++i) {
        total += is_signed ? (uint32_t)(int8_t)x[i] : x[i];
    }
    const uint32_t without_sign = bits < 8 ? (uint32_t)ocs_qmax(bits) : 128, with_sign = bits < 8 ? 0 : 128;
    const uint32x4_t offset = vdupq_n_u32(total * (is_signed ? with_sign : -without_sign));
    for (int o = 0; o < OCS_TILE_OUTPUTS; o += 4) {
        vst1q_s32(sum + o, vreinterpretq_s32_u32(offset));
    }
}

/* sum [R, 16] of rows x [R, stride], to which the products with u are to be added. */
INLINE void begin_sums(int32_t *restrict sum, const uint8_t *x, int64_t V, int64_t R, int64_t stride, bool is_signed,
                       int bits) {
    for (int64_t r = 0; r < R; ++r) {
        begin_row(sum + r * OCS_TILE_OUTPUTS, x + r * stride, V, is_signed, bits);
    }
}

#endif
