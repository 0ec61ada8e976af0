/* Compensation of rounding errors by the inputs' second moments: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323.

   Column by column in a given order, in grid units u = w / scale:

       v_j = u_j - sum_{i < j} (T_i - u_i) F_ji,    T_j: the sum of the parts of M = floor(v_j + 1/2)

   where F comes from a factorization of the second moments, see ocs_gptq_weight_f32. Output channels do not depend on
   one another: OCS_SIDE_BY_SIDE of them share each number of F that is read, and are a thread's smallest piece of work.
   The sums are of float32 products, in the order of the columns; u, which they are subtracted from, may be much larger.
   Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

#define MOST_SPLITS (1 << 24) /* of a channel whose parts' sum is to fit 32 bits */
enum { R = OCS_SIDE_BY_SIDE, PANEL = 4 /* columns whose sums over all before them are made at once */ };

void ocs_weighted_sums_ref(float *restrict sum, const float *error, const float *factor, int64_t columns, int64_t J,
                           int64_t stride) {
    memset(sum, 0, (size_t)(columns * R) * sizeof *sum);
    for (int64_t c = 0; c < columns; ++c) {
        for (int64_t j = 0; j < J; ++j) {
            for (int64_t r = 0; r < R; ++r) {
                sum[c * R + r] += error[j * R + r] * factor[c * stride + j];
            }
        }
    }
}

typedef struct {
    ocs_rows rows;
    const float *w, *factor;
    const int64_t *order;
    int64_t L, B;  /* columns of a block, blocks of a group */
    int32_t *next; /* [G (C + S)] */
    ocs_scale scale;
    int8_t *ints;
    double *error; /* [O] */
    int32_t qmax;
} gptq_job;

/* Up to R output channels of one group, and memory for a block of their columns, [L, R] each. */
typedef struct {
    const gptq_job *job;
    int64_t g, first, count;
    ocs_columns columns;
    const int32_t *next;
    float *u, *error;
    int32_t *whole;
    double lost[R]; /* the error of each output channel so far, in units of its scale */
} tile;

static size_t scratch_size(int64_t L) {
    return (size_t)(L * R) * (2 * sizeof(float) + sizeof(int32_t));
}

/* Row by row, as rows may lie a multiple of the cache's sets apart; 0 in channels and columns that do not exist. */
static void read_units(const tile *t, const int64_t *order) {
    const int64_t L = t->job->L, N = t->columns.N;
    for (int64_t r = 0; r < R; ++r) {
        const int64_t o = t->first + r;
        for (int64_t j = 0; j < L; ++j) {
            const bool exists = r < t->count && order[j] < N;
            t->u[j * R + r] = exists ? t->job->w[o * N + order[j]] / ocs_scale_of(t->job->scale, o) : 0.0f;
        }
    }
}

static void write_parts(const tile *t, const int64_t *order) {
    const int64_t L = t->job->L, K = t->job->rows.shape->K, N = t->columns.N;
    const int32_t *addend = t->columns.addend, *shift = t->columns.shift;
    for (int64_t r = 0; r < t->count; ++r) {
        int8_t *q = t->job->ints + (t->first + r) * t->columns.M;
        for (int64_t j = 0; j < L; ++j) {
            for (int64_t n = order[j], c = n / K, e = n < N ? c : -1; e >= 0; e = t->next[e]) {
                const int64_t at = n + (e - c) * K;
                q[at] = ocs_split_column(2 * t->whole[j * R + r], addend[at], shift[at], ocs_odd_of(&t->columns, at),
                                         t->job->qmax);
            }
        }
    }
}

/* floor(v + 1/2), saturated far outside every grid. NaN becomes the upper limit. */
static inline int32_t whole_number(double v) {
    const double limit = OCS_HALF_STEPS_LIMIT / 2;
    v = v + 0.5 < limit ? v + 0.5 : limit;
    v = v > -limit ? v : -limit;
    const int32_t towards_zero = (int32_t)v;
    return towards_zero - (towards_zero > v);
}

/* Column j of the block, which is column n, once sum [R] compensates it: its whole numbers, and its errors T - u. What
   is lost, (T - v)^2, counts by `power`. */
static void round_column(tile *t, int64_t j, int64_t n, const float *sum, double power) {
    const int64_t K = t->job->rows.shape->K, c = n / K;
    const float *u = t->u + j * R;
    float *error = t->error + j * R;
    int32_t *whole = t->whole + j * R, T[R] = {0};
    if (n >= t->columns.N) {
        memset(error, 0, R * sizeof *error);
        return;
    }
    for (int64_t r = 0; r < R; ++r) {
        whole[r] = whole_number((double)u[r] - sum[r]);
    }
    for (int64_t e = c; e >= 0; e = t->next[e]) {
        const int64_t at = n + (e - c) * K;
        const int32_t addend = t->columns.addend[at], shift = t->columns.shift[at], odd = ocs_odd_of(&t->columns, at);
        for (int64_t r = 0; r < R; ++r) {
            T[r] += ocs_split_column(2 * whole[r], addend, shift, odd, t->job->qmax);
        }
    }
    for (int64_t r = 0; r < R; ++r) {
        const double off = T[r] - (double)u[r], left = off + sum[r];
        error[r] = (float)off;
        t->lost[r] += power * left * left;
    }
}

static void round_block(tile *t, int64_t b) {
    const gptq_job *job = t->job;
    const int64_t L = job->L;
    const int64_t *order = job->order + (t->g * job->B + b) * L;
    const float *factor = job->factor + (t->g * job->B + b) * L * L;
    read_units(t, order);
    for (int64_t begin = 0; begin < L; begin += PANEL) {
        const int64_t columns = L - begin < PANEL ? L - begin : PANEL;
        float sum[PANEL * R];
        job->rows.kernels->weighted_sums(sum, t->error, factor + begin * L, columns, begin, L);
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t j = begin + c;
            for (int64_t i = begin; i < j; ++i) {
                for (int64_t r = 0; r < R; ++r) {
                    sum[c * R + r] += t->error[i * R + r] * factor[j * L + i];
                }
            }
            round_column(t, j, order[j], sum + c * R, factor[j * L + j]);
        }
    }
    write_parts(t, order);
}

static void gptq_tiles(ocs_range *range) {
    const gptq_job *job = range->ctx;
    const ocs_shape *shape = job->rows.shape;
    const int64_t rows = shape->O / shape->G, tiles = (rows + R - 1) / R;
    tile t = {.job = job, .u = range->scratch};
    t.error = t.u + job->L * R;
    t.whole = (int32_t *)(t.error + job->L * R);
    for (int64_t i = range->begin; i < range->end; ++i) {
        const int64_t at = i % tiles * R;
        t.g = i / tiles;
        t.first = t.g * rows + at;
        t.count = rows - at < R ? rows - at : R;
        t.columns = ocs_columns_of_group(&job->rows, t.g);
        t.next = job->next + t.g * (shape->C + shape->S);
        memset(t.lost, 0, sizeof t.lost);
        for (int64_t b = 0; b < job->B; ++b) {
            round_block(&t, b);
        }
        for (int64_t r = 0; r < t.count; ++r) {
            const double scale = ocs_scale_of(job->scale, t.first + r);
            job->error[t.first + r] = t.lost[r] * scale * scale;
        }
    }
}

/* OCS_BAD_ORDER unless each of n numbers 0 .. n - 1 is there once; seen: [n], zeros. */
static ocs_status check_order(const int64_t *order, int64_t n, bool *seen) {
    for (int64_t j = 0; j < n; ++j) {
        if (order[j] < 0 || order[j] >= n || seen[order[j]]) {
            return OCS_BAD_ORDER;
        }
        seen[order[j]] = true;
    }
    return OCS_OK;
}

static ocs_status gptq_all(gptq_job *job) {
    const ocs_shape *shape = job->rows.shape;
    const int64_t E = shape->C + shape->S, columns = job->B * job->L, rows = shape->O / shape->G;
    job->next = malloc((size_t)(shape->G * E) * sizeof *job->next);
    bool *seen = malloc((size_t)columns * sizeof *seen);
    ocs_status status = job->next != NULL && seen != NULL ? OCS_OK : OCS_NO_MEMORY;
    for (int64_t g = 0; g < shape->G && status == OCS_OK; ++g) {
        ocs_link_parts(job->next + g * E, &job->rows, g);
        memset(seen, 0, (size_t)columns * sizeof *seen);
        status = check_order(job->order + g * columns, columns, seen);
    }
    if (status == OCS_OK) {
        const int64_t tiles = shape->G * ((rows + R - 1) / R);
        status = ocs_parallel_for(tiles, ocs_grain(columns * job->L), scratch_size(job->L), gptq_tiles, job);
    }
    free(job->next);
    free(seen);
    return status;
}

ocs_status ocs_gptq_weight_f32(int8_t *ints, double *error, const float *w, const int64_t *order, const float *factor,
                               const ocs_plan *plan, ocs_scale scale, const ocs_shape *shape, int64_t L, int bits) {
    OCS_TRY(ocs_check_bits(bits));
    gptq_job job = {.w = w, .factor = factor, .order = order, .L = L, .scale = scale, .ints = ints, .error = error};
    job.qmax = ocs_qmax(bits);
    OCS_TRY(ocs_rows_begin(&job.rows, plan, shape));
    const int64_t N = job.rows.columns.N;
    ocs_clear(error, shape->O * (int64_t)sizeof *error);
    ocs_status status = ocs_check_scale(scale, shape->O);
    if (status == OCS_OK && N > 0 && shape->O > 0) {
        job.B = L > 0 ? (N - 1) / L + 1 : 0;
        status = L > 0 ? ocs_check_sizes(shape->G * job.B, L, L) : OCS_BAD_SHAPE;
        status = status == OCS_OK && shape->S >= MOST_SPLITS ? OCS_TOO_LARGE : status;
        status = status == OCS_OK ? gptq_all(&job) : status;
    }
    ocs_rows_end(&job.rows);
    return status;
}
