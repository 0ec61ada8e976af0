/* Cells of recurrent layers on AVX2 and FMA: eight hidden units at a time; see recurrent.c. */
#if defined(__x86_64__)
#include "arch/avx2.h"

#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE AVX2 static inline __attribute__((always_inline))

/* min and max return the second operand where one is NaN. */
INLINE __m256 exponential(__m256 x) {
    const __m256 shift = _mm256_set1_ps(OCS_SHIFT);
    x = _mm256_max_ps(_mm256_set1_ps(OCS_EXP_LEAST), _mm256_min_ps(_mm256_set1_ps(OCS_EXP_MOST), x));
    const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(OCS_LOG2_E), shift), n = _mm256_sub_ps(shifted, shift);
    const __m256 high = _mm256_fmadd_ps(n, _mm256_set1_ps(-OCS_LN_2_HIGH), x);
    const __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-OCS_LN_2_LOW), high);
    __m256 sum = _mm256_set1_ps(OCS_EXP_TERMS[0]);
    for (int i = 1; i < OCS_EXP_DEGREE + 1; ++i) {
        sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(OCS_EXP_TERMS[i]));
    }
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
}

INLINE __m256 sigmoid(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), minus = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
    return _mm256_div_ps(one, _mm256_add_ps(one, exponential(minus)));
}

INLINE __m256 hyperbolic_tangent(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f), two = _mm256_set1_ps(2.0f);
    return _mm256_sub_ps(one, _mm256_div_ps(two, _mm256_add_ps(one, exponential(_mm256_mul_ps(two, x)))));
}

INLINE __m256 gate(const float *from_x, const float *from_h) {
    return _mm256_add_ps(_mm256_loadu_ps(from_x), _mm256_loadu_ps(from_h));
}

INLINE void lstm_cells(float *h, float *c, const float *from_x, const float *from_h, int64_t H) {
    const __m256 i = sigmoid(gate(from_x, from_h)), f = sigmoid(gate(from_x + H, from_h + H));
    const __m256 g = hyperbolic_tangent(gate(from_x + 2 * H, from_h + 2 * H));
    const __m256 o = sigmoid(gate(from_x + 3 * H, from_h + 3 * H));
    const __m256 next = _mm256_fmadd_ps(f, _mm256_loadu_ps(c), _mm256_mul_ps(i, g));
    _mm256_storeu_ps(c, next);
    _mm256_storeu_ps(h, _mm256_mul_ps(o, hyperbolic_tangent(next)));
}

INLINE void gru_cells(float *h, const float *from_x, const float *from_h, int64_t H) {
    const __m256 r = sigmoid(gate(from_x, from_h)), z = sigmoid(gate(from_x + H, from_h + H));
    const __m256 of_h = _mm256_loadu_ps(from_h + 2 * H), of_x = _mm256_loadu_ps(from_x + 2 * H);
    const __m256 n = hyperbolic_tangent(_mm256_fmadd_ps(r, of_h, of_x));
    _mm256_storeu_ps(h, _mm256_fmadd_ps(z, _mm256_sub_ps(_mm256_loadu_ps(h), n), n));
}

AVX2 void ocs_cell_avx2(float *restrict h, float *restrict c, const float *from_x, const float *from_h, int64_t H,
                        int64_t first, int64_t last, ocs_cell_kind kind) {
    int64_t u = first;
    for (; u + 8 <= last; u += 8) {
        switch (kind) {
        case OCS_LSTM: lstm_cells(h + u, c + u, from_x + u, from_h + u, H); break;
        case OCS_GRU: gru_cells(h + u, from_x + u, from_h + u, H); break;
        case OCS_RNN_TANH: _mm256_storeu_ps(h + u, hyperbolic_tangent(gate(from_x + u, from_h + u))); break;
        default: _mm256_storeu_ps(h + u, _mm256_max_ps(_mm256_setzero_ps(), gate(from_x + u, from_h + u)));
        }
    }
    ocs_cell_ref(h, c, from_x, from_h, H, u, last, kind);
}
#endif
