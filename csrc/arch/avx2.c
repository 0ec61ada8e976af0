/* The AVX2 variants: eight floats at a time, the rest by the plain kernels, every result equal to theirs bit for bit.

   Only the functions below are compiled for AVX2; the build needs no flags, and the table in dispatch.c keeps other
   CPUs away from them. */
#if defined(__x86_64__)
#include "arch/avx2.h"

#define AVX2 __attribute__((target("avx2,fma")))
#define LOOP AVX2 static inline
#define INLINE LOOP __attribute__((always_inline))
#define V(name) _mm256_##name

enum { LANES = 8 };
typedef __m256 floats;
typedef __m256i ints;
#include "arch/loops_x86.h"

INLINE ints int_load(const void *x) {
    return _mm256_loadu_si256(x);
}

INLINE void int_store(void *to, ints x) {
    _mm256_storeu_si256(to, x);
}

INLINE ints abs_bits(floats x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

INLINE floats magnitude(floats x) {
    return _mm256_castsi256_ps(abs_bits(x));
}

INLINE ints signed_as(ints n, floats x) {
    const ints normal = _mm256_cmpgt_epi32(abs_bits(x), _mm256_set1_epi32(0x7fffff));
    return _mm256_sign_epi32(_mm256_and_si256(n, normal),
                             _mm256_or_si256(_mm256_castps_si256(x), _mm256_set1_epi32(1)));
}

INLINE int64_t keep(uint32_t *to, ints n, ints usual) {
    int_store(to, n);
    (void)usual;
    return LANES;
}

INLINE floats gather(const float *from, const int32_t *index) {
    return _mm256_i32gather_ps(from, int_load(index), 4);
}

/* In doubles; see loops.h. */
INLINE ints floor_divide(ints x, const int32_t *odd) {
    const ints by = int_load(odd), above = _mm256_sub_epi32(by, _mm256_set1_epi32(1));
    if (_mm256_testz_si256(above, above)) {
        return x;
    }
    const __m256d low =
        _mm256_div_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)), _mm256_cvtepi32_pd(_mm256_castsi256_si128(by)));
    const __m256d high = _mm256_div_pd(_mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1)),
                                       _mm256_cvtepi32_pd(_mm256_extracti128_si256(by, 1)));
    return _mm256_set_m128i(_mm256_cvttpd_epi32(_mm256_floor_pd(high)), _mm256_cvttpd_epi32(_mm256_floor_pd(low)));
}

INLINE void store_bytes(uint8_t *bytes, const ints x[4]) {
    ints low[4];
    for (int j = 0; j < 4; ++j) {
        low[j] = _mm256_and_si256(x[j], _mm256_set1_epi32(0xff));
    }
    const ints words01 = _mm256_packus_epi32(low[0], low[1]), words23 = _mm256_packus_epi32(low[2], low[3]);
    const ints order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    int_store(bytes, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words01, words23), order));
}

/* The processor fetches memory ahead only within a page. Past the end, this does nothing. */
INLINE void fetch_ahead(const float *x, float *x_hat) {
    enum { AHEAD = 256 };
    __builtin_prefetch(x + AHEAD);
    __builtin_prefetch(x_hat + AHEAD, 1);
}

#include "arch/loops.h"

/* --- Weights ---------------------------------------------------------------------------------- */

AVX2 static inline __m256 load_bytes(const void *q, bool is_signed) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)q);
    return _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}

AVX2 static void dequantize_avx2(float *restrict x, const uint8_t *q, int64_t N, float scale, bool is_signed) {
    const __m256 scales = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= N; i += 8) {
        _mm256_storeu_ps(x + i, _mm256_mul_ps(load_bytes(q + i, is_signed), scales));
    }
    ocs_dequantize_ref(x + i, q + i, N - i, scale, is_signed);
}

AVX2 static void fold_row_avx2(float *restrict w_hat, const int8_t *q, const int32_t *index, int64_t N, int64_t M,
                               float scale) {
    const bool once = M == N || scale == 1.0f; /* no copies, or nothing to scale by: one pass does it */
    dequantize_avx2(w_hat, (const uint8_t *)q, N, once ? scale : 1.0f, true);
    for (int64_t m = N; m < M; ++m) {
        w_hat[index[m - N]] += (float)q[m];
    }
    const __m256 scales = _mm256_set1_ps(scale);
    int64_t i = once ? N : 0;
    for (; i + 8 <= N; i += 8) {
        _mm256_storeu_ps(w_hat + i, _mm256_mul_ps(_mm256_loadu_ps(w_hat + i), scales));
    }
    for (; i < N; ++i) {
        w_hat[i] *= scale;
    }
}

/* sum[0], sum[1]: lanes 0 .. 3 and 4 .. 7 of the eight partial sums, in double. */
AVX2 static inline void add_squares(__m256d sum[2], __m256 x) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    sum[0] = _mm256_add_pd(sum[0], _mm256_mul_pd(low, low));
    sum[1] = _mm256_add_pd(sum[1], _mm256_mul_pd(high, high));
}

AVX2 static void squared_error_avx2(double error[2], const float *x, const float *q, int64_t N, float scale) {
    const __m256 scales = _mm256_set1_ps(scale);
    __m256d signal[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    __m256d noise[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    int64_t i = 0;
    for (; i + 8 <= N; i += 8) {
        const __m256 xs = _mm256_loadu_ps(x + i);
        add_squares(signal, xs);
        add_squares(noise, _mm256_sub_ps(xs, _mm256_mul_ps(_mm256_loadu_ps(q + i), scales)));
    }
    if (i < N) { /* the rest is filled with zeros, which add nothing */
        float x8[8] = {0.0f}, q8[8] = {0.0f};
        memcpy(x8, x + i, (size_t)(N - i) * sizeof *x);
        memcpy(q8, q + i, (size_t)(N - i) * sizeof *q);
        const __m256 xs = _mm256_loadu_ps(x8);
        add_squares(signal, xs);
        add_squares(noise, _mm256_sub_ps(xs, _mm256_mul_ps(_mm256_loadu_ps(q8), scales)));
    }
    double lanes[2][8];
    for (int half = 0; half < 2; ++half) {
        _mm256_storeu_pd(lanes[0] + 4 * half, signal[half]);
        _mm256_storeu_pd(lanes[1] + 4 * half, noise[half]);
    }
    for (int lane = 0; lane < 8; ++lane) {
        error[0] += lanes[0][lane];
        error[1] += lanes[1][lane];
    }
}

AVX2 static void error_sums_avx2(double sum[5], const float *w, const float *q, int64_t N, float scale) {
    __m256d sums[5];
    double lanes[5][4];
    int64_t i = 0;
    for (int s = 0; s < 5; ++s) {
        sums[s] = _mm256_setzero_pd();
    }
    for (; i + 4 <= N; i += 4) {
        const __m256d v = _mm256_cvtps_pd(_mm_loadu_ps(w + i));
        const __m256d v_hat = _mm256_cvtps_pd(_mm_mul_ps(_mm_loadu_ps(q + i), _mm_set1_ps(scale)));
        const __m256d d = _mm256_sub_pd(v_hat, v);
        sums[0] = _mm256_add_pd(sums[0], _mm256_mul_pd(v, v));
        sums[1] = _mm256_add_pd(sums[1], v);
        sums[2] = _mm256_add_pd(sums[2], _mm256_mul_pd(d, d));
        sums[3] = _mm256_add_pd(sums[3], d);
        sums[4] = _mm256_add_pd(sums[4], _mm256_mul_pd(d, v));
    }
    for (int s = 0; s < 5; ++s) {
        _mm256_storeu_pd(lanes[s], sums[s]);
    }
    for (; i < N; ++i) {
        ocs_add_error(lanes, i % 4, w[i], q[i] * scale);
    }
    ocs_sum_lanes(sum, lanes);
}

/* Four columns of sixteen output channels are what the registers hold. */
AVX2 static inline void sums_of_sixteen(float *restrict sum, const float *error, const float *factor, int64_t J,
                                        int64_t stride) {
    __m256 sums[4][2];
    for (int c = 0; c < 4; ++c) {
        sums[c][0] = sums[c][1] = _mm256_setzero_ps();
    }
    for (int64_t j = 0; j < J; ++j, error += OCS_SIDE_BY_SIDE) {
        const __m256 low = _mm256_loadu_ps(error), high = _mm256_loadu_ps(error + 8);
        for (int c = 0; c < 4; ++c) {
            const __m256 weight = _mm256_broadcast_ss(factor + c * stride + j);
            sums[c][0] = _mm256_add_ps(sums[c][0], _mm256_mul_ps(low, weight));
            sums[c][1] = _mm256_add_ps(sums[c][1], _mm256_mul_ps(high, weight));
        }
    }
    for (int c = 0; c < 4; ++c) {
        _mm256_storeu_ps(sum + c * OCS_SIDE_BY_SIDE, sums[c][0]);
        _mm256_storeu_ps(sum + c * OCS_SIDE_BY_SIDE + 8, sums[c][1]);
    }
}

AVX2 static void weighted_sums_avx2(float *restrict sum, const float *error, const float *factor, int64_t columns,
                                    int64_t J, int64_t stride) {
    if (columns < 4) {
        ocs_weighted_sums_ref(sum, error, factor, columns, J, stride);
        return;
    }
    for (int r = 0; r < OCS_SIDE_BY_SIDE; r += 16) {
        sums_of_sixteen(sum + r, error + r, factor, J, stride);
    }
}
_Static_assert(OCS_SIDE_BY_SIDE % 16 == 0, "as weighted_sums_avx2 has it");

/* --- k bits ----------------------------------------------------------------------------------- */

/* A run of eight codes is one 64-bit lane. Fields of 8, 16, then 32 bits are joined in pairs: the upper moves down to
   where the lower ends. Each mask keeps the lower field of a pair. */
AVX2 static inline __m256i join_fields(__m256i x, __m256i mask, int field, int bits) {
    const __m256i lower = _mm256_and_si256(x, mask), upper = _mm256_andnot_si256(mask, x);
    return _mm256_or_si256(lower, _mm256_srl_epi64(upper, _mm_cvtsi32_si128(field - bits)));
}

/* The largest of 32 bytes. */
AVX2 static inline uint8_t largest_byte(__m256i x) {
    uint8_t bytes[32], largest = 0;
    _mm256_storeu_si256((__m256i *)bytes, x);
    for (int i = 0; i < 32; ++i) {
        largest = bytes[i] > largest ? bytes[i] : largest;
    }
    return largest;
}

static inline uint8_t larger_byte(uint8_t a, uint8_t b) {
    return a > b ? a : b;
}

/* Four runs at once. A run is stored as eight bytes, of which the next one overwrites 8 - bits: the last runs, which
   would write past the end, are left to the plain kernel. */
AVX2 static uint8_t pack_avx2(uint8_t *restrict packed, const int8_t *q, int64_t N, int bits) {
    const __m256i qmax = _mm256_set1_epi8((char)ocs_qmax(bits));
    const __m256i bytes = _mm256_set1_epi16(0x00ff), words = _mm256_set1_epi32(0xffff);
    const __m256i halves = _mm256_set1_epi64x(0xffffffff);
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0, at = 0;
    for (; at + 3 * bits + 8 <= N / 8 * bits; i += 32, at += 4 * bits) {
        const __m256i codes = _mm256_add_epi8(_mm256_loadu_si256((const __m256i *)(q + i)), qmax);
        largest = _mm256_max_epu8(largest, codes);
        const __m256i runs =
            join_fields(join_fields(join_fields(codes, bytes, 8, bits), words, 16, 2 * bits), halves, 32, 4 * bits);
        uint64_t run[4];
        _mm256_storeu_si256((__m256i *)run, runs);
        for (int j = 0; j < 4; ++j) {
            memcpy(packed + at + j * bits, &run[j], sizeof run[j]);
        }
    }
    return larger_byte(largest_byte(largest), ocs_pack_ref(packed + at, q + i, N - i, bits));
}

/* Fields are parted in pairs: the upper of two fields of `bits` moves up to where it begins once unpacked. */
AVX2 static inline __m256i part_fields(__m256i x, __m256i mask, int field, int bits) {
    const __m128i distance = _mm_cvtsi32_si128(field - bits);
    const __m256i lower = _mm256_and_si256(mask, _mm256_srl_epi64(mask, distance));
    const __m256i upper = _mm256_sll_epi64(lower, _mm_cvtsi32_si128(field));
    return _mm256_or_si256(_mm256_and_si256(x, lower), _mm256_and_si256(_mm256_sll_epi64(x, distance), upper));
}

AVX2 static uint8_t unpack_avx2(int8_t *restrict q, const uint8_t *packed, int64_t N, int bits) {
    const __m256i qmax = _mm256_set1_epi8((char)ocs_qmax(bits));
    const __m256i bytes = _mm256_set1_epi16(0x00ff), words = _mm256_set1_epi32(0xffff);
    const __m256i halves = _mm256_set1_epi64x(0xffffffff);
    __m256i largest = _mm256_setzero_si256();
    int64_t i = 0, at = 0;
    for (; at + 3 * bits + 8 <= N / 8 * bits; i += 32, at += 4 * bits) {
        uint64_t run[4];
        for (int j = 0; j < 4; ++j) {
            memcpy(&run[j], packed + at + j * bits, sizeof run[j]);
        }
        const __m256i runs = _mm256_loadu_si256((const __m256i *)run);
        const __m256i codes =
            part_fields(part_fields(part_fields(runs, halves, 32, 4 * bits), words, 16, 2 * bits), bytes, 8, bits);
        largest = _mm256_max_epu8(largest, codes);
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_sub_epi8(codes, qmax));
    }
    return larger_byte(largest_byte(largest), ocs_unpack_ref(q + i, packed + at, N - i, bits));
}

static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

const ocs_instruction_set ocs_isa_avx2 = {
    .name = "avx2",
    .supported = has_avx2,
    .kernels.abs_max = abs_max,
    .kernels.scaled_max = scaled_max,
    .kernels.channel_max = channel_max,
    .kernels.histogram = histogram,
    .kernels.signed_histogram = signed_histogram,
    .kernels.octave_histogram = octave_histogram,
    .kernels.quantize_row = quantize_row,
    .kernels.fold_row = fold_row_avx2,
    .kernels.weighted_sums = weighted_sums_avx2,
    .kernels.squared_error = squared_error_avx2,
    .kernels.error_sums = error_sums_avx2,
    .kernels.quantize = quantize,
    .kernels.dequantize = dequantize_avx2,
    .kernels.fake_quantize = fake_quantize,
    .kernels.pack = pack_avx2,
    .kernels.unpack = unpack_avx2,
    .kernels.unpack_tile = ocs_unpack_tile_avx2,
    .kernels.product = ocs_product_avx2,
    .kernels.cut_row = ocs_cut_row_avx2,
    .kernels.cell = ocs_cell_avx2,
};
#endif
