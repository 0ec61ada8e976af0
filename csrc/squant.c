/* Data-free compensation of rounding errors: Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal
   Hessian Approximation", ICLR 2022, arXiv 2202.07471, its kernel-wise and channel-wise steps (section 3).

   Nearest rounding comes first, by the kernels of quantize.c. Then some integers move by one step, so that the errors
   of each filter, and those of each output channel, add up to about nothing. What moves is the sum of a channel's
   integers and its copies', as that is what the layer computes with; the moved sum is split again, which is exact.
   Errors are whole numbers of a 2^24th of a step, so that their sums are exact and no order of summation matters.
   Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

enum { STEP = 1 << 24, HALF_STEP = 1 << 23 };
#define ERROR_LIMIT 1073741824.0f /* 64 steps */

/* --- The largest of many ---------------------------------------------------------------------- */

/* A binary heap of the `wanted` largest keys that were offered, the least of them on top. Keys of larger sizes are
   larger, of equal ones that of the lower index. */
typedef struct {
    uint64_t *key;
    int64_t count, wanted;
} largest;

static uint64_t key_of(uint64_t size, int64_t index) {
    return size << 32 | (UINT32_MAX - (uint32_t)index);
}

static int64_t index_of(uint64_t key) {
    return UINT32_MAX - (uint32_t)key;
}

/* The size beyond which another is among the largest, if indices are offered in ascending order. */
static int64_t least_size(const largest *top) {
    return top->count < top->wanted ? 0 : (int64_t)(top->key[0] >> 32);
}

/* Takes one whose size is above least_size, in place of the least if there are enough. */
static void offer(largest *top, int64_t size, int64_t index) {
    const uint64_t key = key_of(size < INT32_MAX ? (uint64_t)size : INT32_MAX, index);
    uint64_t *heap = top->key;
    int64_t at = 0;
    if (top->count < top->wanted) {
        for (at = top->count++; at > 0 && key < heap[(at - 1) / 2]; at = (at - 1) / 2) {
            heap[at] = heap[(at - 1) / 2];
        }
    } else {
        for (int64_t child; (child = 2 * at + 1) < top->count; at = child) {
            child += child + 1 < top->count && heap[child + 1] < heap[child];
            if (heap[child] >= key) {
                break;
            }
            heap[at] = heap[child];
        }
    }
    heap[at] = key;
}

/* --- One output channel ----------------------------------------------------------------------- */

typedef struct {
    int64_t C, K;
    ocs_columns columns;       /* of the row's group, as are next, low and high */
    const int32_t *next;       /* [C + S]: the next part of the same channel, -1 after its last */
    const int32_t *low, *high; /* [C]: the range of a channel's sum */
    int32_t qmax;
    int8_t *q;       /* [C + S, K] */
    float *sum;      /* [C, K]: of a channel's integers and its copies' */
    int32_t *error;  /* [C, K]: sum - w / scale */
    int64_t *filter; /* [C]: the sum of a filter's errors, where K > 1 */
    int32_t *size;   /* [max(C, K)]: of the errors to settle */
    uint64_t *keys;  /* [max(C, K)] */
} row;

/* The whole steps in an error, rounded half up. */
static int64_t steps(int64_t error) {
    return (llabs(error) + HALF_STEP) >> 24;
}

/* Whether element i of channel c may move a step against errors of this sign, which its own has. */
static bool can_move(const row *r, int64_t c, int64_t i, int32_t sign) {
    const int64_t moved = (int64_t)r->sum[i] - sign;
    return moved >= r->low[c] && moved <= r->high[c];
}

/* Moves element i of channel c, and splits the moved sum into its parts; see ocs_columns. */
static void move(row *r, int64_t c, int64_t i, int32_t sign) {
    r->sum[i] -= (float)sign;
    r->error[i] -= sign * STEP;
    for (int64_t j = c; j >= 0; j = r->next[j]) {
        const int64_t at = i + (j - c) * r->K;
        r->q[at] = ocs_split_column(2 * (int32_t)r->sum[i], r->columns.addend[at], r->columns.shift[at],
                                    ocs_odd_of(&r->columns, at), r->qmax);
    }
}

/* Writes errors in units of 1 / STEP, cut off towards zero; subtraction and product are exact where nothing saturates.
 */
static void find_errors(int32_t *restrict error, const float *w, const float *sum, int64_t N, float scale) {
    for (int64_t i = 0; i < N; ++i) {
        float difference = (sum[i] - w[i] / scale) * (float)STEP;
        difference = difference < ERROR_LIMIT ? difference : ERROR_LIMIT;
        error[i] = (int32_t)(difference > -ERROR_LIMIT ? difference : -ERROR_LIMIT);
    }
}

static int64_t sum_of(const int32_t *error, int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        sum += error[i];
    }
    return sum;
}

/* Writes the sizes of n errors of this sign that a step makes less, and 0 for others and for what cannot move. The
   range of element i is that of low[stride * i] and high. */
static inline void find_sizes(int32_t *restrict size, const int32_t *error, const float *sum, int64_t n, int32_t sign,
                              const int32_t *low, const int32_t *high, int64_t stride) {
    for (int64_t i = 0; i < n; ++i) {
        const int32_t moved = (int32_t)sum[i] - sign, lowest = low[stride * i], highest = high[stride * i];
        const int32_t of_sign = error[i] * sign;
        size[i] = (moved >= lowest) & (moved <= highest) ? of_sign : 0;
    }
}

/* A size that at least `wanted` of n exceed: it saves the heap the others. Were errors uniform, half of them would have
   the sign, and a few more than wanted would exceed it. */
static int64_t exceeded_by(int64_t wanted, const int32_t *size, int64_t n) {
    const int64_t few = 4 + wanted + wanted / 4;
    const int32_t guess = 2 * few < n ? (int32_t)(HALF_STEP - 2 * few * HALF_STEP / n) : 0;
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        count += size[i] > guess;
    }
    return count < wanted ? 0 : guess;
}

/* Moves as many of the elements begin .. end - 1 as there are whole steps in their error; returns what is left of it.
   They are of one channel, or each of its own (K = 1). */
static int64_t settle(row *r, int64_t begin, int64_t end, int64_t error) {
    const int32_t sign = error < 0 ? -1 : 1;
    largest top = {r->keys, 0, steps(error)};
    if (top.wanted == 0) {
        return error;
    }
    const int64_t channel = begin / r->K, n = end - begin;
    if (r->K == 1) {
        find_sizes(r->size, r->error + begin, r->sum + begin, n, sign, r->low + begin, r->high + begin, 1);
    } else {
        find_sizes(r->size, r->error + begin, r->sum + begin, n, sign, r->low + channel, r->high + channel, 0);
    }
    const int64_t bound = exceeded_by(top.wanted, r->size, n);
    int64_t least = bound;
    for (int64_t i = 0; i < n; ++i) {
        if (r->size[i] > least) {
            offer(&top, r->size[i], begin + i);
            least = top.count < top.wanted ? bound : least_size(&top);
        }
    }
    for (int64_t k = 0; k < top.count; ++k) {
        const int64_t i = index_of(top.key[k]);
        move(r, r->K == 1 ? i : channel, i, sign);
    }
    return error - sign * top.count * STEP;
}

/* The element of filter c with the largest error of this sign that can move, or -1. */
static int64_t first_to_move(const row *r, int64_t c, int32_t sign) {
    int64_t first = -1, least = 0;
    for (int64_t i = c * r->K; i < (c + 1) * r->K; ++i) {
        const int64_t size = r->error[i] * sign;
        if (size > least && can_move(r, c, i, sign)) {
            first = i;
            least = size;
        }
    }
    return first;
}

/* The channel step: one element in as many filters as there are whole steps in the output channel's error. */
static void settle_filters(row *r, int64_t error) {
    const int32_t sign = error < 0 ? -1 : 1;
    largest top = {r->keys, 0, steps(error)};
    int64_t least = 0;
    for (int64_t c = 0; top.wanted > 0 && c < r->C; ++c) {
        const int64_t size = r->filter[c] * sign;
        if (size > least && first_to_move(r, c, sign) >= 0) {
            offer(&top, size, c);
            least = least_size(&top);
        }
    }
    for (int64_t n = 0; n < top.count; ++n) {
        const int64_t c = index_of(top.key[n]);
        move(r, c, first_to_move(r, c, sign), sign);
    }
}

/* The kernel-wise and the channel-wise step, which are one where a filter is an element. */
static void compensate(row *r) {
    const int64_t C = r->C, K = r->K;
    if (K == 1) {
        settle(r, 0, C, sum_of(r->error, C));
        return;
    }
    int64_t error = 0;
    for (int64_t c = 0; c < C; ++c) {
        r->filter[c] = settle(r, c * K, (c + 1) * K, sum_of(r->error + c * K, K));
        error += r->filter[c];
    }
    settle_filters(r, error);
}

/* --- Every output channel --------------------------------------------------------------------- */

typedef struct {
    ocs_rows rows;
    int32_t *next;       /* [G (C + S)] */
    int32_t *low, *high; /* [G C] */
    const float *w;
    ocs_scale scale;
    int8_t *ints;
    int32_t qmax;
} squant_job;

/* The parts of each channel of group g, and the sums T that all of them can hold: part i of n is floor((T + i) / n). */
static void fill_parts(squant_job *job, int64_t g) {
    const ocs_columns columns = ocs_columns_of_group(&job->rows, g);
    const int64_t C = job->rows.shape->C, K = job->rows.shape->K, E = C + job->rows.shape->S;
    int32_t *low = job->low + g * C, *high = job->high + g * C;
    ocs_link_parts(job->next + g * E, &job->rows, g);
    for (int64_t j = 0; j < E; ++j) {
        const int64_t c = j < C ? j : columns.index[(j - C) * K] / K;
        const int32_t n = ocs_parts_of(&columns, j * K), i = columns.addend[j * K] / 2;
        const int32_t lowest = -job->qmax * n - i, highest = (job->qmax + 1) * n - 1 - i;
        low[c] = j < C || lowest > low[c] ? lowest : low[c];
        high[c] = j < C || highest < high[c] ? highest : high[c];
    }
}

/* The bytes of a row's sums, errors, sizes, errors of filters, and keys. */
static size_t scratch_size(const ocs_shape *shape) {
    const int64_t C = shape->C, K = shape->K, most = C > K ? C : K;
    return (size_t)(C + most) * sizeof(int64_t) + (size_t)(C * K) * (sizeof(float) + sizeof(int32_t)) +
           (size_t)most * sizeof(int32_t);
}

static row row_in(void *scratch, const squant_job *job) {
    const int64_t C = job->rows.shape->C, K = job->rows.shape->K;
    row r = {.C = C, .K = K, .qmax = job->qmax, .filter = scratch};
    r.keys = (uint64_t *)(r.filter + C);
    r.sum = (float *)(r.keys + (C > K ? C : K));
    r.error = (int32_t *)(r.sum + C * K);
    r.size = r.error + C * K;
    return r;
}

static void squant_rows(ocs_range *range) {
    const squant_job *job = range->ctx;
    const ocs_kernels *kernels = job->rows.kernels;
    const ocs_shape *shape = job->rows.shape;
    const int64_t C = shape->C, N = job->rows.columns.N, M = job->rows.columns.M;
    row r = row_in(range->scratch, job);
    for (int64_t o = range->begin; o < range->end; ++o) {
        const int64_t g = o / (shape->O / shape->G);
        const float *w = job->w + o * N, scale = ocs_scale_of(job->scale, o);
        r.columns = ocs_columns_of_group(&job->rows, g);
        r.next = job->next + g * (C + shape->S);
        r.low = job->low + g * C;
        r.high = job->high + g * C;
        r.q = job->ints + o * M;
        kernels->quantize_row(r.q, w, &r.columns, scale, job->qmax);
        kernels->fold_row(r.sum, r.q, r.columns.index, N, M, 1.0f);
        find_errors(r.error, w, r.sum, N, scale);
        compensate(&r);
    }
}

static ocs_status squant_all(squant_job *job) {
    const ocs_shape *shape = job->rows.shape;
    const int64_t channels = shape->G * shape->C, parts = channels + shape->G * shape->S;
    job->next = malloc((size_t)(parts + 2 * channels) * sizeof *job->next);
    if (job->next == NULL) {
        return OCS_NO_MEMORY;
    }
    job->low = job->next + parts;
    job->high = job->low + channels;
    for (int64_t g = 0; g < shape->G; ++g) {
        fill_parts(job, g);
    }
    const int64_t grain = ocs_grain(job->rows.columns.M);
    ocs_status status = ocs_parallel_for(shape->O, grain, scratch_size(shape), squant_rows, job);
    free(job->next);
    return status;
}

ocs_status ocs_squant_weight_f32(int8_t *ints, const float *w, const ocs_plan *plan, ocs_scale scale,
                                 const ocs_shape *shape, int bits) {
    OCS_TRY(ocs_check_bits(bits));
    squant_job job = {.w = w, .scale = scale, .ints = ints, .qmax = ocs_qmax(bits)};
    OCS_TRY(ocs_rows_begin(&job.rows, plan, shape));
    ocs_status status = ocs_check_scale(scale, shape->O);
    if (status == OCS_OK && job.rows.columns.N > 0) {
        status = squant_all(&job);
    }
    ocs_rows_end(&job.rows);
    return status;
}
