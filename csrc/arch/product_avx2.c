/* Products on AVX2 and FMA: half a line of a tile, 8 outputs, at a time; see tiles.c for the form of a tile. */
#if defined(__x86_64__)
#include "arch/product_x86.h"

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE AVX2 static inline __attribute__((always_inline))

/* Line v of a tile's codes, its first 32 bytes or its last: a shift and a mask for each plane. */
INLINE __m256i half_line(const uint8_t *tile, int v, int half, int bits) {
    __m256i codes = _mm256_setzero_si256();
    int place = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) {
            continue;
        }
        const int fields = 8 / width, right = v % fields * width - place;
        const __m256i plane = _mm256_loadu_si256((const __m256i *)(tile + v / fields * OCS_TILE_LINE + 32 * half));
        const __m256i moved = right >= 0 ? _mm256_srli_epi16(plane, right) : _mm256_slli_epi16(plane, -right);
        const __m256i mask = _mm256_set1_epi8((char)(((1 << width) - 1) << place));
        codes = _mm256_or_si256(codes, width == 8 ? plane : _mm256_and_si256(moved, mask));
        tile += width * OCS_TILE_LINE;
        place += width;
    }
    return codes;
}

INLINE void unpack_tile_of(uint8_t *restrict codes, const uint8_t *tile, int bits) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        for (int half = 0; half < 2; ++half) {
            _mm256_storeu_si256((__m256i *)(codes + v * OCS_TILE_LINE + 32 * half), half_line(tile, v, half, bits));
        }
    }
}

AVX2 void ocs_unpack_tile_avx2(uint8_t *restrict codes, const uint8_t *tile,
                               int bits){OCS_WITH_CONSTANT_BITS(bits, unpack_tile_of, codes, tile)}

/* --- Integers --------------------------------------------------------------------------------- */

INLINE __m256i four_bytes(const uint8_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
}

/* Adds the products of four channels in 16 bits: u8 x s8, whichever of the two has no sign. */
INLINE __m256i add_pairs(__m256i sum, __m256i codes, __m256i x, int bits, bool is_signed) {
    if (is_signed) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
    }
    const __m256i q = _mm256_sub_epi8(codes, _mm256_set1_epi8((char)((1 << (bits - 1)) - 1)));
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, q));
}

/* Adds them in 32 bits, widened first: of 8 bits a pair does not fit 16. */
INLINE __m256i add_widened(__m256i sum, __m256i codes, __m256i x, bool is_signed) {
    const __m256i unsigned_one = is_signed ? codes : x;
    const __m256i signed_one = is_signed ? x : _mm256_sub_epi8(codes, _mm256_set1_epi8(127));
    const __m256i even = _mm256_and_si256(unsigned_one, _mm256_set1_epi16(0xff));
    const __m256i odd = _mm256_srli_epi16(unsigned_one, 8);
    const __m256i signed_even = _mm256_srai_epi16(_mm256_slli_epi16(signed_one, 8), 8);
    const __m256i signed_odd = _mm256_srai_epi16(signed_one, 8);
    const __m256i evens = _mm256_madd_epi16(even, signed_even), odds = _mm256_madd_epi16(odd, signed_odd);
    return _mm256_add_epi32(sum, _mm256_add_epi32(evens, odds));
}

/* sum [16] += one row's products with a tile's codes; of k < 8 bits 2^(7 - k) lines fit 16 bits. */
INLINE void add_tile(int32_t *sum, const __m256i codes[8][2], const uint8_t *x, int bits, bool is_signed) {
    const int lines = bits >= 7 ? 1 : bits <= 4 ? 8 : 1 << (7 - bits);
    for (int half = 0; half < 2; ++half) {
        __m256i total = _mm256_loadu_si256((const __m256i *)(sum + 8 * half));
#pragma GCC unroll 8
        for (int v = 0; v < 8; v += lines) {
            __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
            for (int i = v; i < v + lines; ++i) {
                if (bits == 8) {
                    total = add_widened(total, codes[i][half], four_bytes(x + 4 * i), is_signed);
                } else {
                    pairs = add_pairs(pairs, codes[i][half], four_bytes(x + 4 * i), bits, is_signed);
                }
            }
            if (bits < 8) {
                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
        _mm256_storeu_si256((__m256i *)(sum + 8 * half), total);
    }
}

INLINE void product_i8_of(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t T, int64_t R,
                          int64_t stride, bool is_signed, int bits) {
    memset(sum, 0, (size_t)R * OCS_TILE_OUTPUTS * sizeof *sum);
    for (int64_t t = 0; t < T; ++t, tiles += OCS_TILE_LINE * bits, x += OCS_TILE_CHANNELS) {
        __m256i codes[8][2];
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
            codes[v][0] = half_line(tiles, v, 0, bits);
            codes[v][1] = half_line(tiles, v, 1, bits);
        }
        for (int64_t r = 0; r < R; ++r) {
            add_tile(sum + r * OCS_TILE_OUTPUTS, codes, x + r * stride, bits, is_signed);
        }
    }
}

AVX2 void ocs_product_i8_avx2(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t T, int64_t R,
                              int64_t stride, int bits, bool is_signed) {
    if (R == 1 && is_signed) {
        OCS_WITH_CONSTANT_BITS(bits, product_i8_of, sum, tiles, x, T, 1, stride, true)
    } else if (is_signed) {
        OCS_WITH_CONSTANT_BITS(bits, product_i8_of, sum, tiles, x, T, R, stride, true)
    } else {
        OCS_WITH_CONSTANT_BITS(bits, product_i8_of, sum, tiles, x, T, R, stride, false)
    }
}

/* --- Floats ----------------------------------------------------------------------------------- */

/* Channel j of four, of 8 outputs, as floats. */
INLINE __m256 channel_of(__m256i q, int j) {
    const __m256i top = j == 3 ? q : _mm256_slli_epi32(q, 24 - 8 * j);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
}

INLINE __m256i integers_of(const uint8_t *tile, int v, int half, int bits) {
    return _mm256_sub_epi8(half_line(tile, v, half, bits), _mm256_set1_epi8((char)((1 << (bits - 1)) - 1)));
}

INLINE void product_f32_row(float *restrict sum, const uint8_t *tiles, const float *x, int64_t T, int bits) {
    __m256 sums[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()}, {_mm256_setzero_ps(), _mm256_setzero_ps()}};
    for (int64_t t = 0; t < T; ++t, tiles += OCS_TILE_LINE * bits, x += OCS_TILE_CHANNELS) {
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
            const __m256i low = integers_of(tiles, v, 0, bits), high = integers_of(tiles, v, 1, bits);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const __m256 value = _mm256_broadcast_ss(x + 4 * v + j);
                sums[j % 2][0] = _mm256_fmadd_ps(channel_of(low, j), value, sums[j % 2][0]);
                sums[j % 2][1] = _mm256_fmadd_ps(channel_of(high, j), value, sums[j % 2][1]);
            }
        }
    }
    _mm256_storeu_ps(sum, _mm256_add_ps(sums[0][0], sums[1][0]));
    _mm256_storeu_ps(sum + 8, _mm256_add_ps(sums[0][1], sums[1][1]));
}

/* sum [rows, 16] += the products of a tile's even channels, or of its odd ones; floats [32, 16]. */
INLINE void add_channels(float *restrict sum, const float *floats, const float *x, int64_t stride, int odd, int rows) {
    __m256 sums[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        sums[r][0] = _mm256_loadu_ps(sum + r * OCS_TILE_OUTPUTS);
        sums[r][1] = _mm256_loadu_ps(sum + r * OCS_TILE_OUTPUTS + 8);
    }
    for (int c = odd; c < OCS_TILE_CHANNELS; c += 2) {
        const __m256 low = _mm256_load_ps(floats + c * OCS_TILE_OUTPUTS);
        const __m256 high = _mm256_load_ps(floats + c * OCS_TILE_OUTPUTS + 8);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const __m256 value = _mm256_broadcast_ss(x + r * stride + c);
            sums[r][0] = _mm256_fmadd_ps(low, value, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(high, value, sums[r][1]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
        _mm256_storeu_ps(sum + r * OCS_TILE_OUTPUTS, sums[r][0]);
        _mm256_storeu_ps(sum + r * OCS_TILE_OUTPUTS + 8, sums[r][1]);
    }
}

INLINE void product_f32_of(float *restrict sum, const uint8_t *tiles, const float *x, int64_t T, int64_t R,
                           int64_t stride, int bits) {
    _Alignas(32) float floats[OCS_TILE_CODES], sums[2][OCS_MOST_ROWS * OCS_TILE_OUTPUTS] = {{0.0f}};
    for (int64_t t = 0; t < T; ++t, tiles += OCS_TILE_LINE * bits, x += OCS_TILE_CHANNELS) {
#pragma GCC unroll 8
        for (int v = 0; v < 8; ++v) {
            for (int half = 0; half < 2; ++half) {
                const __m256i q = integers_of(tiles, v, half, bits);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    _mm256_store_ps(floats + (4 * v + j) * OCS_TILE_OUTPUTS + 8 * half, channel_of(q, j));
                }
            }
        }
        for (int odd = 0; odd < 2; ++odd) {
            int64_t r = 0;
            for (; r + 4 <= R; r += 4) {
                add_channels(sums[odd] + r * OCS_TILE_OUTPUTS, floats, x + r * stride, stride, odd, 4);
            }
            for (; r < R; ++r) {
                add_channels(sums[odd] + r * OCS_TILE_OUTPUTS, floats, x + r * stride, stride, odd, 1);
            }
        }
    }
    for (int64_t i = 0; i < R * OCS_TILE_OUTPUTS; ++i) {
        sum[i] = sums[0][i] + sums[1][i];
    }
}

AVX2 void ocs_product_f32_avx2(float *restrict sum, const uint8_t *tiles, const float *x, int64_t T, int64_t R,
                               int64_t stride, int bits) {
    if (R == 1) {
        OCS_WITH_CONSTANT_BITS(bits, product_f32_row, sum, tiles, x, T)
    } else {
        OCS_WITH_CONSTANT_BITS(bits, product_f32_of, sum, tiles, x, T, R, stride)
    }
}
#endif
