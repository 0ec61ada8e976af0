/* The inner kernels: one thread's part of each entry of ocs.h, with a plain and an AVX2 variant.
 *
 * The table below is the list of kernels. The variants `ocs_<kernel>_ref` read like the equations and define the
 * result; `ocs_<kernel>_avx2` (kernels_avx2.c) must equal them bit for bit. Arguments: outputs, inputs, sizes,
 * parameters.
 */
#ifndef OCS_KERNELS_H
#define OCS_KERNELS_H

#include "ocs.h"

#include <math.h>
#include <string.h>

/* What a split plan says of each column, so that one loop serves every K. An expanded row is [M] columns: the row's own
   N = C K, then M - N = S K of the copies.

   Column j of the split row is clamp((floor(2 u) + addend[j]) >> shift[j]), where u is the grid-unit weight of column j
   itself (j < N) or of column index[j - N]. So a copy costs one addition and one shift: with U = floor(2 u), depth m,

       floor((u + 1/2 + i) / 2^m) = (U + 1 + 2 i) >> (m + 1)    part i of 2^m, quantization-aware
       floor(u / 2^m + 1/2)       = (U + 2^m)     >> (m + 1)    naive

   because floor(x / 2^m) = floor(floor(x) / 2^m). Doubling a float and taking its floor are exact. */
typedef struct {
    int64_t N, M;
    int32_t *index;  /* [M - N] */
    int32_t *addend; /* [M] */
    int32_t *shift;  /* [M] */
} ocs_columns;

typedef struct {
    const char *isa;

    /* max |x| over x [N]; NaN or Inf where there is one. */
    float (*abs_max)(const float *x, int64_t N);

    /* max |x[i]| * factor[i] over x [N]. */
    float (*scaled_max)(const float *x, const float *factor, int64_t N);

    /* channel_max [C]: max over O rows and K columns of |w[o * stride + c * K + k]|. */
    void (*channel_max)(float *restrict channel_max, const float *w, int64_t O, int64_t C, int64_t K, int64_t stride);

    /* Adds to counts [4][bins], whose sum over the first axis is the histogram; N < 2^32. */
    void (*histogram)(uint32_t *restrict counts, const float *x, int64_t N, int64_t bins, float limit);

    /* Adds to counts[i * step + octave bin of x[i]], i < N; step 0 for one channel, else OCS_OCTAVE_BINS for N
       channels. base: the octave bin of limit, minus OCS_OCTAVE_BINS. */
    void (*octave_histogram)(uint32_t *restrict counts, const float *x, int64_t N, int64_t step, int32_t base);

    /* q [M] of one output channel w [N]. */
    void (*quantize_row)(int8_t *restrict q, const float *w, const ocs_columns *columns, float scale, int32_t qmax);

    /* w_hat [N] = scale * (q [M] with the copies added to their source). */
    void (*fold_row)(float *restrict w_hat, const int8_t *q, const int32_t *index, int64_t N, int64_t M, float scale);

    /* error[0] += sum x^2, error[1] += sum (x - q scale)^2: eight interleaved partial sums, then their sum in order. */
    void (*squared_error)(double error[2], const float *x, const float *q, int64_t N, float scale);

    void (*quantize)(uint8_t *restrict q, const float *x, int64_t N, float scale, float qmin, float qmax);
    void (*dequantize)(float *restrict x, const uint8_t *q, int64_t N, float scale, bool is_signed);
    void (*fake_quantize)(float *restrict x_hat, const float *x, int64_t N, float scale, float qmin, float qmax);

    /* N codes to and from ceil(N bits / 8) bytes, no byte more; both return the largest code. */
    uint8_t (*pack)(uint8_t *restrict packed, const int8_t *q, int64_t N, int bits);
    uint8_t (*unpack)(int8_t *restrict q, const uint8_t *packed, int64_t N, int bits);
} ocs_kernels;

/* The row of the table in use. */
const ocs_kernels *ocs_kernel_table(void);

/* Runs fn over 0 .. n - 1 as the host does. */
void ocs_parallel_for(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx);

extern const ocs_kernels ocs_kernels_avx2;

float ocs_abs_max_ref(const float *x, int64_t N);
float ocs_scaled_max_ref(const float *x, const float *factor, int64_t N);
void ocs_channel_max_ref(float *restrict channel_max, const float *w, int64_t O, int64_t C, int64_t K, int64_t stride);
void ocs_histogram_ref(uint32_t *restrict counts, const float *x, int64_t N, int64_t bins, float limit);
void ocs_octave_histogram_ref(uint32_t *restrict counts, const float *x, int64_t N, int64_t step, int32_t base);
void ocs_quantize_row_ref(int8_t *restrict q, const float *w, const ocs_columns *columns, float scale, int32_t qmax);
void ocs_fold_row_ref(float *restrict w_hat, const int8_t *q, const int32_t *index, int64_t N, int64_t M, float scale);
void ocs_squared_error_ref(double error[2], const float *x, const float *q, int64_t N, float scale);
void ocs_quantize_ref(uint8_t *restrict q, const float *x, int64_t N, float scale, float qmin, float qmax);
void ocs_dequantize_ref(float *restrict x, const uint8_t *q, int64_t N, float scale, bool is_signed);
void ocs_fake_quantize_ref(float *restrict x_hat, const float *x, int64_t N, float scale, float qmin, float qmax);
uint8_t ocs_pack_ref(uint8_t *restrict packed, const int8_t *q, int64_t N, int bits);
uint8_t ocs_unpack_ref(int8_t *restrict q, const uint8_t *packed, int64_t N, int bits);

/* The bits of |x|: for non-negative floats they order as the values do, with Inf and NaN above all numbers. */
static inline uint32_t ocs_abs_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

/* Eight bins to the octave: exponent and three bits of the fraction. */
static inline int32_t ocs_octave(float x) {
    return (int32_t)(ocs_abs_bits(x) >> 20);
}

/* max(max, |x|) in that order, for max >= 0. */
static inline float ocs_larger(float max, float x) {
    return ocs_abs_bits(x) > ocs_abs_bits(max) ? fabsf(x) : max;
}

/* floor(2 w / scale), saturated far outside every grid: 2^30 >> 23 is still above qmax. NaN becomes the upper limit. */
#define OCS_GRID_LIMIT 1073741824.0f
static inline int32_t ocs_grid2(float w, float scale) {
    float u2 = floorf(2.0f * (w / scale));
    u2 = u2 < OCS_GRID_LIMIT ? u2 : OCS_GRID_LIMIT;
    return (int32_t)(u2 > -OCS_GRID_LIMIT ? u2 : -OCS_GRID_LIMIT);
}

/* One column of a split row; >> of a negative number is arithmetic in every compiler that we build with. */
static inline int8_t ocs_split_column(int32_t u2, int32_t addend, int32_t shift, int32_t qmax) {
    int32_t q = (u2 + addend) >> shift;
    q = q > qmax ? qmax : q;
    return (int8_t)(q < -qmax ? -qmax : q);
}

/* --- What the entries share ------------------------------------------------------------------- */

/* Elements that are worth a thread of their own. */
#define OCS_GRAIN 32768

/* How many items of `size` elements each make a grain. */
static inline int64_t ocs_grain(int64_t size) {
    return size >= OCS_GRAIN ? 1 : OCS_GRAIN / (size > 1 ? size : 1);
}

/* Adds own [parts][size] to the counts [size] that all threads share: sums of integers are the same in any order. */
static inline void ocs_add_counts(int64_t *counts, const uint32_t *own, int64_t size, int parts) {
    for (int64_t i = 0; i < size; ++i) {
        int64_t sum = 0;
        for (int part = 0; part < parts; ++part) {
            sum += own[part * size + i];
        }
        if (sum != 0) {
            __atomic_fetch_add(&counts[i], sum, __ATOMIC_RELAXED);
        }
    }
}

/* Every limit of a histogram is finite and not negative. */
static inline bool ocs_limits_valid(const float *limit, int64_t R) {
    for (int64_t row = 0; row < R; ++row) {
        if (!isfinite(limit[row]) || limit[row] < 0.0f) {
            return false;
        }
    }
    return true;
}

ocs_status ocs_check_shape(const ocs_shape *shape);

/* Every one of them is positive and finite. */
ocs_status ocs_check_scale(const float *scale, int64_t count);

/* The columns of every group, one after the other: group g's are ocs_columns_group(&columns, g). plan->depth may be
   NULL (addend and shift are then not made), plan->offset too (naive splitting). Frees what it made on an error. */
ocs_status ocs_columns_make(ocs_columns *columns, const ocs_plan *plan, const ocs_shape *shape);
ocs_columns ocs_columns_group(const ocs_columns *columns, int64_t g);
void ocs_columns_free(ocs_columns *columns);

#endif
