/* Products on AVX2 and FMA: half a line of a tile, 8 outputs, at a time; see tiles.c for the form of a tile. */
#if defined(__x86_64__)
#include "arch/avx2.h"
#include "arch/product.h"

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE AVX2 static inline __attribute__((always_inline))

/* Line v of the codes of a tile of so many lines, its first 32 bytes or its last: a shift and a mask for each plane. */
INLINE __m256i half_line(const uint8_t *tile, int v, int half, int lines, int bits) {
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
        tile += ocs_plane_bytes(lines, width);
        place += width;
    }
    return codes;
}

INLINE void unpack_tile_of(uint8_t *restrict codes, const uint8_t *tile, int lines, int bits) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        for (int half = 0; half < 2 && v < lines; ++half) {
            const __m256i line = half_line(tile, v, half, lines, bits);
            _mm256_storeu_si256((__m256i *)(codes + v * OCS_TILE_LINE + 32 * half), line);
        }
    }
}

AVX2 void ocs_unpack_tile_avx2(uint8_t *restrict codes, const uint8_t *tile, int lines,
                               int bits){OCS_WITH_CONSTANT_BITS(bits, unpack_tile_of, codes, tile, lines)}

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

/* Adds what the pairs of some lines gave in 16 bits to sums of 32. */
INLINE __m256i add_wide(__m256i sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* sums [rows, 2] += the products of a tile; of k < 8 bits the pairs of 2^(7 - k) lines fit 16 bits. */
INLINE void add_tile(__m256i sums[3][2], const uint8_t *tile, const uint8_t *x, int64_t stride, int lines,
                     bool is_signed, int rows, int bits) {
    const int fitting = bits >= 7 ? 1 : bits <= 4 ? 8 : 1 << (7 - bits);
    __m256i pairs[3][2];
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        if (v >= lines) {
            continue;
        }
        const __m256i codes[2] = {half_line(tile, v, 0, lines, bits), half_line(tile, v, 1, lines, bits)};
#pragma GCC unroll 3
        for (int r = 0; r < rows; ++r) {
            const __m256i values = four_bytes(x + r * stride + 4 * v);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                if (bits == 8) {
                    sums[r][half] = add_widened(sums[r][half], codes[half], values, is_signed);
                    continue;
                }
                pairs[r][half] = v % fitting == 0 ? _mm256_setzero_si256() : pairs[r][half];
                pairs[r][half] = add_pairs(pairs[r][half], codes[half], values, bits, is_signed);
                if (v % fitting == fitting - 1 || v == lines - 1) {
                    sums[r][half] = add_wide(sums[r][half], pairs[r][half]);
                }
            }
        }
    }
}

/* sum [rows, 16] of up to 3 rows. */
INLINE void few_rows(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t stride,
                     bool is_signed, int rows, int bits) {
    __m256i sums[3][2];
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
        sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    }
    for (; V >= 8; V -= 8, tiles += OCS_TILE_LINE * bits, x += OCS_TILE_CHANNELS) {
        add_tile(sums, tiles, x, stride, 8, is_signed, rows, bits);
    }
    if (V > 0) {
        add_tile(sums, tiles, x, stride, (int)V, is_signed, rows, bits);
    }
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
        _mm256_storeu_si256((__m256i *)(sum + r * OCS_TILE_OUTPUTS), sums[r][0]);
        _mm256_storeu_si256((__m256i *)(sum + r * OCS_TILE_OUTPUTS + 8), sums[r][1]);
    }
}

/* upper and lower [rows] += the products of eight outputs of a tile of 8 bits, where the first's codes begin: of their
   upper four bits, and of their lower. */
INLINE void add_tile_8(__m256i *upper, __m256i *lower, const uint8_t *tile, const uint8_t *x, int64_t stride, int lines,
                       int rows) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i upper_pairs[3], lower_pairs[3];
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
        upper_pairs[r] = lower_pairs[r] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        if (v >= lines) {
            continue;
        }
        const __m256i codes = half_line(tile, v, 0, lines, 8);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
#pragma GCC unroll 3
        for (int r = 0; r < rows; ++r) {
            const __m256i values = four_bytes(x + r * stride + 4 * v);
            const __m256i of_low = _mm256_maddubs_epi16(_mm256_and_si256(codes, low), values);
            upper_pairs[r] = _mm256_add_epi16(upper_pairs[r], _mm256_maddubs_epi16(high, values));
            lower_pairs[r] = _mm256_add_epi16(lower_pairs[r], of_low);
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
        upper[r] = add_wide(upper[r], upper_pairs[r]);
        lower[r] = add_wide(lower[r], lower_pairs[r]);
    }
}

/* sum [rows, 16] of up to 3 signed rows and codes of 8 bits. */
INLINE void few_rows_8(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t stride,
                       int rows) {
    for (int half = 0; half < 2; ++half) {
        const uint8_t *tile = tiles + 32 * half, *row = x;
        int64_t left = V;
        __m256i upper[3], lower[3];
#pragma GCC unroll 3
        for (int r = 0; r < rows; ++r) {
            upper[r] = lower[r] = _mm256_setzero_si256();
        }
        for (; left >= 8; left -= 8, tile += OCS_TILE_LINE * 8, row += OCS_TILE_CHANNELS) {
            add_tile_8(upper, lower, tile, row, stride, 8, rows);
        }
        if (left > 0) {
            add_tile_8(upper, lower, tile, row, stride, (int)left, rows);
        }
#pragma GCC unroll 3
        for (int r = 0; r < rows; ++r) {
            const __m256i total = _mm256_add_epi32(_mm256_slli_epi32(upper[r], 4), lower[r]);
            _mm256_storeu_si256((__m256i *)(sum + r * OCS_TILE_OUTPUTS + 8 * half), total);
        }
    }
}

/* As many rows as registers hold, which are also the bytes of one float row. */
INLINE void some_rows(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t stride,
                      bool is_signed, int rows, int bits) {
    if (bits == 8 && is_signed) {
        few_rows_8(sum, tiles, x, V, stride, rows);
    } else {
        few_rows(sum, tiles, x, V, stride, is_signed, rows, bits);
    }
}

INLINE void product_of_block(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t R,
                             int64_t stride, bool is_signed, int bits) {
    for (; R >= 3; R -= 3, sum += 3 * OCS_TILE_OUTPUTS, x += 3 * stride) {
        some_rows(sum, tiles, x, V, stride, is_signed, 3, bits);
    }
    if (R == 2) {
        some_rows(sum, tiles, x, V, stride, is_signed, 2, bits);
    } else if (R == 1) {
        some_rows(sum, tiles, x, V, stride, is_signed, 1, bits);
    }
}

OCS_DEFINE_PRODUCT(AVX2, , ocs_product_avx2)

/* --- Floats in three bytes -------------------------------------------------------------------- */

/* The lowest byte of each integer, and what is left of it once that is taken away. */
INLINE __m256i take_byte(__m256i *left) {
    const __m256i byte = _mm256_srai_epi32(_mm256_slli_epi32(*left, 24), 24);
    *left = _mm256_srai_epi32(_mm256_sub_epi32(*left, byte), 8);
    return byte;
}

AVX2 void ocs_cut_row_avx2(int8_t *restrict bytes, const float *x, int64_t N, int64_t stride, float step) {
    const __m256 steps = _mm256_set1_ps(step);
    __m256i places[3][4];
    int64_t i = 0;
    for (; i + 32 <= N; i += 32) {
        for (int j = 0; j < 4; ++j) {
            __m256i left = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + i + 8 * j), steps));
            places[2][j] = take_byte(&left);
            places[1][j] = take_byte(&left);
            places[0][j] = left;
        }
        for (int place = 0; place < 3; ++place) {
            const __m256i *of = places[place];
            const __m256i packed = ocs_pack_bytes(of[0], of[1], of[2], of[3]);
            _mm256_storeu_si256((__m256i *)(bytes + place * stride + i), packed);
        }
    }
    ocs_cut_row_ref(bytes + i, x + i, N - i, stride, step);
}
#endif
