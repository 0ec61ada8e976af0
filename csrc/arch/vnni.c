/* Products on AVX-512 with VNNI: a line of a tile, 16 outputs, at a time; see tiles.c for the form of a tile. */
#if defined(__x86_64__)
#include "arch/product.h"

#include <immintrin.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define INLINE VNNI static inline __attribute__((always_inline))

/* Line v of the codes of a tile of so many lines: a shift and a mask for each plane. */
INLINE __m512i line_of(const uint8_t *tile, int v, int lines, int bits) {
    __m512i codes = _mm512_setzero_si512();
    int place = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) {
            continue;
        }
        const int fields = 8 / width, right = v % fields * width - place;
        const __m512i plane = _mm512_loadu_si512(tile + v / fields * OCS_TILE_LINE);
        const __m512i moved =
            right >= 0 ? _mm512_srli_epi16(plane, (unsigned)right) : _mm512_slli_epi16(plane, (unsigned)-right);
        const __m512i mask = _mm512_set1_epi8((char)(((1 << width) - 1) << place));
        codes = _mm512_or_si512(codes, width == 8 ? plane : _mm512_and_si512(moved, mask));
        tile += ocs_plane_bytes(lines, width);
        place += width;
    }
    return codes;
}

INLINE __m512i integers_of(const uint8_t *tile, int v, int lines, int bits) {
    return _mm512_sub_epi8(line_of(tile, v, lines, bits), _mm512_set1_epi8((char)((1 << (bits - 1)) - 1)));
}

/* Adds the products of four channels in 32 bits: u8 x s8, whichever of the two has no sign. */
INLINE __m512i add_four(__m512i sum, __m512i line, const uint8_t *x, bool is_signed) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    const __m512i values = _mm512_set1_epi32(word);
    return is_signed ? _mm512_dpbusd_epi32(sum, line, values) : _mm512_dpbusd_epi32(sum, values, line);
}

/* sums [rows, parts] += the products of a tile. */
INLINE void add_tile(__m512i *sums, const uint8_t *tile, const uint8_t *x, int64_t stride, int lines, bool is_signed,
                     int rows, int parts, int bits) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        if (v < lines) {
            const __m512i line = is_signed ? line_of(tile, v, lines, bits) : integers_of(tile, v, lines, bits);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                __m512i *const of_row = &sums[r * parts + v % parts];
                *of_row = add_four(*of_row, line, x + r * stride + 4 * v, is_signed);
            }
        }
    }
}

/* sum [rows, 16] of up to 4 rows, whose sums stay in registers: at least four of them, as a product waits for the sum
   that it is added to. */
INLINE void few_rows(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t stride,
                     bool is_signed, int rows, int bits) {
    const int parts = rows == 1 ? 4 : 2;
    __m512i sums[8];
#pragma GCC unroll 8
    for (int i = 0; i < rows * parts; ++i) {
        sums[i] = _mm512_setzero_si512();
    }
    for (; V >= 8; V -= 8, tiles += OCS_TILE_LINE * bits, x += OCS_TILE_CHANNELS) {
        add_tile(sums, tiles, x, stride, 8, is_signed, rows, parts, bits);
    }
    if (V > 0) {
        add_tile(sums, tiles, x, stride, (int)V, is_signed, rows, parts, bits);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        for (int i = 1; i < parts; ++i) {
            sums[r * parts] = _mm512_add_epi32(sums[r * parts], sums[r * parts + i]);
        }
        _mm512_storeu_si512(sum + r * OCS_TILE_OUTPUTS, sums[r * parts]);
    }
}

/* sum [R, 16] += the products of a tile, whose lines stay in registers. */
INLINE void add_tile_to_rows(int32_t *restrict sum, const uint8_t *tile, const uint8_t *x, int64_t R, int64_t stride,
                             int lines, bool is_signed, int bits) {
    __m512i of_tile[8];
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        if (v < lines) {
            of_tile[v] = is_signed ? line_of(tile, v, lines, bits) : integers_of(tile, v, lines, bits);
        }
    }
    for (int64_t r = 0; r < R; ++r) {
        __m512i sums[2] = {_mm512_loadu_si512(sum + r * OCS_TILE_OUTPUTS), _mm512_setzero_si512()};
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
            if (v < lines) {
                sums[v % 2] = add_four(sums[v % 2], of_tile[v], x + r * stride + 4 * v, is_signed);
            }
        }
        _mm512_storeu_si512(sum + r * OCS_TILE_OUTPUTS, _mm512_add_epi32(sums[0], sums[1]));
    }
}

/* sum [R, 16] of more rows, tile by tile. */
INLINE void many_rows(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t R,
                      int64_t stride, bool is_signed, int bits) {
    memset(sum, 0, (size_t)R * OCS_TILE_OUTPUTS * sizeof *sum);
    for (; V >= 8; V -= 8, tiles += OCS_TILE_LINE * bits, x += OCS_TILE_CHANNELS) {
        add_tile_to_rows(sum, tiles, x, R, stride, 8, is_signed, bits);
    }
    if (V > 0) {
        add_tile_to_rows(sum, tiles, x, R, stride, (int)V, is_signed, bits);
    }
}

INLINE void product_of_block(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t R,
                             int64_t stride, bool is_signed, int bits) {
    switch (R) {
    case 1: few_rows(sum, tiles, x, V, stride, is_signed, 1, bits); break;
    case 2: few_rows(sum, tiles, x, V, stride, is_signed, 2, bits); break;
    case 3: few_rows(sum, tiles, x, V, stride, is_signed, 3, bits); break;
    case 4: few_rows(sum, tiles, x, V, stride, is_signed, 4, bits); break;
    default: many_rows(sum, tiles, x, V, R, stride, is_signed, bits);
    }
}

OCS_DEFINE_PRODUCT(VNNI, static, product_vnni)

static bool has_vnni(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
}

const ocs_instruction_set ocs_isa_vnni = {
    .name = "vnni",
    .supported = has_vnni,
    .kernels.product = product_vnni,
};
#endif
