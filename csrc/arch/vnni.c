/* Products on AVX-512 with VNNI: a line of a tile, 16 outputs, at a time; see tiles.c for the form of a tile. */
#if defined(__x86_64__)
#include "arch/product.h"

#include <immintrin.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define INLINE VNNI static inline __attribute__((always_inline))

/* The planes of a tile of so many lines, each vector read once: `bits` of them where no line is missing. */
INLINE void load_planes(__m512i planes[8], const uint8_t *tile, int lines, int bits) {
#pragma GCC unroll 4
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) {
            continue;
        }
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) {
            const bool there = i * 8 < lines * width;
            __m512i plane = there ? _mm512_loadu_si512(tile + i * OCS_TILE_LINE) : _mm512_setzero_si512();
            __asm__("" : "+v"(plane)); /* else GCC reads it again for every line */
            planes[i] = plane;
        }
        tile += ocs_plane_bytes(lines, width);
        planes += width;
    }
}

/* Line v of the codes: a shift and a mask for each plane. */
INLINE __m512i line_of(const __m512i planes[8], int v, int bits) {
    __m512i codes = _mm512_setzero_si512();
    int place = 0;
#pragma GCC unroll 4
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) {
            continue;
        }
        const int fields = 8 / width, right = v % fields * width - place;
        const __m512i plane = planes[v / fields];
        const __m512i moved =
            right >= 0 ? _mm512_srli_epi16(plane, (unsigned)right) : _mm512_slli_epi16(plane, (unsigned)-right);
        const __m512i mask = _mm512_set1_epi8((char)(((1 << width) - 1) << place));
        codes = _mm512_or_si512(codes, width == 8 ? plane : _mm512_and_si512(moved, mask));
        planes += width;
        place += width;
    }
    return codes;
}

/* What meets signed rows, or rows without sign. */
INLINE __m512i factors_of(const __m512i planes[8], int v, bool is_signed, int bits) {
    const __m512i line = line_of(planes, v, bits);
    return is_signed ? line : _mm512_sub_epi8(line, _mm512_set1_epi8((char)((1 << (bits - 1)) - 1)));
}

/* Adds the products of four channels in 32 bits: u8 x s8, whichever of the two has no sign. */
INLINE __m512i add_four(__m512i sum, __m512i line, const uint8_t *x, bool is_signed) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    const __m512i values = _mm512_set1_epi32(word);
    return is_signed ? _mm512_dpbusd_epi32(sum, line, values) : _mm512_dpbusd_epi32(sum, values, line);
}

/* Lines of 4 or 2 bits need no shift where signed rows meet them: a sum of its own for each place of a field has all
   products that many times, which is still below 2^31, as a code in its place is below 2^8. */
INLINE bool stays_in_place(bool is_signed, int bits) {
    return is_signed && (bits == 2 || bits == 4);
}

/* sums [rows, parts] += the products of a tile. */
INLINE void add_tile(__m512i *sums, const uint8_t *tile, const uint8_t *x, int64_t stride, int lines, bool is_signed,
                     int rows, int parts, int bits) {
    __m512i planes[8];
    load_planes(planes, tile, lines, bits);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        if (v < lines) {
            const int fields = 8 / bits, mask = ((1 << bits) - 1) << v % fields * bits;
            const __m512i line = stays_in_place(is_signed, bits)
                                     ? _mm512_and_si512(planes[v / fields], _mm512_set1_epi8((char)mask))
                                     : factors_of(planes, v, is_signed, bits);
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
    const int parts = rows == 1 || (bits == 2 && is_signed) ? 4 : 2;
    __m512i sums[16];
#pragma GCC unroll 16
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
        __m512i total = sums[r * parts];
#pragma GCC unroll 4
        for (int i = 1; i < parts; ++i) {
            const unsigned place = stays_in_place(is_signed, bits) ? (unsigned)(i % (8 / bits) * bits) : 0;
            total = _mm512_add_epi32(total, _mm512_srai_epi32(sums[r * parts + i], place));
        }
        _mm512_storeu_si512(sum + r * OCS_TILE_OUTPUTS, total);
    }
}

/* sum [R, 16] += the products of a tile, whose lines stay in registers. */
INLINE void add_tile_to_rows(int32_t *restrict sum, const uint8_t *tile, const uint8_t *x, int64_t R, int64_t stride,
                             int lines, bool is_signed, int bits) {
    __m512i planes[8], of_tile[8];
    load_planes(planes, tile, lines, bits);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
        if (v < lines) {
            of_tile[v] = factors_of(planes, v, is_signed, bits);
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

OCS_DEFINE_ADD_TILES(VNNI, add_tiles_to_rows, add_tile_to_rows)

/* sum [R, 16] of more rows, tile by tile. */
INLINE void many_rows(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t R,
                      int64_t stride, bool is_signed, int bits) {
    memset(sum, 0, (size_t)R * OCS_TILE_OUTPUTS * sizeof *sum);
    add_tiles_to_rows(sum, tiles, x, V, R, stride, is_signed, bits);
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

/* Half of the integers that sums [places, 16] stand for, in double, where they are exact. */
INLINE __m256 half_of_sums(const int32_t *sum, const int32_t *row_sum, int64_t places, int64_t row_stride,
                           int32_t qmax) {
    __m512d whole = _mm512_setzero_pd();
    for (int64_t place = 0; place < places; ++place, sum += OCS_TILE_OUTPUTS) {
        const __m256i offset = _mm256_set1_epi32(qmax * row_sum[place * row_stride]);
        const __m256i ints = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i *)sum), offset);
        whole = _mm512_fmadd_pd(whole, _mm512_set1_pd(256.0), _mm512_cvtepi32_pd(ints));
    }
    return _mm512_cvtpd_ps(whole);
}

INLINE __m512 values_of_sums(const int32_t *sum, const int32_t *row_sum, int64_t places, int64_t row_stride,
                             int32_t qmax) {
    if (places == 1) {
        const __m512i offset = _mm512_set1_epi32(qmax * row_sum[0]);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sum), offset));
    }
    const __m256 low = half_of_sums(sum, row_sum, places, row_stride, qmax);
    const __m256 high = half_of_sums(sum + 8, row_sum, places, row_stride, qmax);
    const __m512d both = _mm512_castps_pd(_mm512_castps256_ps512(low));
    return _mm512_castpd_ps(_mm512_insertf64x4(both, _mm256_castps_pd(high), 1));
}

VNNI static void scale_sums_vnni(float *restrict total, const int32_t *sum, const int32_t *row_sum, const float *scale,
                                 int64_t B, int64_t S, int64_t places, int64_t sum_step, int64_t row_stride,
                                 int64_t scale_stride, int32_t qmax) {
    for (int64_t b = 0; b < B; ++b, total += OCS_TILE_OUTPUTS, scale += OCS_TILE_OUTPUTS) {
        __m512 totals = _mm512_loadu_ps(total);
        for (int64_t s = 0; s < S; ++s, sum += sum_step) {
            const __m512 values = values_of_sums(sum, row_sum + s, places, row_stride, qmax);
            totals = _mm512_add_ps(totals, _mm512_mul_ps(values, _mm512_loadu_ps(scale + s * scale_stride)));
        }
        _mm512_storeu_ps(total, totals);
    }
}

static bool has_vnni(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
}

const ocs_instruction_set ocs_isa_vnni = {
    .name = "vnni",
    .supported = has_vnni,
    .kernels.product = product_vnni,
    .kernels.scale_sums = scale_sums_vnni,
};
#endif
