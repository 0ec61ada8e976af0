/* The AVX-512 variants that are faster than those for AVX2; every result equals that of the plain kernels. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,popcnt")))
#define LOOP AVX512 static inline
#define INLINE LOOP __attribute__((always_inline))
#define V(name) _mm512_##name

enum { LANES = 16 };
typedef __m512 floats;
typedef __m512i ints;
#include "arch/loops_x86.h"

INLINE ints int_load(const void *x) {
    return _mm512_loadu_si512(x);
}

INLINE void int_store(void *to, ints x) {
    _mm512_storeu_si512(to, x);
}

INLINE ints abs_bits(floats x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

INLINE floats magnitude(floats x) {
    return _mm512_castsi512_ps(abs_bits(x));
}

INLINE ints signed_as(ints n, floats x) {
    const __mmask16 normal = _mm512_cmpgt_epi32_mask(abs_bits(x), _mm512_set1_epi32(0x7fffff));
    const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
    return _mm512_mask_sub_epi32(_mm512_maskz_mov_epi32(normal, n), normal & negative, int_all(0), n);
}

INLINE int64_t keep(uint32_t *to, ints n, ints usual) {
    const __mmask16 others = _mm512_cmpneq_epi32_mask(n, usual);
    int_store(to, _mm512_maskz_compress_epi32(others, n));
    return __builtin_popcount(others);
}

INLINE floats gather(const float *from, const int32_t *index) {
    return _mm512_i32gather_ps(int_load(index), from, 4);
}

/* In doubles; see loops.h. */
INLINE ints floor_divide(ints x, const int32_t *odd) {
    const ints by = int_load(odd);
    if (_mm512_cmpneq_epi32_mask(by, _mm512_set1_epi32(1)) == 0) {
        return x;
    }
    __m256i halves[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i above = i == 0 ? _mm512_castsi512_si256(x) : _mm512_extracti64x4_epi64(x, 1);
        const __m256i below = i == 0 ? _mm512_castsi512_si256(by) : _mm512_extracti64x4_epi64(by, 1);
        const __m512d exact = _mm512_div_pd(_mm512_cvtepi32_pd(above), _mm512_cvtepi32_pd(below));
        halves[i] = _mm512_cvttpd_epi32(_mm512_floor_pd(exact));
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
}

INLINE void store_bytes(uint8_t *bytes, const ints x[4]) {
    for (int j = 0; j < 4; ++j) {
        _mm_storeu_si128((__m128i *)(bytes + LANES * j), _mm512_cvtepi32_epi8(x[j]));
    }
}

/* It only got in the way. */
INLINE void fetch_ahead(const float *x, float *x_hat) {
    (void)x, (void)x_hat;
}

#include "arch/loops.h"

static bool has_avx512(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("popcnt");
}

const ocs_instruction_set ocs_isa_avx512 = {
    .name = "avx512",
    .supported = has_avx512,
    .kernels.histogram = histogram,
    .kernels.signed_histogram = signed_histogram,
    .kernels.octave_histogram = octave_histogram,
    .kernels.quantize_row = quantize_row,
    .kernels.quantize = quantize,
    .kernels.fake_quantize = fake_quantize,
};
#endif
