/* The inner kernels: one thread's part of each entry of ocs.h, in variants for instruction sets; and what entries
 * share.
 *
 * kernels.def lists them. The variants `ocs_<kernel>_ref` read like the equations and define the result; those in arch/
 * must equal them bit for bit. Arguments: outputs, inputs, sizes, parameters.
 */
#ifndef OCS_KERNELS_H
#define OCS_KERNELS_H

#include "ocs.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

/* What a split plan says of each column, so that one loop serves every K (columns.c). An expanded row is [M] columns:
   the row's own N = C K, then M - N = S K of the copies.

   Column j of the split row is clamp(floor((floor(2 u) + addend[j]) / (odd[j] 2^shift[j]))), where u is the grid-unit
   weight of column j itself (j < N) or of column index[j - N]. With U = floor(2 u),

       floor((u + 1/2 + i) / n) = floor((U + 1 + 2 i) / (2 n))    part i of n, quantization-aware
       floor(u / n + 1/2)       = floor((U + n)       / (2 n))    naive

   because floor(x / ab) = floor(floor(x / a) / b). So a copy costs one addition and one shift, and where n is no power
   of two, one division. Doubling a float and taking its floor are exact. */
typedef struct {
    int64_t N, M;
    int32_t *index;  /* [M - N] */
    int32_t *addend; /* [M] */
    int32_t *shift;  /* [M] */
    int32_t *odd;    /* [M], or NULL where all are 1 */
} ocs_columns;

/* --- The table -------------------------------------------------------------------------------- */

/* One variant of every kernel, or of some: NULL where the instruction set has nothing better than the one before it. */
typedef struct {
#define OCS_KERNEL(type, name, parameters) type(*name) parameters;
#include "kernels.def"
#undef OCS_KERNEL
} ocs_kernels;

/* What a file in arch/ offers. */
typedef struct {
    const char *name;
    bool (*supported)(void); /* by this CPU */
    ocs_kernels kernels;
} ocs_instruction_set;

#define OCS_KERNEL(type, name, parameters) type ocs_##name##_ref parameters;
#include "kernels.def"
#undef OCS_KERNEL

/* The best variant of every kernel within the instruction set in use. */
const ocs_kernels *ocs_kernel_table(void);

/* --- Elements --------------------------------------------------------------------------------- */

/* The bits of |x|: for non-negative floats they order as the values do, with Inf and NaN above all numbers. */
static inline uint32_t ocs_abs_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

/* Eight bins to the octave: exponent and three bits of the fraction. */
static inline int32_t ocs_octave_bin(float x) {
    return (int32_t)(ocs_abs_bits(x) >> 20);
}

/* max(max, |x|) in that order, for max >= 0. */
static inline float ocs_larger_abs(float max, float x) {
    return ocs_abs_bits(x) > ocs_abs_bits(max) ? fabsf(x) : max;
}

/* One element of error_sums, which belongs to this lane; and what the lanes add up to. */
static inline void ocs_add_error(double lanes[5][4], int64_t lane, float w, float w_hat) {
    const double v = w, d = (double)w_hat - v;
    lanes[0][lane] += v * v;
    lanes[1][lane] += v;
    lanes[2][lane] += d * d;
    lanes[3][lane] += d;
    lanes[4][lane] += d * v;
}

static inline void ocs_sum_lanes(double sum[5], double lanes[5][4]) {
    for (int s = 0; s < 5; ++s) {
        sum[s] = lanes[s][0] + lanes[s][1] + lanes[s][2] + lanes[s][3];
    }
}

/* floor(2 w / scale), saturated far outside every grid: 2^30 >> 23 is still above qmax. NaN becomes the upper limit. */
#define OCS_HALF_STEPS_LIMIT 1073741824.0f
static inline int32_t ocs_half_steps(float w, float scale) {
    float halves = floorf(2.0f * (w / scale));
    halves = halves < OCS_HALF_STEPS_LIMIT ? halves : OCS_HALF_STEPS_LIMIT;
    return (int32_t)(halves > -OCS_HALF_STEPS_LIMIT ? halves : -OCS_HALF_STEPS_LIMIT);
}

/* One column of a split row; >> of a negative number is arithmetic in every compiler that we build with. */
static inline int8_t ocs_split_column(int32_t half_steps, int32_t addend, int32_t shift, int32_t odd, int32_t qmax) {
    int32_t q = (half_steps + addend) >> shift;
    if (odd > 1) {
        q = q / odd - (q % odd < 0);
    }
    q = q > qmax ? qmax : q;
    return (int8_t)(q < -qmax ? -qmax : q);
}

/* memcpy, also of no bytes at NULL. */
static inline void ocs_copy(void *restrict to, const void *restrict from, int64_t bytes) {
    if (bytes > 0) {
        memcpy(to, from, (size_t)bytes);
    }
}

/* Zeros, also no bytes at NULL. */
static inline void ocs_clear(void *x, int64_t bytes) {
    if (bytes > 0) {
        memset(x, 0, (size_t)bytes);
    }
}

/* --- Status ----------------------------------------------------------------------------------- */

/* Returns from the function if the status that an expression has is a bad one. */
#define OCS_TRY(expression)                                                                                            \
    do {                                                                                                               \
        const ocs_status status_of_expression = (expression);                                                          \
        if (status_of_expression != OCS_OK) {                                                                          \
            return status_of_expression;                                                                               \
        }                                                                                                              \
    } while (0)

/* --- Threads (host.c) ------------------------------------------------------------------------- */

/* A thread's part of the work: items begin .. end - 1 of what ctx describes. */
typedef struct {
    int64_t begin, end;
    void *ctx;
    void *scratch;     /* memory of its own */
    ocs_status status; /* OCS_OK, which the work may change */
} ocs_range;

typedef void (*ocs_work_fn)(ocs_range *range);

/* Runs `work` over 0 .. n - 1 as the host does, each range with `scratch` bytes (NULL for 0). Returns a status that is
   not OCS_OK where a range had one, OCS_NO_MEMORY where it got no scratch memory. */
ocs_status ocs_parallel_for(int64_t n, int64_t grain, size_t scratch, ocs_work_fn work, void *ctx);

/* Runs `work` over one range, in the thread that calls. */
ocs_status ocs_run_range(int64_t begin, int64_t end, size_t scratch, ocs_work_fn work, void *ctx);

/* --- Threads that stay together (team.c) ------------------------------------------------------ */

typedef struct ocs_team ocs_team;

typedef struct {
    ocs_team *team;
    int64_t number, most; /* of the members; how many pieces a step has at most */
    int64_t step;         /* the next of those it goes through */
} ocs_member;

typedef ocs_status (*ocs_member_fn)(ocs_member *member, void *ctx);

/* Runs fn in the host's threads, as many as steps of `size` elements are worth. Each member makes the same calls of
   ocs_parallel_in; what they share is written in these alone. Returns a status that is not OCS_OK where fn had one. */
ocs_status ocs_with_team(int64_t size, ocs_member_fn fn, void *ctx);

/* The next step: ocs_parallel_for, run by the members together, over when it returns. Without a member, by the host. */
ocs_status ocs_parallel_in(ocs_member *member, int64_t n, int64_t grain, size_t scratch, ocs_work_fn work, void *ctx);

/* Elements that are worth a thread of their own. */
#define OCS_GRAIN 32768

/* How many items of `size` elements each make a grain. */
static inline int64_t ocs_grain(int64_t size) {
    return size >= OCS_GRAIN ? 1 : OCS_GRAIN / (size > 1 ? size : 1);
}

/* --- Histograms (histogram.c) ----------------------------------------------------------------- */

/* A thread's histograms of the same values: neighbours are counted in different ones. Two of 2048 bins leave half of a
   first-level cache of 32 KB to what is counted. */
#define OCS_COUNTS 2

/* What a thread may count in 32 bits before it adds to the 64-bit counts. */
#define OCS_MOST_COUNTED (INT64_C(1) << 30)

/* Adds a thread's counts in parts [parts][size] to those [size] that all share; no order changes a sum of integers. */
void ocs_add_counts(int64_t *counts, const uint32_t *parts_of_counts, int64_t size, int parts);

/* OCS_BAD_BINS unless there are 1 .. most bins, and every limit [R] is finite and not negative; what ocs_check_sizes
   says of [R, bins]. */
ocs_status ocs_check_histogram(int64_t bins, int64_t most, const float *limit, int64_t R);

/* --- Weights (columns.c) ---------------------------------------------------------------------- */

/* OCS_BAD_SCALE unless every scale, one or O, is positive and finite; OCS_BAD_SHAPE for another stride. */
ocs_status ocs_check_scale(ocs_scale scale, int64_t O);

/* OCS_BAD_SHAPE unless sizes and groups are those of a weight; OCS_TOO_LARGE as ocs_check_sizes. */
ocs_status ocs_check_shape(const ocs_shape *shape);

/* OCS_BAD_SHAPE where a size is negative, OCS_TOO_LARGE where one, or a b c, is above OCS_MAX_ELEMENTS: what is
   allocated and indexed by sizes that passed cannot wrap around. For an array of fewer axes the others are 1. */
ocs_status ocs_check_sizes(int64_t a, int64_t b, int64_t c);

/* The scale of output channel o. */
static inline float ocs_scale_of(ocs_scale scale, int64_t o) {
    return scale.value[o * scale.stride];
}

/* Output channels that gptq.c rounds side by side. */
#define OCS_SIDE_BY_SIDE 16

/* A weight's output channels, for the entries that work row by row. */
typedef struct {
    const ocs_kernels *kernels;
    const ocs_shape *shape;
    ocs_columns columns; /* of every group, one after the other */
} ocs_rows;

/* Checks shape and plan, and makes the columns. plan->parts may be NULL (of the columns only index is then made),
   plan->offset too (naive splitting). There is nothing to free after an error. */
ocs_status ocs_rows_begin(ocs_rows *rows, const ocs_plan *plan, const ocs_shape *shape);
void ocs_rows_end(ocs_rows *rows);

/* odd[m], 1 where there is none. */
static inline int32_t ocs_odd_of(const ocs_columns *columns, int64_t m) {
    return columns->odd == NULL ? 1 : columns->odd[m];
}

/* Of how many parts column m is one. */
static inline int32_t ocs_parts_of(const ocs_columns *columns, int64_t m) {
    return ocs_odd_of(columns, m) << (columns->shift[m] - 1);
}

/* The columns of group g, and of the group of output channel o. */
ocs_columns ocs_columns_of_group(const ocs_rows *rows, int64_t g);
ocs_columns ocs_columns_of_row(const ocs_rows *rows, int64_t o);

/* next [C + S]: the next part of the same channel of group g, -1 after its last. Reads the columns, which were checked,
   not the plan, which another thread could have changed since. */
void ocs_link_parts(int32_t *next, const ocs_rows *rows, int64_t g);

/* --- Products (product.c) --------------------------------------------------------------------- */

#define OCS_TILE_OUTPUTS 16
#define OCS_TILE_CHANNELS 32
#define OCS_TILE_CODES (OCS_TILE_OUTPUTS * OCS_TILE_CHANNELS)
#define OCS_LINE_CHANNELS 4
#define OCS_TILE_LINE 64 /* bytes: four channels of all outputs */
#define OCS_TILE_LINES (OCS_TILE_CHANNELS / OCS_LINE_CHANNELS)
#define OCS_MOST_ROWS 48 /* of integers that share each read of a block of weights, or blocks of one row */

/* The size of a whole tile of `bits` bits in bytes. */
static inline int64_t ocs_tile_bytes(int bits) {
    return (int64_t)OCS_TILE_LINE * bits;
}

/* The size of the fields of `width` bits of so many lines: of a tile's plane, say. */
static inline int64_t ocs_plane_bytes(int64_t lines, int width) {
    return (lines * width + 7) / 8 * OCS_TILE_LINE;
}

/* The size of all tiles of 16 outputs. */
int64_t ocs_block_bytes(int64_t E, int bits);

/* ceil(a / b) for a >= 0. */
static inline int64_t ocs_ceil_div(int64_t a, int64_t b) {
    return a / b + (a % b != 0);
}

/* How many groups of channels have scales of their own. */
static inline int64_t ocs_group_count(const ocs_packed_weight *w) {
    return w->group > 0 ? ocs_ceil_div(w->C + w->S, w->group) : 1;
}

/* The scales [groups, 16] of a block of outputs, where groups have their own. */
static inline const float *ocs_scales_of_block(const ocs_packed_weight *w, int64_t block) {
    return w->scale.value + block * ocs_group_count(w) * OCS_TILE_OUTPUTS;
}

/* Lines of the next tile where V are left. */
static inline int ocs_tile_lines(int64_t V) {
    return V < OCS_TILE_LINES ? (int)V : OCS_TILE_LINES;
}

/* What is wrong with a weight's sizes and scales, if anything is. */
ocs_status ocs_check_packed(const ocs_packed_weight *weight);

/* OCS_BAD_BITS or OCS_BAD_SCALE unless rows can be rounded so. */
ocs_status ocs_check_grid(ocs_row_grid grid);

/* Gives a weight copies of its own, in memory [S], and checks these: another thread could change the ones given.
   OCS_BAD_PLAN: one is no channel. */
ocs_status ocs_own_copies(ocs_packed_weight *weight, int32_t *memory);

/* The bytes of scratch memory that ocs_product_in needs for up to R rows. */
size_t ocs_product_scratch(const ocs_packed_weight *weight, int64_t R);

/* ocs_product of float32 rows and a weight that was checked and has copies of its own, by a team; the scratch memory is
   for R rows or more. */
ocs_status ocs_product_in(ocs_member *member, void *scratch, float *y, const float *x, const float *bias,
                          const ocs_packed_weight *weight, ocs_row_grid grid, int64_t R);

/* --- Recurrent layers (recurrent.c) ----------------------------------------------------------- */

/* e^x = 2^n e^r, where all variants take the same steps. */
#define OCS_EXP_MOST 88.0f
#define OCS_EXP_LEAST -87.0f
#define OCS_LOG2_E 1.44269504f
#define OCS_LN_2_HIGH 0.693359375f /* nine bits: n times it is exact */
#define OCS_LN_2_LOW -2.12194440e-4f
#define OCS_SHIFT 12582912.0f /* 1.5 2^23: what is added to it is rounded to an integer */
#define OCS_EXP_DEGREE 7
static const float OCS_EXP_TERMS[OCS_EXP_DEGREE + 1] = {
    1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f,
}; /* 1 / i!, the highest first */

#endif
