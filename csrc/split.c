/* Which channels to split, how often, and what each copy is of its original (section 3 of the paper).

   Splitting is simulated on the maxima alone: a copy of depth m is an affine image of the original channel, so nothing
   is moved until the integers are written. Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

enum { MAX_DEPTH = 22 }; /* keeps ocs_split_column inside 32 bits */

ocs_status ocs_check_shape(const ocs_shape *shape) {
    const bool sizes = shape->O >= 0 && shape->C >= 0 && shape->K >= 0 && shape->S >= 0;
    const bool groups = shape->G == 1 || (shape->G > 1 && shape->G <= shape->O && shape->O % shape->G == 0);
    return sizes && groups && (shape->C > 0 || shape->S == 0) ? OCS_OK : OCS_BAD_SHAPE;
}

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
        if (plan->depth[top] == MAX_DEPTH && plan->split_max[top] > 0.0f) {
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

/* --- The plan, column by column --------------------------------------------------------------- */

/* The plan of expanded channel j of group g is possible: it may come from a stranger's file. */
static bool entry_valid(const ocs_plan *plan, const ocs_shape *shape, int64_t g, int64_t j) {
    const int64_t at = g * (shape->C + shape->S) + j, first = g * shape->C;
    const int64_t source = plan->source[at];
    if (source < first || source >= first + shape->C || (j < shape->C && source != first + j)) {
        return false;
    }
    if (plan->depth == NULL) {
        return true;
    }
    if (plan->depth[at] < 0 || plan->depth[at] > MAX_DEPTH) {
        return false;
    }
    return plan->offset == NULL || (plan->offset[at] >= 0 && plan->offset[at] < INT32_C(1) << plan->depth[at]);
}

/* How expanded channel `at` follows from floor(2 u): see ocs_columns. */
static int32_t addend_of(const ocs_plan *plan, int64_t at) {
    return plan->offset == NULL ? INT32_C(1) << plan->depth[at] : 2 * plan->offset[at] + 1;
}

static ocs_status fill_columns(ocs_columns *columns, const ocs_plan *plan, const ocs_shape *shape, int64_t g) {
    const ocs_columns group = ocs_columns_group(columns, g);
    const int64_t C = shape->C, K = shape->K, E = C + shape->S;
    for (int64_t j = 0; j < E; ++j) {
        if (!entry_valid(plan, shape, g, j)) {
            return OCS_BAD_PLAN;
        }
        const int64_t at = g * E + j, c = plan->source[at] - g * C;
        for (int64_t k = 0; k < K; ++k) {
            if (j >= C) {
                group.index[(j - C) * K + k] = (int32_t)(c * K + k);
            }
            if (plan->depth != NULL) {
                group.addend[j * K + k] = addend_of(plan, at);
                group.shift[j * K + k] = plan->depth[at] + 1;
            }
        }
    }
    return OCS_OK;
}

ocs_status ocs_columns_make(ocs_columns *columns, const ocs_plan *plan, const ocs_shape *shape) {
    const int64_t G = shape->G, E = shape->C + shape->S;
    *columns = (ocs_columns){0};
    ocs_status status = ocs_check_shape(shape);
    if (status != OCS_OK) {
        return status;
    }
    if (shape->K > 0 && E > INT32_MAX / shape->K) {
        return OCS_TOO_LARGE;
    }
    const int64_t N = shape->C * shape->K, M = E * shape->K;
    const int64_t copies = G * (M - N), all = plan->depth == NULL ? 0 : G * M;
    int32_t *memory = malloc((size_t)(copies + 2 * all + 1) * sizeof *memory);
    if (memory == NULL) {
        return OCS_NO_MEMORY;
    }
    *columns = (ocs_columns){N, M, memory, NULL, NULL};
    if (plan->depth != NULL) {
        columns->addend = memory + copies;
        columns->shift = columns->addend + all;
    }
    for (int64_t g = 0; g < G && status == OCS_OK; ++g) {
        status = fill_columns(columns, plan, shape, g);
    }
    if (status != OCS_OK) {
        ocs_columns_free(columns);
    }
    return status;
}

ocs_columns ocs_columns_group(const ocs_columns *columns, int64_t g) {
    const int64_t N = columns->N, M = columns->M;
    ocs_columns group = {N, M, columns->index + g * (M - N), NULL, NULL};
    if (columns->addend != NULL) {
        group.addend = columns->addend + g * M;
        group.shift = columns->shift + g * M;
    }
    return group;
}

void ocs_columns_free(ocs_columns *columns) {
    free(columns->index);
    *columns = (ocs_columns){0};
}

/* --- The split weight without splitting it ---------------------------------------------------- */

/* factor [G M]: 2^-depth of each column; what is read of the plan was copied when it was checked. */
static void fill_factors(float *factor, const ocs_columns *columns, int64_t G) {
    for (int64_t i = 0; i < G * columns->M; ++i) {
        factor[i] = ldexpf(1.0f, 1 - columns->shift[i]);
    }
}

typedef struct {
    const ocs_kernels *kernels;
    float *output_max;
    const float *w;
    const float *factor; /* [G M] */
    const ocs_columns *columns;
    int64_t rows; /* of a group */
} output_max_job;

static void output_max_range(int64_t begin, int64_t end, void *ctx) {
    const output_max_job *job = ctx;
    const int64_t N = job->columns->N, M = job->columns->M;
    for (int64_t o = begin; o < end; ++o) {
        job->output_max[o] = job->kernels->scaled_max(job->w + o * N, job->factor + o / job->rows * M, N);
    }
}

/* Of all copies of a channel, the one halved least has the largest weights: its factor goes to the channel itself. */
static void keep_largest(float *factor, const ocs_columns *columns, int64_t G) {
    for (int64_t g = 0; g < G; ++g) {
        const ocs_columns group = ocs_columns_group(columns, g);
        float *of_group = factor + g * group.M;
        for (int64_t m = group.N; m < group.M; ++m) {
            float *of_source = &of_group[group.index[m - group.N]];
            *of_source = *of_source < of_group[m] ? of_group[m] : *of_source;
        }
    }
}

/* Columns and factors of a checked plan; the caller frees both. */
static ocs_status columns_and_factors(ocs_columns *columns, float **factor, const ocs_plan *plan,
                                      const ocs_shape *shape) {
    ocs_status status = ocs_columns_make(columns, plan, shape);
    if (status != OCS_OK) {
        return status;
    }
    *factor = malloc((size_t)(shape->G * columns->M + 1) * sizeof **factor);
    if (*factor == NULL) {
        ocs_columns_free(columns);
        return OCS_NO_MEMORY;
    }
    fill_factors(*factor, columns, shape->G);
    return OCS_OK;
}

ocs_status ocs_output_max_f32(float *output_max, const float *w, const ocs_plan *plan, const ocs_shape *shape) {
    ocs_columns columns;
    float *factor;
    ocs_status status = columns_and_factors(&columns, &factor, plan, shape);
    if (status != OCS_OK) {
        return status;
    }
    keep_largest(factor, &columns, shape->G);
    output_max_job job = {ocs_kernel_table(), output_max, w, factor, &columns, shape->O / shape->G};
    ocs_parallel_for(shape->O, ocs_grain(columns.N), output_max_range, &job);
    free(factor);
    ocs_columns_free(&columns);
    return OCS_OK;
}

typedef struct {
    const ocs_kernels *kernels;
    int64_t *counts;
    const float *w;
    const float *factor; /* [G M] */
    const ocs_columns *columns;
    const float *limit;
    int64_t rows; /* of a group */
    int64_t R, bins;
    bool failed;
} split_histogram_job;

/* The row w [N] split: returns how many of its M columns are not zero; those are in split [M]. */
static int64_t split_row(float *restrict split, const float *w, const float *factor, const ocs_columns *columns) {
    const int64_t N = columns->N, M = columns->M;
    int64_t count = 0;
    for (int64_t m = 0; m < N; ++m) {
        split[count] = w[m] * factor[m];
        count += split[count] != 0.0f;
    }
    for (int64_t m = N; m < M; ++m) {
        split[count] = w[columns->index[m - N]] * factor[m];
        count += split[count] != 0.0f;
    }
    return count;
}

static void split_histogram_range(int64_t begin, int64_t end, void *ctx) {
    split_histogram_job *job = ctx;
    const int64_t N = job->columns->N, M = job->columns->M, bins = job->bins;
    uint32_t *own = malloc((size_t)bins * 4 * sizeof *own + (size_t)(M + 1) * sizeof(float));
    if (own == NULL) {
        __atomic_store_n(&job->failed, true, __ATOMIC_RELAXED);
        return;
    }
    float *split = (float *)(own + bins * 4);
    memset(own, 0, (size_t)bins * 4 * sizeof *own);
    int64_t counted = 0;
    for (int64_t o = begin; o < end; ++o) {
        const int64_t row = job->R == 1 ? 0 : o, g = o / job->rows;
        const ocs_columns group = ocs_columns_group(job->columns, g);
        const int64_t count = split_row(split, job->w + o * N, job->factor + g * M, &group);
        if (job->limit[row] > 0.0f) {
            job->kernels->histogram(own, split, count, bins, job->limit[row]);
        } else {
            own[0] += (uint32_t)count;
        }
        counted += count;
        if (job->R > 1 || o + 1 == end || counted >= INT64_C(1) << 30) {
            ocs_add_counts(job->counts + row * bins, own, bins, 4);
            memset(own, 0, (size_t)bins * 4 * sizeof *own);
            counted = 0;
        }
    }
    free(own);
}

ocs_status ocs_split_histogram_f32(int64_t *counts, const float *w, const ocs_plan *plan, const ocs_shape *shape,
                                   int64_t R, int64_t bins, const float *limit) {
    if (bins < 1 || bins > INT64_C(1) << 24) {
        return OCS_BAD_BINS;
    }
    if (R != 1 && R != shape->O) {
        return OCS_BAD_SHAPE;
    }
    if (!ocs_limits_valid(limit, R)) {
        return OCS_BAD_BINS;
    }
    ocs_columns columns;
    float *factor;
    ocs_status status = columns_and_factors(&columns, &factor, plan, shape);
    if (status != OCS_OK) {
        return status;
    }
    memset(counts, 0, (size_t)(R * bins) * sizeof *counts);
    split_histogram_job job = {ocs_kernel_table(),  counts, w,    factor, &columns, limit,
                               shape->O / shape->G, R,      bins, false};
    if (columns.M > 0) {
        ocs_parallel_for(shape->O, ocs_grain(columns.M), split_histogram_range, &job);
    }
    free(factor);
    ocs_columns_free(&columns);
    return job.failed ? OCS_NO_MEMORY : OCS_OK;
}
