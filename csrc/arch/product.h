/* What all variants of the kernel `product` share: bits and sign become constants, and block follows block. */
#ifndef OCS_ARCH_PRODUCT_H
#define OCS_ARCH_PRODUCT_H

#include "kernels.h"

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

/* Defines the inline function `name`, compiled for `target`, which calls add_tile(sum, tile, x, R, stride, lines,
   is_signed, bits) for each tile of V lines; `lines` is a constant for all but the last. */
#define OCS_DEFINE_ADD_TILES(target, name, add_tile)                                                                   \
    target static inline __attribute__((always_inline)) void name(int32_t *restrict sum, const uint8_t *tiles,         \
                                                                  const uint8_t *x, int64_t V, int64_t R,              \
                                                                  int64_t stride, bool is_signed, int bits) {          \
        for (; V >= OCS_TILE_LINES; V -= OCS_TILE_LINES, tiles += ocs_tile_bytes(bits), x += OCS_TILE_CHANNELS) {      \
            add_tile(sum, tiles, x, R, stride, OCS_TILE_LINES, is_signed, bits);                                       \
        }                                                                                                              \
        if (V > 0) {                                                                                                   \
            add_tile(sum, tiles, x, R, stride, (int)V, is_signed, bits);                                               \
        }                                                                                                              \
    }

/* Defines a variant: `name`, compiled for `target`, made of the inline function product_of_block(sum, tiles, x, V, R,
   stride, is_signed, bits) that a file has. linkage: static, or nothing. */
#define OCS_DEFINE_PRODUCT(target, linkage, name)                                                                      \
    target static inline __attribute__((always_inline)) void product_of(                                               \
        int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t B, int64_t V, int64_t R,                \
        int64_t tile_step, int64_t x_step, int64_t stride, bool is_signed, int bits) {                                 \
        for (int64_t b = 0; b < B; ++b) {                                                                              \
            product_of_block(sum + b * R * OCS_TILE_OUTPUTS, tiles + b * tile_step, x + b * x_step, V, R, stride,      \
                             is_signed, bits);                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    target linkage void name(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t B, int64_t V,      \
                             int64_t R, int64_t tile_step, int64_t x_step, int64_t stride, int bits, bool is_signed) { \
        if (is_signed) {                                                                                               \
            OCS_WITH_CONSTANT_BITS(bits, product_of, sum, tiles, x, B, V, R, tile_step, x_step, stride, true)          \
        } else {                                                                                                       \
            OCS_WITH_CONSTANT_BITS(bits, product_of, sum, tiles, x, B, V, R, tile_step, x_step, stride, false)         \
        }                                                                                                              \
    }

#endif
