/* Products of integers on 64-bit ARM with dot products of four bytes, which most CPUs since 2018 have. */
#if defined(__aarch64__)
#include "arch/tile_neon.h"

#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))

/* sum [rows, 16] += u [lines, 16, 4] * x of a tile's channels, modulo 2^32. */
DOTPROD INLINE void add_rows(int32_t *sum, const uint8_t *u, const uint8_t *x, int64_t stride, int lines,
                             bool is_signed, int rows) {
    uint32x4_t sums[4][4];
    for (int r = 0; r < rows; ++r) {
        for (int part = 0; part < 4; ++part) {
            sums[r][part] = vreinterpretq_u32_s32(vld1q_s32(sum + r * OCS_TILE_OUTPUTS + 4 * part));
        }
    }
    for (int v = 0; v < lines; ++v) {
        for (int r = 0; r < rows; ++r) {
            const uint8x16_t four = four_bytes(x + r * stride + 4 * v);
            for (int part = 0; part < 4; ++part) {
                const uint8x16_t line = vld1q_u8(u + v * OCS_TILE_LINE + 16 * part);
                const int32x4_t with_sign = vdotq_s32(vreinterpretq_s32_u32(sums[r][part]), vreinterpretq_s8_u8(line),
                                                      vreinterpretq_s8_u8(four));
                sums[r][part] = is_signed ? vreinterpretq_u32_s32(with_sign) : vdotq_u32(sums[r][part], line, four);
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int part = 0; part < 4; ++part) {
            vst1q_s32(sum + r * OCS_TILE_OUTPUTS + 4 * part, vreinterpretq_s32_u32(sums[r][part]));
        }
    }
}

/* sum [R, 16] += u * x of a tile. */
DOTPROD INLINE void add_tile(int32_t *restrict sum, const uint8_t *tile, const uint8_t *x, int64_t R, int64_t stride,
                             int lines, bool is_signed, int bits) {
    uint8_t u[OCS_TILE_CODES];
    int64_t r = 0;
    factors_of_tile(u, tile, lines, is_signed, bits);
    for (; r + 4 <= R; r += 4) {
        add_rows(sum + r * OCS_TILE_OUTPUTS, u, x + r * stride, stride, lines, is_signed, 4);
    }
    for (; r < R; ++r) {
        add_rows(sum + r * OCS_TILE_OUTPUTS, u, x + r * stride, stride, lines, is_signed, 1);
    }
}

OCS_DEFINE_ADD_TILES(DOTPROD, add_tiles, add_tile)

DOTPROD INLINE void product_of_block(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V,
                                     int64_t R, int64_t stride, bool is_signed, int bits) {
    begin_sums(sum, x, V, R, stride, is_signed, bits);
    add_tiles(sum, tiles, x, V, R, stride, is_signed, bits);
}

OCS_DEFINE_PRODUCT(DOTPROD, static, product_dotprod)

static bool has_dotprod(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    return true;
#else
    return false;
#endif
}

const ocs_instruction_set ocs_isa_dotprod = {
    .name = "dotprod",
    .supported = has_dotprod,
    .kernels.product = product_dotprod,
};
#endif
