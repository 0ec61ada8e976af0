/* Which channels to split, how often, and what each copy is of its original (section 3 of the paper).

   Splitting is simulated on the maxima alone: part i of n is an affine image of the original channel, so nothing is
   moved until the integers are written. Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

/* --- The plan --------------------------------------------------------------------------------- */

/* A binary heap of channels, the one to split next on top. */
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
    int32_t *parts;
    int32_t *offset;
    float *split_max;
    const float *channel_max;
    int64_t C, S, first; /* the number that the group's first channel has */
} group_plan;

/* Halves the top channel into itself and expanded channel `copy`, quantization-aware part i of n into i and i + n of
   2 n. Zeros are copied without counting as halved, however often they come up: all their integers are 0 anyway. */
static ocs_status halve_top(heap *h, const group_plan *plan, int64_t copy) {
    const int64_t top = h->channel[0];
    const bool halved = plan->split_max[top] > 0.0f;
    const int32_t n = plan->parts[top];
    if (halved && n == OCS_MAX_PARTS) {
        return OCS_TOO_LARGE;
    }
    plan->source[copy] = plan->source[top];
    plan->offset[copy] = plan->offset[top] + (halved ? n : 0);
    plan->parts[copy] = plan->parts[top] = halved ? 2 * n : n;
    plan->split_max[copy] = plan->split_max[top] *= 0.5f;
    sift_down(h, 0);
    push(h, copy);
    return OCS_OK;
}

/* Gives the top channel a part more, expanded channel `copy`; the numbers of the channel itself count for all parts. */
static ocs_status add_part(heap *h, const group_plan *plan, int64_t copy) {
    const int64_t top = h->channel[0];
    if (plan->parts[top] == OCS_MAX_PARTS) {
        return OCS_TOO_LARGE;
    }
    plan->source[copy] = plan->source[top];
    plan->offset[copy] = plan->parts[top]++;
    plan->split_max[top] = plan->channel_max[top] / (float)plan->parts[top];
    sift_down(h, 0);
    return OCS_OK;
}

/* Each channel as its only part; scratch [C + S] is the heap's. */
static ocs_status begin_group(heap *h, const group_plan *plan, int64_t *scratch) {
    *h = (heap){plan->split_max, scratch, plan->C};
    for (int64_t c = 0; c < plan->C; ++c) {
        plan->source[c] = plan->first + c;
        plan->parts[c] = 1;
        plan->offset[c] = 0;
        plan->split_max[c] = plan->channel_max[c];
        h->channel[c] = c;
        if (!isfinite(plan->channel_max[c])) {
            return OCS_NOT_FINITE;
        }
    }
    for (int64_t at = plan->C / 2 - 1; at >= 0; --at) {
        sift_down(h, at);
    }
    return OCS_OK;
}

static ocs_status plan_group(const group_plan *plan, int64_t *scratch, bool even) {
    const int64_t C = plan->C;
    heap h;
    OCS_TRY(begin_group(&h, plan, scratch));
    for (int64_t s = 0; s < plan->S; ++s) {
        OCS_TRY(even ? add_part(&h, plan, C + s) : halve_top(&h, plan, C + s));
    }
    for (int64_t copy = C; even && copy < C + plan->S; ++copy) {
        const int64_t c = plan->source[copy] - plan->first;
        plan->parts[copy] = plan->parts[c];
        plan->split_max[copy] = plan->split_max[c];
    }
    return OCS_OK;
}

ocs_status ocs_split_plan(int64_t *source, int32_t *parts, int32_t *offset, float *split_max, const float *channel_max,
                          int64_t G, int64_t C, int64_t S, bool even) {
    if (G < 1 || C < 0 || S < 0 || (C == 0 && S > 0)) {
        return OCS_BAD_SHAPE;
    }
    if (C == 0) {
        return OCS_OK;
    }
    OCS_TRY(ocs_check_sizes(C, S, 0)); /* their sum does not wrap around */
    OCS_TRY(ocs_check_sizes(G, C + S, 1));
    int64_t *scratch = malloc((size_t)(C + S) * sizeof *scratch);
    ocs_status status = scratch == NULL ? OCS_NO_MEMORY : OCS_OK;
    for (int64_t g = 0; g < G && status == OCS_OK; ++g) {
        const int64_t at = g * (C + S);
        const group_plan plan = {source + at,         parts + at, offset + at, split_max + at,
                                 channel_max + g * C, C,          S,           g * C};
        status = plan_group(&plan, scratch, even);
    }
    free(scratch);
    return status;
}

/* --- The split weight without splitting it ---------------------------------------------------- */

/* The rows of a weight, and what each of the columns [G M] is split by. Where all numbers of parts are powers of two,
   by multiplying with 2^-m, which is exact and fast; else by dividing by the number. */
typedef struct {
    ocs_rows rows;
    float *by;
    bool divides;
    const float *w;
} split_rows;

/* Checks the plan. What is read of it was copied before: another thread could change it. */
static ocs_status split_rows_begin(split_rows *split, const float *w, const ocs_plan *plan, const ocs_shape *shape) {
    *split = (split_rows){.w = w};
    OCS_TRY(ocs_rows_begin(&split->rows, plan, shape));
    const ocs_columns *columns = &split->rows.columns;
    split->by = malloc((size_t)(shape->G * columns->M + 1) * sizeof *split->by);
    if (split->by == NULL) {
        ocs_rows_end(&split->rows);
        return OCS_NO_MEMORY;
    }
    split->divides = columns->odd != NULL;
    for (int64_t i = 0; i < shape->G * columns->M; ++i) {
        split->by[i] = split->divides ? (float)ocs_parts_of(columns, i) : ldexpf(1.0f, 1 - columns->shift[i]);
    }
    return OCS_OK;
}

static void split_rows_end(split_rows *split) {
    free(split->by);
    ocs_rows_end(&split->rows);
}

static inline float split_value(float w, float by, bool divides) {
    return divides ? w / by : w * by;
}

/* What output channel o is split by, [M]. */
static const float *by_of_row(const split_rows *split, int64_t o) {
    const ocs_shape *shape = split->rows.shape;
    return split->by + o / (shape->O / shape->G) * split->rows.columns.M;
}

/* Of all copies of a channel, the one split least has the largest weights: the channel itself gets what that has. */
static void keep_largest_parts(split_rows *split) {
    for (int64_t g = 0; g < split->rows.shape->G; ++g) {
        const ocs_columns columns = ocs_columns_of_group(&split->rows, g);
        float *by = split->by + g * columns.M;
        for (int64_t m = columns.N; m < columns.M; ++m) {
            float *of_source = &by[columns.index[m - columns.N]];
            *of_source = (split->divides ? by[m] < *of_source : by[m] > *of_source) ? by[m] : *of_source;
        }
    }
}

enum { BLOCK = 256 };

static float largest_part(const split_rows *split, int64_t o) {
    const int64_t N = split->rows.columns.N;
    const float *w = split->w + o * N, *by = by_of_row(split, o);
    if (!split->divides) {
        return split->rows.kernels->scaled_max(w, by, N);
    }
    float max = 0.0f, parts[BLOCK];
    for (int64_t begin = 0; begin < N; begin += BLOCK) {
        const int64_t count = N - begin < BLOCK ? N - begin : BLOCK;
        for (int64_t i = 0; i < count; ++i) {
            parts[i] = w[begin + i] / by[begin + i];
        }
        max = ocs_larger_abs(max, split->rows.kernels->abs_max(parts, count));
    }
    return max;
}

typedef struct {
    split_rows split;
    float *output_max;
} output_max_job;

static void output_max_range(ocs_range *range) {
    const output_max_job *job = range->ctx;
    for (int64_t o = range->begin; o < range->end; ++o) {
        job->output_max[o] = largest_part(&job->split, o);
    }
}

ocs_status ocs_output_max_f32(float *output_max, const float *w, const ocs_plan *plan, const ocs_shape *shape) {
    output_max_job job = {.output_max = output_max};
    OCS_TRY(split_rows_begin(&job.split, w, plan, shape));
    keep_largest_parts(&job.split);
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
    const float *w = split->w + o * columns.N, *by = by_of_row(split, o);
    const bool divides = split->divides;
    int64_t count = 0;
    for (int64_t m = 0; m < columns.N; ++m) {
        values[count] = split_value(w[m], by[m], divides);
        count += values[count] != 0.0f;
    }
    for (int64_t m = columns.N; m < columns.M; ++m) {
        values[count] = split_value(w[columns.index[m - columns.N]], by[m], divides);
        count += values[count] != 0.0f;
    }
    return count;
}

/* Counts rows into scratch: own [OCS_COUNTS][bins], and the values of one row [M + 1]. */
static void split_histogram_range(ocs_range *range) {
    const split_histogram_job *job = range->ctx;
    const int64_t bins = job->bins;
    uint32_t *own = range->scratch;
    float *values = (float *)(own + OCS_COUNTS * bins);
    memset(own, 0, (size_t)(OCS_COUNTS * bins) * sizeof *own);
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
            ocs_add_counts(job->counts + row * bins, own, bins, OCS_COUNTS);
            memset(own, 0, (size_t)(OCS_COUNTS * bins) * sizeof *own);
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
    ocs_clear(counts, R * bins * (int64_t)sizeof *counts);
    const int64_t M = job.split.rows.columns.M;
    if (M > 0) {
        const size_t scratch = (size_t)(OCS_COUNTS * bins) * sizeof(uint32_t) + (size_t)(M + 1) * sizeof(float);
        status = ocs_parallel_for(shape->O, ocs_grain(M), scratch, split_histogram_range, &job);
    }
    split_rows_end(&job.split);
    return status;
}
