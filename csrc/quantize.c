/* Linear quantization: split weights to integers and back, and any array to the grid and back.

   Weights round as the paper's Q(x) = floor(x + 1/2), which makes quantization-aware splitting exact; everything else
   rounds half to even, as ONNX QuantizeLinear does. Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

/* --- Plain kernels ---------------------------------------------------------------------------- */

void ocs_quantize_row_ref(int8_t *restrict q, const float *w, const ocs_columns *columns, float scale, int32_t qmax) {
    for (int64_t m = 0; m < columns->M; ++m) {
        int64_t from = m < columns->N ? m : columns->index[m - columns->N];
        q[m] = ocs_split_column(ocs_half_steps(w[from], scale), columns->addend[m], columns->shift[m],
                                ocs_odd_of(columns, m), qmax);
    }
}

/* The sums of integers are exact in float32, so that only the product rounds. */
void ocs_fold_row_ref(float *restrict w_hat, const int8_t *q, const int32_t *index, int64_t N, int64_t M, float scale) {
    for (int64_t i = 0; i < N; ++i) {
        w_hat[i] = (float)q[i];
    }
    for (int64_t m = N; m < M; ++m) {
        w_hat[index[m - N]] += (float)q[m];
    }
    for (int64_t i = 0; i < N; ++i) {
        w_hat[i] *= scale;
    }
}

void ocs_squared_error_ref(double error[2], const float *x, const float *q, int64_t N, float scale) {
    double signal[8] = {0.0}, noise[8] = {0.0};
    for (int64_t i = 0; i < N; ++i) {
        const float x_hat = q[i] * scale, difference = x[i] - x_hat;
        signal[i % 8] += (double)x[i] * x[i];
        noise[i % 8] += (double)difference * difference;
    }
    for (int lane = 0; lane < 8; ++lane) {
        error[0] += signal[lane];
        error[1] += noise[lane];
    }
}

void ocs_error_sums_ref(double sum[5], const float *w, const float *q, int64_t N, float scale) {
    double lanes[5][4] = {{0.0}};
    for (int64_t i = 0; i < N; ++i) {
        ocs_add_error(lanes, i % 4, w[i], q[i] * scale);
    }
    ocs_sum_lanes(sum, lanes);
}

/* round_half_even(x / scale) on the grid; NaN stays NaN, and adding 0 turns -0 into +0. */
static float to_grid(float x, float scale, float qmin, float qmax) {
    float q = rintf(x / scale);
    q = q > qmax ? qmax : q;
    q = q < qmin ? qmin : q;
    return q + 0.0f;
}

void ocs_quantize_ref(uint8_t *restrict q, const float *x, int64_t N, float scale, float qmin, float qmax) {
    for (int64_t i = 0; i < N; ++i) {
        float on_grid = to_grid(x[i], scale, qmin, qmax);
        q[i] = isnan(on_grid) ? 0 : (uint8_t)(int32_t)on_grid;
    }
}

void ocs_dequantize_ref(float *restrict x, const uint8_t *q, int64_t N, float scale, bool is_signed) {
    for (int64_t i = 0; i < N; ++i) {
        x[i] = (is_signed ? (float)(int8_t)q[i] : (float)q[i]) * scale;
    }
}

void ocs_fake_quantize_ref(float *restrict x_hat, const float *x, int64_t N, float scale, float qmin, float qmax) {
    for (int64_t i = 0; i < N; ++i) {
        x_hat[i] = to_grid(x[i], scale, qmin, qmax) * scale;
    }
}

/* --- The grid --------------------------------------------------------------------------------- */

int32_t ocs_qmax(int bits) {
    return bits >= 1 && bits <= 31 ? (INT32_C(1) << (bits - 1)) - 1 : 0;
}

ocs_status ocs_check_bits(int64_t bits) {
    return bits >= OCS_MIN_BITS && bits <= OCS_MAX_BITS ? OCS_OK : OCS_BAD_BITS;
}

/* --- Weights ---------------------------------------------------------------------------------- */

/* What the entries of this section are called with; each of them uses a part. */
typedef struct {
    ocs_rows rows;
    ocs_scale scale;
    const float *w;
    float *w_hat;
    const int8_t *ints_in;
    int8_t *ints_out;
    int32_t qmax;
    double *error; /* [O][2], or of output_error [O] */
    double gain;
} weight_job;

/* Checks plan, shape and scale, then works row by row, where `folded` with room for a row's folded integers [N]. */
static ocs_status for_rows(weight_job *job, const ocs_plan *plan, const ocs_shape *shape, bool folded,
                           ocs_work_fn work) {
    OCS_TRY(ocs_rows_begin(&job->rows, plan, shape));
    const int64_t N = job->rows.columns.N, M = job->rows.columns.M;
    ocs_status status = ocs_check_scale(job->scale, shape->O);
    if (status == OCS_OK && M > 0) {
        status = ocs_parallel_for(shape->O, ocs_grain(M), folded ? (size_t)N * sizeof(float) : 0, work, job);
    }
    ocs_rows_end(&job->rows);
    return status;
}

static void quantize_rows(ocs_range *range) {
    const weight_job *job = range->ctx;
    for (int64_t o = range->begin; o < range->end; ++o) {
        const ocs_columns columns = ocs_columns_of_row(&job->rows, o);
        job->rows.kernels->quantize_row(job->ints_out + o * columns.M, job->w + o * columns.N, &columns,
                                        ocs_scale_of(job->scale, o), job->qmax);
    }
}

ocs_status ocs_quantize_weight_f32(int8_t *ints, const float *w, const ocs_plan *plan, ocs_scale scale,
                                   const ocs_shape *shape, int bits, bool quantization_aware) {
    OCS_TRY(ocs_check_bits(bits));
    weight_job job = {.scale = scale, .w = w, .ints_out = ints, .qmax = ocs_qmax(bits)};
    const ocs_plan used = {plan->source, plan->parts, quantization_aware ? plan->offset : NULL};
    return for_rows(&job, &used, shape, false, quantize_rows);
}

/* w_hat [N] of output channel o, in units of `scale`. */
static void fold_one(float *w_hat, const weight_job *job, int64_t o, float scale) {
    const ocs_columns columns = ocs_columns_of_row(&job->rows, o);
    job->rows.kernels->fold_row(w_hat, job->ints_in + o * columns.M, columns.index, columns.N, columns.M, scale);
}

static void fold_rows(ocs_range *range) {
    const weight_job *job = range->ctx;
    for (int64_t o = range->begin; o < range->end; ++o) {
        fold_one(job->w_hat + o * job->rows.columns.N, job, o, ocs_scale_of(job->scale, o));
    }
}

ocs_status ocs_fold_f32(float *w_hat, const int8_t *ints, const int64_t *source, ocs_scale scale,
                        const ocs_shape *shape) {
    weight_job job = {.scale = scale, .w_hat = w_hat, .ints_in = ints};
    return for_rows(&job, &(ocs_plan){source, NULL, NULL}, shape, false, fold_rows);
}

/* --- Errors of weights ------------------------------------------------------------------------ */

static void squared_error_rows(ocs_range *range) {
    const weight_job *job = range->ctx;
    const int64_t N = job->rows.columns.N;
    for (int64_t o = range->begin; o < range->end; ++o) {
        fold_one(range->scratch, job, o, 1.0f);
        job->rows.kernels->squared_error(job->error + 2 * o, job->w + o * N, range->scratch, N,
                                         ocs_scale_of(job->scale, o));
    }
}

ocs_status ocs_weight_error_f32(double error[2], const float *w, const int8_t *ints, const int64_t *source,
                                ocs_scale scale, const ocs_shape *shape) {
    error[0] = error[1] = 0.0;
    OCS_TRY(ocs_check_shape(shape));
    const int64_t rows = shape->C > 0 && shape->K > 0 ? shape->O : 0; /* any number of empty ones costs nothing */
    weight_job job = {.scale = scale, .w = w, .ints_in = ints};
    job.error = calloc((size_t)rows * 2 + 1, sizeof *job.error);
    if (job.error == NULL) {
        return OCS_NO_MEMORY;
    }
    ocs_status status = for_rows(&job, &(ocs_plan){source, NULL, NULL}, shape, true, squared_error_rows);
    for (int64_t i = 0; i < 2 * rows; ++i) {
        error[i % 2] += job.error[i];
    }
    for (int i = 0; i < 2; ++i) { /* which NaN it is depends on the instruction set */
        error[i] = isnan(error[i]) ? (double)NAN : error[i];
    }
    free(job.error);
    return status;
}

/* (sum v^2 + sum of filters' (sum v)^2 + (sum v)^2) / 3, element by element. */
typedef struct {
    double squares, of_filter, of_filters, all;
} output_power;

static void add_element(output_power *p, double v) {
    p->squares += v * v;
    p->of_filter += v;
}

static void end_filter(output_power *p) {
    p->of_filters += p->of_filter * p->of_filter;
    p->all += p->of_filter;
    p->of_filter = 0.0;
}

static double output_power_of(const output_power *p) {
    return (p->squares + p->of_filters + p->all * p->all) / 3.0;
}

/* The output error of a row w [N] whose folded integers are q [N]. A filter of one element is its own sum. */
static double output_error_of(const float *w, const float *q, float scale, const weight_job *job) {
    const ocs_shape *shape = job->rows.shape;
    output_power of_w = {0}, of_d = {0};
    double dot = 0.0;
    if (shape->K == 1) {
        double sum[5];
        job->rows.kernels->error_sums(sum, w, q, shape->C, scale);
        of_w = (output_power){.squares = sum[0], .of_filters = sum[0], .all = sum[1]};
        of_d = (output_power){.squares = sum[2], .of_filters = sum[2], .all = sum[3]};
        dot = sum[4];
    } else {
        for (int64_t c = 0, i = 0; c < shape->C; ++c) {
            for (int64_t k = 0; k < shape->K; ++k, ++i) {
                const float w_hat = q[i] * scale;
                const double d = (double)w_hat - w[i];
                add_element(&of_w, w[i]);
                add_element(&of_d, d);
                dot += d * w[i];
            }
            end_filter(&of_w);
            end_filter(&of_d);
        }
    }
    const double gain = of_w.squares > 0.0 ? dot / of_w.squares : 0.0;
    const double error = output_power_of(&of_d) + job->gain * output_power_of(&of_w) * gain * gain;
    return isnan(error) ? (double)NAN : error; /* which NaN it is depends on the instruction set */
}

static void output_error_rows(ocs_range *range) {
    const weight_job *job = range->ctx;
    for (int64_t o = range->begin; o < range->end; ++o) {
        const float *w = job->w + o * job->rows.columns.N;
        fold_one(range->scratch, job, o, 1.0f);
        job->error[o] = output_error_of(w, range->scratch, ocs_scale_of(job->scale, o), job);
    }
}

ocs_status ocs_output_error_f32(double *error, const float *w, const int8_t *ints, const int64_t *source,
                                ocs_scale scale, const ocs_shape *shape, double gain) {
    OCS_TRY(ocs_check_shape(shape));
    weight_job job = {.scale = scale, .w = w, .ints_in = ints, .error = error, .gain = gain};
    ocs_clear(error, shape->O * (int64_t)sizeof *error);
    return for_rows(&job, &(ocs_plan){source, NULL, NULL}, shape, true, output_error_rows);
}

/* --- Any array -------------------------------------------------------------------------------- */

typedef struct {
    const ocs_kernels *kernels;
    float *x_out;
    const float *x_in;
    uint8_t *q_out;
    const uint8_t *q_in;
    int64_t N, q_stride;
    ocs_scale scale;
    float qmin, qmax;
    bool is_signed;
} array_job;

static ocs_status for_elements(array_job *job, int bits, ocs_work_fn work) {
    OCS_TRY(ocs_check_bits(bits));
    OCS_TRY(ocs_check_scale(job->scale, 1));
    OCS_TRY(ocs_check_sizes(job->N, 1, 1));
    job->kernels = ocs_kernel_table();
    job->qmax = (float)(job->is_signed ? ocs_qmax(bits) : (INT32_C(1) << bits) - 1);
    job->qmin = job->is_signed ? -job->qmax : 0.0f;
    return ocs_parallel_for(job->N, OCS_GRAIN, 0, work, job);
}

static void quantize_range(ocs_range *range) {
    const array_job *job = range->ctx;
    const int64_t begin = range->begin, N = range->end - begin;
    job->kernels->quantize(job->q_out + begin, job->x_in + begin, N, *job->scale.value, job->qmin, job->qmax);
}

ocs_status ocs_quantize_f32(void *q, const float *x, int64_t N, float scale, int bits, bool is_signed) {
    array_job job = {.q_out = q, .x_in = x, .N = N, .scale = {&scale, 0}, .is_signed = is_signed};
    return for_elements(&job, bits, quantize_range);
}

static void fake_quantize_range(ocs_range *range) {
    const array_job *job = range->ctx;
    const int64_t begin = range->begin, N = range->end - begin;
    job->kernels->fake_quantize(job->x_out + begin, job->x_in + begin, N, *job->scale.value, job->qmin, job->qmax);
}

ocs_status ocs_fake_quantize_f32(float *x_hat, const float *x, int64_t N, float scale, int bits, bool is_signed) {
    array_job job = {.x_out = x_hat, .x_in = x, .N = N, .scale = {&scale, 0}, .is_signed = is_signed};
    return for_elements(&job, bits, fake_quantize_range);
}

static void dequantize_rows(ocs_range *range) {
    const array_job *job = range->ctx;
    for (int64_t o = range->begin; o < range->end; ++o) {
        job->kernels->dequantize(job->x_out + o * job->N, job->q_in + o * job->q_stride, job->N,
                                 ocs_scale_of(job->scale, o), job->is_signed);
    }
}

ocs_status ocs_dequantize_f32(float *x, const void *q, ocs_scale scale, int64_t O, int64_t N, int64_t q_stride,
                              bool is_signed) {
    array_job job = {.x_out = x, .q_in = q, .N = N, .q_stride = q_stride, .scale = scale, .is_signed = is_signed};
    job.kernels = ocs_kernel_table();
    OCS_TRY(ocs_check_sizes(O, N, 1));
    OCS_TRY(N > 0 ? ocs_check_sizes(O, q_stride, 1) : OCS_OK);
    OCS_TRY(ocs_check_scale(scale, O));
    return ocs_parallel_for(N > 0 ? O : 0, ocs_grain(N), 0, dequantize_rows, &job);
}
