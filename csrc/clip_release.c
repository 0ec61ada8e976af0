/* Clip thresholds as the paper's release finds them, for its tables. Shapes as in ocs.h.
 *
 * It counts the values themselves, with their signs, into few bins, as numpy.histogram does; a bin's center stands for
 * its values. Its quantizer uses one integer more than ours, -2^(k - 1). All is in double.
 */
#include "glibc.h"
#include "kernels.h"

#include <float.h>

enum { MSE_BINS = 201, ACIQ_BINS = 101, KL_BINS = 1001 };

/* Values x [N], each of them counts [N] times (once where that is NULL), and what they are as a whole. */
typedef struct {
    const float *x;
    const int64_t *counts;
    int64_t N;
    double total, lowest, highest, largest, deviation; /* number of values, min, max, max |x|, mean |x - mean x| */
} ocs_sample;

static double count_of(const ocs_sample *sample, int64_t i) {
    return sample->counts != NULL ? (double)sample->counts[i] : 1.0;
}

static ocs_status describe(ocs_sample *sample) {
    double sum = 0.0, deviations = 0.0;
    sample->lowest = INFINITY;
    sample->highest = -INFINITY;
    for (int64_t i = 0; i < sample->N; ++i) {
        const double x = sample->x[i], count = count_of(sample, i);
        OCS_TRY(isfinite(x) ? OCS_OK : OCS_NOT_FINITE);
        if (count > 0.0) {
            sample->lowest = fmin(sample->lowest, x);
            sample->highest = fmax(sample->highest, x);
            sample->total += count;
            sum += count * x;
        }
    }
    for (int64_t i = 0; i < sample->N; ++i) {
        deviations += count_of(sample, i) * fabs(sample->x[i] - sum / sample->total);
    }
    sample->largest = fmax(-sample->lowest, sample->highest);
    sample->deviation = deviations / sample->total;
    return OCS_OK;
}

/* --- Histogram -------------------------------------------------------------------------------- */

typedef struct {
    double counts[KL_BINS];
    int bins;
    double begin, end, step;
} ocs_bins;

static double edge_of(const ocs_bins *h, int i) {
    return i == h->bins ? h->end : i * h->step + h->begin;
}

static double center_of(const ocs_bins *h, int i) {
    return (edge_of(h, i) + edge_of(h, i + 1)) / 2.0;
}

/* The bin that x is in, the end in the last one; the quotient may be a bin off. */
static int bin_of(const ocs_bins *h, double x) {
    if (h->step == 0.0) {
        return h->bins / 2;
    }
    int i = (int)((x - h->begin) / (h->end - h->begin) * h->bins);
    i = i < h->bins ? i : h->bins - 1;
    i -= x < edge_of(h, i);
    return i + (i < h->bins - 1 && x >= edge_of(h, i + 1));
}

static void fill_bins(ocs_bins *h, const ocs_sample *sample, int bins, double begin, double end) {
    const double widen = begin == end ? 0.5 : 0.0;
    memset(h->counts, 0, sizeof h->counts);
    h->bins = bins;
    h->begin = begin - widen;
    h->end = end + widen;
    h->step = (h->end - h->begin) / bins;
    for (int64_t i = 0; i < sample->N; ++i) {
        const double count = count_of(sample, i);
        if (count > 0.0) {
            h->counts[bin_of(h, sample->x[i])] += count;
        }
    }
}

/* --- Least squared error ---------------------------------------------------------------------- */

/* The squared error of the release's quantizer where it clips at t. */
static double clipped_error(const ocs_bins *h, double t, int k) {
    const double Q = ldexp(1.0, k - 1) - 1.0, scale = Q / t;
    double error = 0.0;
    for (int i = 0; i < h->bins; ++i) {
        const double c = center_of(h, i);
        double off = fabs(c) - t;
        if (off <= 0.0) {
            off = c - fmin(fmax(rint(c * scale), -Q - 1.0), Q) / scale;
        }
        error += off * off * h->counts[i];
    }
    return error;
}

static double release_mse(ocs_bins *h, const ocs_sample *sample, int k) {
    double best = 0.0, least = INFINITY;
    fill_bins(h, sample, MSE_BINS, sample->lowest, sample->highest);
    for (int percent = 1; percent < 100; ++percent) {
        const double t = percent / 100.0 * sample->largest, error = clipped_error(h, t, k);
        if (error < least) {
            least = error;
            best = t;
        }
    }
    return best;
}

/* --- The better of two distributions ---------------------------------------------------------- */

/* k = 2 .. 8: in standard deviations and in mean absolute deviations, about the optima for one bit less. */
static const double gauss_release[] = {1.47818312, 1.80489289, 2.19227856, 2.57733584,
                                       2.94451183, 3.29076248, 3.61691335};
static const double laplace_release[] = {2.33152939, 3.04528770, 4.00378631, 5.08252088,
                                         6.23211675, 7.42700429, 8.65265030};

/* sigma is that of a Gaussian which would reach as far among so many values. */
static double release_aciq(ocs_bins *h, const ocs_sample *sample, int k) {
    const double pi = 3.14159265358979312, share = 0.175 * (1.0 + sqrt(pi * log(4.0)));
    const double sigma = (sample->highest - sample->lowest) * share / sqrt(2.0 * log(sample->total));
    const int constant = (k < 8 ? k : 8) - 2;
    const double gauss = gauss_release[constant] * sigma, laplace = laplace_release[constant] * sample->deviation;
    fill_bins(h, sample, ACIQ_BINS, -sample->largest, sample->largest);
    return clipped_error(h, gauss, k) < clipped_error(h, laplace, k) ? gauss : laplace;
}

/* --- Least Kullback-Leibler divergence -------------------------------------------------------- */

static const double SMOOTHING = 1e-4;

/* Every zero becomes SMOOTHING, taken evenly from the others; returns the sum, 0 where all are zero. */
static double smooth(double *p, int size) {
    int zeros = 0;
    double sum = 0.0;
    for (int i = 0; i < size; ++i) {
        zeros += p[i] == 0.0;
        sum += p[i];
    }
    for (int i = 0; i < size && zeros < size; ++i) {
        p[i] = p[i] == 0.0 ? SMOOTHING : p[i] - SMOOTHING * zeros / (size - zeros);
    }
    return sum;
}

/* q [size]: the bins h merged into so many levels, the rest into the last, and each spread evenly over its non-zero
   bins; the last bin is left out. */
static void merge_and_spread(double *q, const double *h, int size, int levels) {
    const int merged = size / levels;
    for (int level = 0; level < levels; ++level) {
        const int begin = level * merged, end = level < levels - 1 ? begin + merged : size;
        const int filled = end < size ? end : size - 1;
        double sum = 0.0;
        int occupied = 0;
        for (int i = begin; i < end; ++i) {
            sum += h[i];
            occupied += i < filled && h[i] != 0.0;
        }
        for (int i = begin; i < end; ++i) {
            q[i] = i < filled && h[i] != 0.0 ? sum / occupied : 0.0;
        }
    }
}

/* Of the middle 2 reach + 1 bins; p, q [KL_BINS] are scratch. */
static double release_divergence(const ocs_bins *h, int reach, int levels, double *p, double *q) {
    const int size = 2 * reach + 1, first = (h->bins - size) / 2;
    double divergence = 0.0;
    merge_and_spread(q, h->counts + first, size, levels);
    memcpy(p, h->counts + first, (size_t)size * sizeof *p);
    for (int i = 0; i < first; ++i) {
        p[0] += h->counts[i];
        p[size - 1] += h->counts[h->bins - 1 - i];
    }
    const double p_sum = smooth(p, size), q_sum = smooth(q, size);
    for (int i = 0; i < size && q_sum > 0.0; ++i) {
        divergence += p[i] / p_sum * log(p[i] / p_sum / (q[i] / q_sum));
    }
    return q_sum > 0.0 ? divergence : INFINITY;
}

static double release_kl(ocs_bins *h, const ocs_sample *sample, int k) {
    const int levels = (1 << k) - 1, middle = KL_BINS / 2;
    double p[KL_BINS], q[KL_BINS], least = INFINITY;
    int best = levels / 2;
    fill_bins(h, sample, KL_BINS, -sample->largest, sample->largest);
    for (int reach = levels / 2; reach <= middle; ++reach) {
        const double found = release_divergence(h, reach, levels, p, q);
        if (found < least) {
            least = found;
            best = reach;
        }
    }
    return edge_of(h, middle + best + 1);
}

/* --- The entry -------------------------------------------------------------------------------- */

typedef struct {
    float *threshold;
    const float *x;
    const int64_t *counts;
    int64_t N;
    int k;
    ocs_clip method;
} release_job;

static double release_threshold(const release_job *job, ocs_bins *h, const ocs_sample *sample) {
    switch (job->method) {
    case OCS_CLIP_MSE_RELEASE: return release_mse(h, sample, job->k);
    case OCS_CLIP_ACIQ_RELEASE: return release_aciq(h, sample, job->k);
    default: return release_kl(h, sample, job->k);
    }
}

static void release_range(ocs_range *range) {
    const release_job *job = range->ctx;
    for (int64_t row = range->begin; row < range->end; ++row) {
        const int64_t *counts = job->counts != NULL ? job->counts + row * job->N : NULL;
        ocs_sample sample = {.x = job->x + row * job->N, .counts = counts, .N = job->N};
        const ocs_status status = describe(&sample);
        if (status != OCS_OK) {
            range->status = status;
            return;
        }
        const double largest = sample.total > 0.0 ? sample.largest : 0.0;
        const double found = largest > 0.0 ? release_threshold(job, range->scratch, &sample) : 0.0;
        const bool usable = found > 0.0 && found <= FLT_MAX;
        job->threshold[row] = usable ? fmaxf((float)found, FLT_TRUE_MIN) : (float)largest;
    }
}

ocs_status ocs_release_threshold_f32(float *threshold, const float *x, const int64_t *counts, int64_t R, int64_t N,
                                     int bits, bool is_signed, ocs_clip method) {
    OCS_TRY(ocs_check_bits(bits));
    OCS_TRY(ocs_clip_takes_values(method) ? OCS_OK : OCS_BAD_METHOD);
    OCS_TRY(ocs_check_sizes(R, N, 1));
    for (int64_t i = 0; counts != NULL && i < R * N; ++i) {
        OCS_TRY(counts[i] >= 0 ? OCS_OK : OCS_BAD_BINS);
    }
    release_job job = {threshold, x, counts, N, is_signed ? bits : bits + 1, method};
    return ocs_parallel_for(R, ocs_grain(N), sizeof(ocs_bins), release_range, &job);
}
