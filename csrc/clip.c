/* Clip thresholds: where to saturate |x|, from its histogram (sections 2.1 and 4 of the paper). Shapes as in ocs.h.
 *
 * A histogram stands for a density that is constant within each bin. Positions are counted in bins, so that the values
 * in bin i lie in [i, i + 1); the threshold of a position t is t * limit / bins. The grid has the integers -Q .. Q.
 */
#include "glibc.h"
#include "kernels.h"

#include <float.h>

/* What lies beyond each bin edge; every array but the histogram itself is [bins + 1]. */
typedef struct {
    const int64_t *counts;
    int64_t bins;
    double *beyond;  /* number of values beyond edge j */
    double *sum;     /* of their positions */
    double *squares; /* sum of their squared positions */
} ocs_tails;

static void fill_tails(ocs_tails *tails) {
    const int64_t bins = tails->bins;
    tails->beyond[bins] = tails->sum[bins] = tails->squares[bins] = 0.0;
    for (int64_t j = bins - 1; j >= 0; --j) {
        double n = (double)tails->counts[j], center = (double)j + 0.5;
        tails->beyond[j] = tails->beyond[j + 1] + n;
        tails->sum[j] = tails->sum[j + 1] + n * center;
        tails->squares[j] = tails->squares[j + 1] + n * (center * center + 1.0 / 12.0);
    }
}

/* --- Least squared error ---------------------------------------------------------------------- */

/* The sum of (x - Q(x))^2 where the grid ends at t (equation 9).

   Q(x) is a sum of Q steps of size d = t / Q, one at each rounding boundary (q - 1/2) d that x exceeds. Hence
   sum x Q(x) = d sum_q (sum of x beyond boundary q), sum Q(x)^2 = d^2 sum_q (2 q - 1) (number of x beyond it). */
static double rounding_error(const ocs_tails *tails, double t, int Q) {
    double d = t / Q, products = 0.0, squares = 0.0;
    for (int q = 1; q <= Q; ++q) {
        double boundary = (q - 0.5) * d;
        int64_t j = (int64_t)boundary;
        double part = (double)tails->counts[j] * ((double)(j + 1) - boundary); /* of bin j, beyond the boundary */
        products += tails->sum[j + 1] + part * 0.5 * (boundary + (double)(j + 1));
        squares += (2 * q - 1) * (tails->beyond[j + 1] + part);
    }
    return tails->squares[0] - 2.0 * d * products + d * d * squares;
}

/* The part of the rounding error that comes from clipping at edge t alone. */
static double clipping_error(const ocs_tails *tails, int64_t t) {
    double edge = (double)t;
    return tails->squares[t] - 2.0 * edge * tails->sum[t] + edge * edge * tails->beyond[t];
}

/* Every edge from the largest down until clipping alone costs more than the best, then finer steps around that.
   What clipping costs never exceeds the whole error, and only grows as t falls: no edge below can be better. */
static double clip_mse(const ocs_tails *tails, int Q) {
    double best = (double)tails->bins, least = rounding_error(tails, best, Q);
    for (int64_t t = tails->bins - 1; t > 0 && clipping_error(tails, t) < least; --t) {
        double error = rounding_error(tails, (double)t, Q);
        if (error < least) {
            least = error;
            best = (double)t;
        }
    }
    for (double step = 0.5; step > 0.01; step /= 2) {
        const double center = best;
        for (int side = -1; side <= 1; side += 2) {
            double t = center + side * step;
            double error = t > 0.0 && t <= (double)tails->bins ? rounding_error(tails, t, Q) : DBL_MAX;
            if (error < least) {
                least = error;
                best = t;
            }
        }
    }
    return best;
}

/* --- From moments ----------------------------------------------------------------------------- */

/* The thresholds of least squared error by k - 2, k = 2 .. 9: in standard deviations of a Gaussian, and in mean
   absolute deviations of a Laplace distribution, on 2^k - 1 points. tests/test_clip.py derives them. */
static const double gauss_optimum[] = {1.2240, 1.9523, 2.4739, 2.8987, 3.2699, 3.6075, 3.9205, 4.2146};
static const double laplace_optimum[] = {2.0000, 3.4864, 4.8199, 6.0984, 7.3582, 8.6184, 9.8824, 11.1554};

/* SAWB's t = c1 rms - c2 mean|x|: as published for 2 bits, then fitted in the same way on 2^k - 1 points to the optima
   of Gaussian, Laplace, uniform, logistic, triangular and von Mises densities. tests/test_clip.py derives those. From 6
   bits on no line fits all six: a uniform density is clipped far too low. */
static const double sawb_rms[] = {3.12, 6.942, 11.823, 16.928, 22.181, 27.557, 33.022, 38.568};
static const double sawb_mean[] = {2.064, 6.304, 11.859, 17.811, 24.003, 30.378, 36.879, 43.490};

static double mean_of(const ocs_tails *tails) {
    return tails->sum[0] / tails->beyond[0];
}

static double rms_of(const ocs_tails *tails) {
    return sqrt(tails->squares[0] / tails->beyond[0]);
}

/* The optimum of the likelier of both zero-mean distributions: Laplace where log(2 e b) < log(2 pi e s^2) / 2. */
static double clip_aciq(const ocs_tails *tails, int k) {
    double b = mean_of(tails), s = rms_of(tails);
    bool laplace = b < 0.76017345053314046 * s; /* sqrt(pi / (2 e)) */
    return laplace ? laplace_optimum[k - 2] * b : gauss_optimum[k - 2] * s;
}

/* The fit knows ratios rms / mean|x| from that of the uniform density on: where they are smaller, t would fall to 0. */
static double clip_sawb(const ocs_tails *tails, int k) {
    double mean = mean_of(tails), rms = fmax(rms_of(tails), mean * sqrt(4.0 / 3.0));
    return sawb_rms[k - 2] * rms - sawb_mean[k - 2] * mean;
}

/* --- From the order --------------------------------------------------------------------------- */

/* The share 1 - 10^-(2 + k / 4) of the values is below: 99.9 % at 4 bits, 99.99 % at 8. */
static double clip_percentile(const ocs_tails *tails, int k) {
    double beyond = tails->beyond[0] * pow(10.0, -(2.0 + k / 4.0));
    int64_t j = tails->bins - 1;
    while (j > 0 && tails->beyond[j] < beyond) {
        --j;
    }
    return (double)(j + 1) - (beyond - tails->beyond[j + 1]) / (double)tails->counts[j];
}

/* --- Least Kullback-Leibler divergence -------------------------------------------------------- */

enum { LOGARITHMS = 4096 };                 /* kept: most counts of an output channel are small */
static const double NEXT_TO_NOTHING = 1e-4; /* as in MXNet's smoothing */

/* Sums over the bins before each edge, every array [bins + 1], and logarithms of whole numbers. */
typedef struct {
    double *values;
    double *occupied;   /* bins that are not empty */
    double *entropy;    /* n log n */
    double *logarithms; /* [LOGARITHMS]: of 0 (not used), 1, 2 ... */
} ocs_sums;

static double log_of(const ocs_sums *sums, double n) {
    return n < LOGARITHMS ? sums->logarithms[(int)n] : log(n);
}

/* The arrays in memory [3 edges + LOGARITHMS], and the logarithms that serve every histogram. */
static ocs_sums sums_in(double *memory, int64_t edges) {
    ocs_sums sums = {memory, memory + edges, memory + 2 * edges, memory + 3 * edges};
    for (int n = 0; n < LOGARITHMS; ++n) {
        sums.logarithms[n] = log(n);
    }
    return sums;
}

static double n_log_n(double n) {
    return n > 0.0 ? n * log(n) : 0.0;
}

static void fill_sums(ocs_sums *sums, const ocs_tails *tails) {
    sums->values[0] = sums->occupied[0] = sums->entropy[0] = 0.0;
    for (int64_t j = 0; j < tails->bins; ++j) {
        double n = (double)tails->counts[j];
        sums->values[j + 1] = sums->values[j] + n;
        sums->occupied[j + 1] = sums->occupied[j] + (n > 0.0);
        sums->entropy[j + 1] = sums->entropy[j] + n_log_n(n);
    }
}

/* The divergence of the quantized distribution from the clipped one, with the grid's end at edge t.

   P: the bins before t, all that is beyond counted into the last of them. Its quantized form spreads the values of each
   grid cell, without those beyond, evenly over the cell's occupied bins; where the last bin has none of its own, it
   counts as next to nothing. Within a cell that form is constant, so that sums over bins suffice.

   Neither is normalized: sum P log(P / Q) - P + Q. For a small clipped share that is MXNet's normalized divergence, but
   there a threshold next to 0, with all but a few values clipped, can seem perfect once Q is scaled up to P. */
static double divergence(const ocs_tails *tails, const ocs_sums *sums, int64_t t, int Q) {
    double cross = 0.0; /* sum of P log(its quantized form) */
    double last_log = 0.0;
    int64_t begin = 0;
    for (int q = 0; q <= Q; ++q) {
        int64_t end = q < Q ? ((2 * q + 1) * t + Q - 1) / (2 * Q) : t; /* before it, bin centers round to q at most */
        double n = sums->values[end] - sums->values[begin];
        last_log = n > 0.0 ? log_of(sums, n) - log_of(sums, sums->occupied[end] - sums->occupied[begin]) : 0.0;
        cross += n * last_log;
        begin = end;
    }
    const double beyond = tails->beyond[t];
    double inside = sums->values[t], entropy = sums->entropy[t - 1] + n_log_n((double)tails->counts[t - 1] + beyond);
    if (beyond > 0.0 && tails->counts[t - 1] == 0) {
        inside += NEXT_TO_NOTHING;
        last_log = log(NEXT_TO_NOTHING);
    }
    return entropy - cross - beyond * last_log - tails->beyond[0] + inside;
}

static double clip_kl(const ocs_tails *tails, const ocs_sums *sums, int Q) {
    double best = (double)tails->bins, least = DBL_MAX;
    for (int64_t t = tails->bins; t > Q; --t) {
        double found = sums->values[t] > 0.0 ? divergence(tails, sums, t, Q) : DBL_MAX;
        if (found < least) {
            least = found;
            best = (double)t;
        }
    }
    return best;
}

/* --- The entry -------------------------------------------------------------------------------- */

static const char *const names[] = {
    [OCS_CLIP_MSE] = "mse",
    [OCS_CLIP_ACIQ] = "aciq",
    [OCS_CLIP_ACIQ_RELEASE] = "aciq-release",
    [OCS_CLIP_KL] = "kl",
    [OCS_CLIP_PERCENTILE] = "percentile",
    [OCS_CLIP_STD] = "std",
    [OCS_CLIP_SAWB] = "sawb",
    [OCS_CLIP_MSE_RELEASE] = "mse-release",
    [OCS_CLIP_KL_RELEASE] = "kl-release",
};

const char *ocs_clip_name(int64_t method) {
    return method >= 0 && method < (int64_t)(sizeof names / sizeof names[0]) ? names[method] : NULL;
}

bool ocs_clip_takes_values(int64_t method) {
    return method == OCS_CLIP_MSE_RELEASE || method == OCS_CLIP_ACIQ_RELEASE || method == OCS_CLIP_KL_RELEASE;
}

typedef struct {
    float *threshold;
    const int64_t *counts;
    const float *limit;
    int64_t bins;
    int bits;
    bool is_signed;
    ocs_clip method;
} clip_job;

/* The threshold in bins. An unsigned grid has the positive half of one with a bit more. */
static double clip_position(const clip_job *job, const ocs_tails *tails, ocs_sums *sums) {
    const int k = job->is_signed ? job->bits : job->bits + 1, Q = ocs_qmax(k);
    switch (job->method) {
    case OCS_CLIP_MSE: return clip_mse(tails, Q);
    case OCS_CLIP_ACIQ: return clip_aciq(tails, k);
    case OCS_CLIP_KL: fill_sums(sums, tails); return clip_kl(tails, sums, Q);
    case OCS_CLIP_PERCENTILE: return clip_percentile(tails, job->bits);
    case OCS_CLIP_STD: return 0.5 * (k + 1) * rms_of(tails);
    case OCS_CLIP_SAWB: return clip_sawb(tails, k);
    default: return (double)job->bins;
    }
}

static void clip_range(ocs_range *range) {
    const clip_job *job = range->ctx;
    const int64_t edges = job->bins + 1;
    double *memory = range->scratch;
    ocs_sums sums = {NULL, NULL, NULL, NULL};
    if (job->method == OCS_CLIP_KL) {
        sums = sums_in(memory + 3 * edges, edges);
    }
    for (int64_t row = range->begin; row < range->end; ++row) {
        ocs_tails tails = {job->counts + row * job->bins, job->bins, memory, memory + edges, memory + 2 * edges};
        fill_tails(&tails);
        const float limit = job->limit[row];
        const bool empty = tails.beyond[0] == 0.0 || limit == 0.0f;
        double threshold = empty ? limit : clip_position(job, &tails, &sums) * limit / (double)job->bins;
        job->threshold[row] = threshold < limit ? fmaxf((float)threshold, FLT_TRUE_MIN) : limit;
    }
}

ocs_status ocs_clip_threshold_f32(float *threshold, const int64_t *counts, const float *limit, int64_t R, int64_t bins,
                                  int bits, bool is_signed, ocs_clip method) {
    OCS_TRY(ocs_check_bits(bits));
    OCS_TRY(ocs_clip_name(method) != NULL && !ocs_clip_takes_values(method) ? OCS_OK : OCS_BAD_METHOD);
    OCS_TRY(ocs_check_histogram(bins, OCS_MAX_SEARCH_BINS, limit, R));
    for (int64_t i = 0; i < R * bins; ++i) {
        OCS_TRY(counts[i] >= 0 ? OCS_OK : OCS_BAD_BINS);
    }
    clip_job job = {threshold, counts, limit, bins, bits, is_signed, method};
    const size_t tails = 3 * ((size_t)bins + 1), sums = method == OCS_CLIP_KL ? tails + LOGARITHMS : 0;
    return ocs_parallel_for(R, 1, (tails + sums) * sizeof(double), clip_range, &job);
}
