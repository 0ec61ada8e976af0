/* Where the outliers are: maxima and histograms of absolute values. Shapes as in ocs.h. */
#include "kernels.h"

/* --- Plain kernels ---------------------------------------------------------------------------- */

float ocs_abs_max_ref(const float *x, int64_t N) {
    float max = 0.0f;
    for (int64_t i = 0; i < N; ++i) {
        max = ocs_larger_abs(max, x[i]);
    }
    return max;
}

float ocs_scaled_max_ref(const float *x, const float *factor, int64_t N) {
    float max = 0.0f;
    for (int64_t i = 0; i < N; ++i) {
        max = ocs_larger_abs(max, x[i] * factor[i]);
    }
    return max;
}

void ocs_channel_max_ref(float *restrict channel_max, const float *w, int64_t O, int64_t C, int64_t K, int64_t stride) {
    for (int64_t c = 0; c < C; ++c) {
        channel_max[c] = 0.0f;
        for (int64_t o = 0; o < O; ++o) {
            channel_max[c] = ocs_larger_abs(channel_max[c], ocs_abs_max_ref(w + o * stride + c * K, K));
        }
    }
}

static int64_t bin_of(float x, int64_t bins, float limit) {
    const float position = fabsf(x) / limit * (float)bins;
    return position < (float)(bins - 1) ? (int64_t)position : bins - 1;
}

void ocs_histogram_ref(uint32_t *restrict counts, const float *x, int64_t N, int64_t bins, float limit) {
    for (int64_t i = 0; i < N; ++i) {
        counts[bin_of(x[i], bins, limit)] += 1;
    }
}

void ocs_signed_histogram_ref(uint32_t *restrict counts, const float *x, int64_t N, int64_t bins, float limit) {
    for (int64_t i = 0; i < N; ++i) {
        const int64_t steps = ocs_abs_bits(x[i]) < 0x00800000 ? 0 : bin_of(x[i], bins, limit) + 1;
        counts[bins + (signbit(x[i]) ? -steps : steps)] += 1;
    }
}

void ocs_octave_histogram_ref(uint32_t *restrict counts, const float *x, int64_t N, int64_t step, int32_t base) {
    for (int64_t i = 0; i < N; ++i) {
        int32_t bin = ocs_octave_bin(x[i]) - base;
        bin = bin < 0 ? 0 : bin;
        counts[i * step + (bin < OCS_OCTAVE_BINS ? bin : OCS_OCTAVE_BINS - 1)] += 1;
    }
}

/* --- Maxima ----------------------------------------------------------------------------------- */

typedef struct {
    const ocs_kernels *kernels;
    const float *x;
    uint32_t max_bits;
} abs_max_job;

static void abs_max_range(ocs_range *range) {
    abs_max_job *job = range->ctx;
    uint32_t bits = ocs_abs_bits(job->kernels->abs_max(job->x + range->begin, range->end - range->begin));
    uint32_t seen = __atomic_load_n(&job->max_bits, __ATOMIC_RELAXED);
    while (seen < bits &&
           !__atomic_compare_exchange_n(&job->max_bits, &seen, bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}

float ocs_abs_max_f32(const float *x, int64_t N) {
    abs_max_job job = {ocs_kernel_table(), x, 0};
    ocs_parallel_for(N, OCS_GRAIN, 0, abs_max_range, &job);
    float max;
    memcpy(&max, &job.max_bits, sizeof max);
    return max;
}

typedef struct {
    const ocs_kernels *kernels;
    float *channel_max;
    const float *w;
    const ocs_shape *shape;
} channel_max_job;

/* Items are input channels over all groups. */
static void channel_max_range(ocs_range *range) {
    const channel_max_job *job = range->ctx;
    const int64_t C = job->shape->C, K = job->shape->K, rows = job->shape->O / job->shape->G;
    for (int64_t count, begin = range->begin; begin < range->end; begin += count) {
        const int64_t g = begin / C, c = begin % C;
        const float *w = job->w + g * rows * C * K + c * K;
        count = range->end - begin < C - c ? range->end - begin : C - c;
        job->kernels->channel_max(job->channel_max + begin, w, rows, count, K, C * K);
    }
}

ocs_status ocs_channel_max_f32(float *channel_max, const float *w, const ocs_shape *shape) {
    OCS_TRY(ocs_check_shape(shape));
    if (shape->O == 0 || shape->K == 0) {
        ocs_clear(channel_max, shape->G * shape->C * (int64_t)sizeof *channel_max);
        return OCS_OK;
    }
    channel_max_job job = {ocs_kernel_table(), channel_max, w, shape};
    const int64_t grain = ocs_grain(shape->O / shape->G * shape->K);
    return ocs_parallel_for(shape->G * shape->C, grain, 0, channel_max_range, &job);
}

/* --- Histograms ------------------------------------------------------------------------------- */

ocs_status ocs_check_histogram(int64_t bins, int64_t most, const float *limit, int64_t R) {
    bool valid = bins >= 1 && bins <= most;
    OCS_TRY(valid ? ocs_check_sizes(R, bins, 1) : OCS_BAD_BINS);
    for (int64_t row = 0; row < R && valid; ++row) {
        valid = isfinite(limit[row]) && limit[row] >= 0.0f;
    }
    return valid ? OCS_OK : OCS_BAD_BINS;
}

void ocs_add_counts(int64_t *counts, const uint32_t *parts_of_counts, int64_t size, int parts) {
    for (int64_t i = 0; i < size; ++i) {
        int64_t sum = 0;
        for (int part = 0; part < parts; ++part) {
            sum += parts_of_counts[part * size + i];
        }
        if (sum != 0) {
            __atomic_fetch_add(&counts[i], sum, __ATOMIC_RELAXED);
        }
    }
}

typedef struct {
    void (*kernel)(uint32_t *restrict counts, const float *x, int64_t N, int64_t bins, float limit);
    int64_t *counts;
    const float *x;
    int64_t bins;
    float limit;
    int64_t size;
} histogram_job;

/* Counts a range into scratch [OCS_COUNTS][size]. */
static void histogram_range(ocs_range *range) {
    const histogram_job *job = range->ctx;
    for (int64_t begin = range->begin; begin < range->end; begin += OCS_MOST_COUNTED) {
        const int64_t N = range->end - begin < OCS_MOST_COUNTED ? range->end - begin : OCS_MOST_COUNTED;
        memset(range->scratch, 0, (size_t)(OCS_COUNTS * job->size) * sizeof(uint32_t));
        job->kernel(range->scratch, job->x + begin, N, job->bins, job->limit);
        ocs_add_counts(job->counts, range->scratch, job->size, OCS_COUNTS);
    }
}

/* Into counts [size]; limit = 0 puts all into bin `first`. */
static ocs_status run_histogram(histogram_job *job, int64_t N, int64_t first) {
    OCS_TRY(ocs_check_histogram(job->bins, OCS_MAX_BINS, &job->limit, 1));
    OCS_TRY(ocs_check_sizes(N, 1, 1));
    memset(job->counts, 0, (size_t)job->size * sizeof *job->counts);
    if (job->limit == 0.0f) {
        job->counts[first] = N;
        return OCS_OK;
    }
    /* A range is worth its own counts only where it has many more elements than they have. */
    const int64_t grain = job->size > OCS_GRAIN / 16 ? 16 * job->size : OCS_GRAIN;
    return ocs_parallel_for(N, grain, (size_t)(OCS_COUNTS * job->size) * sizeof(uint32_t), histogram_range, job);
}

ocs_status ocs_histogram_f32(int64_t *counts, const float *x, int64_t N, int64_t bins, float limit) {
    histogram_job job = {ocs_kernel_table()->histogram, counts, x, bins, limit, bins};
    return run_histogram(&job, N, 0);
}

ocs_status ocs_signed_histogram_f32(int64_t *counts, const float *x, int64_t N, int64_t bins, float limit) {
    const int64_t valid = bins >= 1 && bins <= OCS_MAX_BINS ? bins : 0;
    histogram_job job = {ocs_kernel_table()->signed_histogram, counts, x, bins, limit, 2 * valid + 1};
    return run_histogram(&job, N, bins);
}

typedef struct {
    const ocs_kernels *kernels;
    int64_t *counts;
    const float *x;
    int64_t C, length; /* a row of x: the K elements of one channel, or one element of each of C channels */
    int64_t step;
    int32_t base;
} octave_job;

/* Counts into the first bin of each channel what `rows` values have left out of all its bins. */
static void fill_first_bins(uint32_t *restrict counts, int64_t C, int64_t rows) {
    for (int64_t c = 0; c < C; ++c, counts += OCS_OCTAVE_BINS) {
        uint32_t sum = 0;
        for (int i = 0; i < OCS_OCTAVE_BINS; ++i) {
            sum += counts[i];
        }
        counts[0] += (uint32_t)rows - sum;
    }
}

/* Counts rows into scratch [C][OCS_OCTAVE_BINS]. */
static void octave_range(ocs_range *range) {
    const octave_job *job = range->ctx;
    const int64_t size = job->C * OCS_OCTAVE_BINS, rows = 1 + OCS_MOST_COUNTED / job->length;
    for (int64_t begin = range->begin; begin < range->end;) {
        const int64_t last = range->end - begin < rows ? range->end : begin + rows;
        const int64_t count = last - begin;
        memset(range->scratch, 0, (size_t)size * sizeof(uint32_t));
        for (; begin < last; ++begin) {
            uint32_t *counts = (uint32_t *)range->scratch + (job->step == 0 ? begin % job->C * OCS_OCTAVE_BINS : 0);
            job->kernels->octave_histogram(counts, job->x + begin * job->length, job->length, job->step, job->base);
        }
        if (job->step > 0) {
            fill_first_bins(range->scratch, job->C, count);
        }
        ocs_add_counts(job->counts, range->scratch, size, 1);
    }
}

ocs_status ocs_octave_histogram_f32(int64_t *counts, const float *x, int64_t N, int64_t C, int64_t K, float limit) {
    int exponent;
    if (!isfinite(limit) || frexpf(limit, &exponent) != 0.5f || limit < 0x1p-110f) {
        return OCS_BAD_LIMIT;
    }
    if (K >= INT64_C(1) << 31 || C >= INT64_C(1) << 31) {
        return OCS_TOO_LARGE;
    }
    OCS_TRY(ocs_check_sizes(N, C, K));
    ocs_clear(counts, C * OCS_OCTAVE_BINS * (int64_t)sizeof *counts);
    if (N == 0 || C == 0 || K == 0) {
        return OCS_OK;
    }
    const bool by_channel = K > 1;
    octave_job job = {.kernels = ocs_kernel_table(), .counts = counts, .x = x, .C = C};
    job.length = by_channel ? K : C;
    job.step = by_channel ? 0 : OCS_OCTAVE_BINS;
    job.base = ocs_octave_bin(limit) - OCS_OCTAVE_BINS;
    const size_t scratch = (size_t)(C * OCS_OCTAVE_BINS) * sizeof(uint32_t);
    const int64_t counts_worth = 4 * C * OCS_OCTAVE_BINS / job.length, grain = ocs_grain(job.length);
    return ocs_parallel_for(by_channel ? N * C : N, grain > counts_worth ? grain : counts_worth, scratch, octave_range,
                            &job);
}
