/* Which channels to split, how often, and what each copy is of its original (section 3 of the paper).

   Splitting is simulated on the maxima alone: a copy of depth m is an affine image of the original channel, so nothing
   is moved until the integers are written. Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

/* --- The plan --------------------------------------------------------------------------------- */

/* A binary heap of expanded channels, the one to split next on top. */
typedef struct {
    const float *max;
    int64_t *channel;
    int64_t size;
} heap;

static bool before(const heap *h, int64_t a, int64_t b) {
    return h->max[a] > h->max[b] || (h->max[a] == h->max[b] && a < b);
}

static void sift_down(heap *h, int64_t at) {
    const int64_t moved = h->channel[at];
    for (int64_t child; (child = 2 * at + 1) < h->size; at = child) {
        if (child + 1 < h->size && before(h, h->channel[child + 1], h->channel[child])) {
            ++child;
        }
        if (!before(h, h->channel[child], moved)) {
            break;
        }
        h->channel[at] = h->channel[child];
    }
    h->channel[at] = moved;
}

static void push(heap *h, int64_t pushed) {
    int64_t at = h->size++;
    for (int64_t parent; at > 0 && before(h, pushed, h->channel[parent = (at - 1) / 2]); at = parent) {
        h->channel[at] = h->channel[parent];
    }
    h->channel[at] = pushed;
}

/* One group's part of the plan that is being made. */
typedef struct {
    int64_t *source;
    int32_t *depth;
    int32_t *offset;
    float *split_max;
} group_plan;

/* Halves the top channel into itself and expanded channel `copy`, quantization-aware part i into i and i + 2^m. Zeros
   are copied without counting as halved, however often they come up: all their integers are 0 anyway. */
static void split_top(heap *h, const group_plan *plan, int64_t copy) {
    const int64_t top = h->channel[0];
    const bool halved = plan->split_max[top] > 0.0f;
    const int32_t m = plan->depth[top];
    plan->source[copy] = plan->source[top];
    plan->offset[copy] = plan->offset[top] + (halved ? INT32_C(1) << m : 0);
    plan->depth[copy] = plan->depth[top] = m + halved;
    plan->split_max[copy] = plan->split_max[top] *= 0.5f;
    sift_down(h, 0);
    push(h, copy);
}

/* The group's channels have the numbers from `first` on; scratch [C + S]. */
static ocs_status plan_group(const group_plan *plan, const float *channel_max, int64_t *scratch, int64_t C, int64_t S,
                             int64_t first) {
    heap h = {plan->split_max, scratch, C};
    for (int64_t c = 0; c < C; ++c) {
        plan->source[c] = first + c;
        plan->depth[c] = plan->offset[c] = 0;
        plan->split_max[c] = channel_max[c];
        h.channel[c] = c;
        if (!isfinite(channel_max[c])) {
            return OCS_NOT_FINITE;
        }
    }
    for (int64_t at = C / 2 - 1; at >= 0; --at) {
        sift_down(&h, at);
    }
    for (int64_t s = 0; s < S; ++s) {
        const int64_t top = h.channel[0];
        if (plan->depth[top] == OCS_MAX_DEPTH && plan->split_max[top] > 0.0f) {
            return OCS_TOO_LARGE;
        }
        split_top(&h, plan, C + s);
    }
    return OCS_OK;
}

ocs_status ocs_split_plan(int64_t *source, int32_t *depth, int32_t *offset, float *split_max, const float *channel_max,
                          int64_t G, int64_t C, int64_t S) {
    if (G < 1 || C < 0 || S < 0 || (C == 0 && S > 0)) {
        return OCS_BAD_SHAPE;
    }
    if (C == 0) {
        return OCS_OK;
    }
    int64_t *scratch = malloc((size_t)(C + S) * sizeof *scratch);
    ocs_status status = scratch == NULL ? OCS_NO_MEMORY : OCS_OK;
    for (int64_t g = 0; g < G && status == OCS_OK; ++g) {
        const int64_t at = g * (C + S);
        const group_plan plan = {source + at, depth + at, offset + at, split_max + at};
        status = plan_group(&plan, channel_max + g * C, scratch, C, S, g * C);
    }
    free(scratch);
    return status;
}

/* --- The split weight without splitting it ---------------------------------------------------- */

/* The rows of a weight, and factor [G M]: 2^-depth of each column. */
typedef struct {
    ocs_rows rows;
    float *factor;
    const float *w;
} split_rows;

/* Checks the plan. What is read of it was copied before: another thread could change it. */
static ocs_status split_rows_begin(split_rows *split, const float *w, const ocs_plan *plan, const ocs_shape *shape) {
    *split = (split_rows){.w = w};
    OCS_TRY(ocs_rows_begin(&split->rows, plan, shape));
    const ocs_columns *columns = &split->rows.columns;
    split->factor = malloc((size_t)(shape->G * columns->M + 1) * sizeof *split->factor);
    if (split->factor == NULL) {
        ocs_rows_end(&split->rows);
        return OCS_NO_MEMORY;
    }
    for (int64_t i = 0; i < shape->G * columns->M; ++i) {
        split->factor[i] = ldexpf(1.0f, 1 - columns->shift[i]);
    }
    return OCS_OK;
}

static void split_rows_end(split_rows *split) {
    free(split->factor);
    ocs_rows_end(&split->rows);
}

/* The factors [M] of output channel o. */
static const float *factor_of_row(const split_rows *split, int64_t o) {
    const ocs_shape *shape = split->rows.shape;
    return split->factor + o / (shape->O / shape->G) * split->rows.columns.M;
}

/* Of all copies of a channel, the one halved least has the largest weights: its factor goes to the channel itself. */
static void keep_largest_factors(split_rows *split) {
    for (int64_t g = 0; g < split->rows.shape->G; ++g) {
        const ocs_columns columns = ocs_columns_of_group(&split->rows, g);
        float *factor = split->factor + g * columns.M;
        for (int64_t m = columns.N; m < columns.M; ++m) {
            float *of_source = &factor[columns.index[m - columns.N]];
            *of_source = *of_source < factor[m] ? factor[m] : *of_source;
        }
    }
}

typedef struct {
    split_rows split;
    float *output_max;
} output_max_job;

static void output_max_range(ocs_range *range) {
    const output_max_job *job = range->ctx;
    const ocs_rows *rows = &job->split.rows;
    const int64_t N = rows->columns.N;
    for (int64_t o = range->begin; o < range->end; ++o) {
        const float *w = job->split.w + o * N;
        job->output_max[o] = rows->kernels->scaled_max(w, factor_of_row(&job->split, o), N);
    }
}

ocs_status ocs_output_max_f32(float *output_max, const float *w, const ocs_plan *plan, const ocs_shape *shape) {
    output_max_job job = {.output_max = output_max};
    OCS_TRY(split_rows_begin(&job.split, w, plan, shape));
    keep_largest_factors(&job.split);
    ocs_status status = ocs_parallel_for(shape->O, ocs_grain(job.split.rows.columns.N), 0, output_max_range, &job);
    split_rows_end(&job.split);
    return status;
}

typedef struct {
    split_rows split;
    int64_t *counts;
    const float *limit;
    int64_t R, bins;
} split_histogram_job;

/* Output channel o split: returns how many of its M columns are not zero; those are in values [M]. */
static int64_t split_row(float *restrict values, const split_rows *split, int64_t o) {
    const ocs_columns columns = ocs_columns_of_row(&split->rows, o);
    const float *w = split->w + o * columns.N, *factor = factor_of_row(split, o);
    int64_t count = 0;
    for (int64_t m = 0; m < columns.N; ++m) {
        values[count] = w[m] * factor[m];
        count += values[count] != 0.0f;
    }
    for (int64_t m = columns.N; m < columns.M; ++m) {
        values[count] = w[columns.index[m - columns.N]] * factor[m];
        count += values[count] != 0.0f;
    }
    return count;
}

/* Counts rows into scratch: own [4][bins], and the values of one row [M + 1]. */
static void split_histogram_range(ocs_range *range) {
    const split_histogram_job *job = range->ctx;
    const int64_t bins = job->bins;
    uint32_t *own = range->scratch;
    float *values = (float *)(own + bins * 4);
    memset(own, 0, (size_t)bins * 4 * sizeof *own);
    int64_t counted = 0;
    for (int64_t o = range->begin; o < range->end; ++o) {
        const int64_t row = job->R == 1 ? 0 : o, count = split_row(values, &job->split, o);
        if (job->limit[row] > 0.0f) {
            job->split.rows.kernels->histogram(own, values, count, bins, job->limit[row]);
        } else {
            own[0] += (uint32_t)count;
        }
        counted += count;
        if (job->R > 1 || o + 1 == range->end || counted >= OCS_MOST_COUNTED) {
            ocs_add_counts(job->counts + row * bins, own, bins, 4);
            memset(own, 0, (size_t)bins * 4 * sizeof *own);
            counted = 0;
        }
    }
}

ocs_status ocs_split_histogram_f32(int64_t *counts, const float *w, const ocs_plan *plan, const ocs_shape *shape,
                                   int64_t R, int64_t bins, const float *limit) {
    if (R != 1 && R != shape->O) {
        return OCS_BAD_SHAPE;
    }
    split_histogram_job job = {.counts = counts, .limit = limit, .R = R, .bins = bins};
    OCS_TRY(ocs_check_histogram(bins, OCS_MAX_BINS, limit, R));
    OCS_TRY(split_rows_begin(&job.split, w, plan, shape));
    ocs_status status = OCS_OK;
    memset(counts, 0, (size_t)(R * bins) * sizeof *counts);
    const int64_t M = job.split.rows.columns.M;
    if (M > 0) {
        const size_t scratch = (size_t)bins * 4 * sizeof(uint32_t) + (size_t)(M + 1) * sizeof(float);
        status = ocs_parallel_for(shape->O, ocs_grain(M), scratch, split_histogram_range, &job);
    }
    split_rows_end(&job.split);
    return status;
}
