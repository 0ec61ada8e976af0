/* Linear quantization: split weights to integers and back, and any array to the grid and back.

   Weights round as the paper's Q(x) = floor(x + 1/2), which makes quantization-aware splitting exact; everything else
   rounds half to even, as ONNX QuantizeLinear does. Shapes as in ocs.h. */
#include "kernels.h"

#include <stdlib.h>

/* --- Plain kernels ---------------------------------------------------------------------------- */

void ocs_quantize_row_ref(int8_t *restrict q, const float *w, const ocs_columns *columns, float scale, int32_t qmax) {
    for (int64_t m = 0; m < columns->M; ++m) {
        int64_t from = m < columns->N ? m : columns->index[m - columns->N];
        q[m] = ocs_split_column(ocs_grid2(w[from], scale), columns->addend[m], columns->shift[m], qmax);
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

/* --- Checks ----------------------------------------------------------------------------------- */

int32_t ocs_qmax(int bits) {
    return (INT32_C(1) << (bits - 1)) - 1;
}

static bool bits_valid(int bits) {
    return bits >= 2 && bits <= 8;
}

ocs_status ocs_check_scale(const float *scale, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (!isfinite(scale[i]) || scale[i] <= 0.0f) {
            return OCS_BAD_SCALE;
        }
    }
    return OCS_OK;
}

/* --- Weights ---------------------------------------------------------------------------------- */

/* One weight's rows, for every entry that works row by row. */
typedef struct {
    const ocs_kernels *kernels;
    const ocs_shape *shape;
    ocs_columns columns;
    const float *scale;
    int64_t scale_stride;
    const float *w;
    float *w_hat;
    const int8_t *ints_in;
    int8_t *ints_out;
    int32_t qmax;
    double *row_error; /* [O][2], or of output_error [O] */
    double gain;
    bool failed;
} weight_job;

/* Checks what all of them need and makes the columns, which run_rows frees. */
static ocs_status prepare(weight_job *job, const ocs_plan *plan) {
    job->kernels = ocs_kernel_table();
    ocs_status status = ocs_columns_make(&job->columns, plan, job->shape);
    if (status == OCS_OK) {
        status = ocs_check_scale(job->scale, job->scale_stride == 0 ? 1 : job->shape->O);
        if (status != OCS_OK) {
            ocs_columns_free(&job->columns);
        }
    }
    return status;
}

static void run_rows(weight_job *job, ocs_range_fn rows) {
    if (job->columns.M > 0) {
        ocs_parallel_for(job->shape->O, ocs_grain(job->columns.M), rows, job);
    }
    ocs_columns_free(&job->columns);
}

static ocs_columns columns_of_row(const weight_job *job, int64_t o) {
    return ocs_columns_group(&job->columns, o / (job->shape->O / job->shape->G));
}

static void quantize_rows(int64_t begin, int64_t end, void *ctx) {
    const weight_job *job = ctx;
    for (int64_t o = begin; o < end; ++o) {
        const ocs_columns columns = columns_of_row(job, o);
        job->kernels->quantize_row(job->ints_out + o * columns.M, job->w + o * columns.N, &columns,
                                   job->scale[o * job->scale_stride], job->qmax);
    }
}

ocs_status ocs_quantize_weight_f32(int8_t *ints, const float *w, const ocs_plan *plan, const float *scale,
                                   int64_t scale_stride, const ocs_shape *shape, int bits, bool quantization_aware) {
    if (!bits_valid(bits)) {
        return OCS_BAD_BITS;
    }
    weight_job job = {.shape = shape, .scale = scale, .scale_stride = scale_stride, .w = w};
    job.ints_out = ints;
    job.qmax = ocs_qmax(bits);
    const ocs_plan used = {plan->source, plan->depth, quantization_aware ? plan->offset : NULL};
    ocs_status status = prepare(&job, &used);
    if (status == OCS_OK) {
        run_rows(&job, quantize_rows);
    }
    return status;
}

/* Output channel o folded, in units of `scale`. */
static void fold_one(const weight_job *job, float *w_hat, int64_t o, float scale) {
    const ocs_columns columns = columns_of_row(job, o);
    job->kernels->fold_row(w_hat, job->ints_in + o * columns.M, columns.index, columns.N, columns.M, scale);
}

static void fold_rows(int64_t begin, int64_t end, void *ctx) {
    const weight_job *job = ctx;
    for (int64_t o = begin; o < end; ++o) {
        fold_one(job, job->w_hat + o * job->columns.N, o, job->scale[o * job->scale_stride]);
    }
}

ocs_status ocs_fold_f32(float *w_hat, const int8_t *ints, const int64_t *source, const float *scale,
                        int64_t scale_stride, const ocs_shape *shape) {
    weight_job job = {.shape = shape, .scale = scale, .scale_stride = scale_stride, .w_hat = w_hat, .ints_in = ints};
    ocs_status status = prepare(&job, &(ocs_plan){source, NULL, NULL});
    if (status == OCS_OK) {
        run_rows(&job, fold_rows);
    }
    return status;
}

/* Each row with the folded integers that it has. */
static void for_folded_rows(weight_job *job, int64_t begin, int64_t end,
                            void (*row)(const weight_job *job, int64_t o, const float *q)) {
    float *q = malloc((size_t)(job->columns.N + 1) * sizeof *q);
    if (q == NULL) {
        __atomic_store_n(&job->failed, true, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t o = begin; o < end; ++o) {
        fold_one(job, q, o, 1.0f);
        row(job, o, q);
    }
    free(q);
}

static void squared_error_row(const weight_job *job, int64_t o, const float *q) {
    const int64_t N = job->columns.N;
    job->kernels->squared_error(job->row_error + 2 * o, job->w + o * N, q, N, job->scale[o * job->scale_stride]);
}

static void squared_error_rows(int64_t begin, int64_t end, void *ctx) {
    for_folded_rows(ctx, begin, end, squared_error_row);
}

ocs_status ocs_weight_error_f32(double error[2], const float *w, const int8_t *ints, const int64_t *source,
                                const float *scale, int64_t scale_stride, const ocs_shape *shape) {
    weight_job job = {.shape = shape, .scale = scale, .scale_stride = scale_stride, .w = w, .ints_in = ints};
    error[0] = error[1] = 0.0;
    ocs_status status = prepare(&job, &(ocs_plan){source, NULL, NULL});
    if (status != OCS_OK) {
        return status;
    }
    const int64_t rows = job.columns.N > 0 ? shape->O : 0;
    job.row_error = calloc((size_t)rows * 2 + 1, sizeof *job.row_error);
    job.failed = job.row_error == NULL;
    if (job.failed) {
        ocs_columns_free(&job.columns);
        return OCS_NO_MEMORY;
    }
    run_rows(&job, squared_error_rows);
    for (int64_t o = 0; o < rows; ++o) {
        error[0] += job.row_error[2 * o];
        error[1] += job.row_error[2 * o + 1];
    }
    free(job.row_error);
    return job.failed ? OCS_NO_MEMORY : OCS_OK;
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

static void output_error_row(const weight_job *job, int64_t o, const float *q) {
    const float *w = job->w + o * job->columns.N, scale = job->scale[o * job->scale_stride];
    output_power of_w = {0}, of_d = {0};
    double dot = 0.0;
    for (int64_t c = 0, i = 0; c < job->shape->C; ++c) {
        for (int64_t k = 0; k < job->shape->K; ++k, ++i) {
            const float w_hat = q[i] * scale;
            const double d = (double)w_hat - w[i];
            add_element(&of_w, w[i]);
            add_element(&of_d, d);
            dot += d * w[i];
        }
        end_filter(&of_w);
        end_filter(&of_d);
    }
    const double gain = of_w.squares > 0.0 ? dot / of_w.squares : 0.0;
    job->row_error[o] = output_power_of(&of_d) + job->gain * output_power_of(&of_w) * gain * gain;
}

static void output_error_rows(int64_t begin, int64_t end, void *ctx) {
    for_folded_rows(ctx, begin, end, output_error_row);
}

ocs_status ocs_output_error_f32(double *error, const float *w, const int8_t *ints, const int64_t *source,
                                const float *scale, int64_t scale_stride, const ocs_shape *shape, double gain) {
    weight_job job = {.shape = shape, .scale = scale, .scale_stride = scale_stride, .w = w, .ints_in = ints};
    job.row_error = error;
    job.gain = gain;
    ocs_status status = prepare(&job, &(ocs_plan){source, NULL, NULL});
    if (status == OCS_OK) {
        memset(error, 0, (size_t)shape->O * sizeof *error);
        run_rows(&job, output_error_rows);
    }
    return status == OCS_OK && job.failed ? OCS_NO_MEMORY : status;
}

/* --- Any array -------------------------------------------------------------------------------- */

typedef struct {
    const ocs_kernels *kernels;
    float *x_out;
    const float *x_in;
    uint8_t *q_out;
    const uint8_t *q_in;
    int64_t N, q_stride;
    const float *scale;
    int64_t scale_stride;
    float qmin, qmax;
    bool is_signed;
} array_job;

static void set_grid(array_job *job, int bits) {
    job->qmax = (float)(job->is_signed ? ocs_qmax(bits) : (INT32_C(1) << bits) - 1);
    job->qmin = job->is_signed ? -job->qmax : 0.0f;
}

static ocs_status run_on_grid(array_job *job, int bits, ocs_range_fn elements) {
    if (!bits_valid(bits)) {
        return OCS_BAD_BITS;
    }
    ocs_status status = ocs_check_scale(job->scale, 1);
    if (status == OCS_OK) {
        job->kernels = ocs_kernel_table();
        set_grid(job, bits);
        ocs_parallel_for(job->N, OCS_GRAIN, elements, job);
    }
    return status;
}

static void quantize_range(int64_t begin, int64_t end, void *ctx) {
    const array_job *job = ctx;
    job->kernels->quantize(job->q_out + begin, job->x_in + begin, end - begin, *job->scale, job->qmin, job->qmax);
}

ocs_status ocs_quantize_f32(void *q, const float *x, int64_t N, float scale, int bits, bool is_signed) {
    array_job job = {.q_out = q, .x_in = x, .N = N, .scale = &scale, .is_signed = is_signed};
    return run_on_grid(&job, bits, quantize_range);
}

static void fake_quantize_range(int64_t begin, int64_t end, void *ctx) {
    const array_job *job = ctx;
    job->kernels->fake_quantize(job->x_out + begin, job->x_in + begin, end - begin, *job->scale, job->qmin, job->qmax);
}

ocs_status ocs_fake_quantize_f32(float *x_hat, const float *x, int64_t N, float scale, int bits, bool is_signed) {
    array_job job = {.x_out = x_hat, .x_in = x, .N = N, .scale = &scale, .is_signed = is_signed};
    return run_on_grid(&job, bits, fake_quantize_range);
}

static void dequantize_rows(int64_t begin, int64_t end, void *ctx) {
    const array_job *job = ctx;
    for (int64_t o = begin; o < end; ++o) {
        job->kernels->dequantize(job->x_out + o * job->N, job->q_in + o * job->q_stride, job->N,
                                 job->scale[o * job->scale_stride], job->is_signed);
    }
}

ocs_status ocs_dequantize_f32(float *x, const void *q, const float *scale, int64_t scale_stride, int64_t O, int64_t N,
                              int64_t q_stride, bool is_signed) {
    array_job job = {.x_out = x, .q_in = q, .N = N, .q_stride = q_stride, .scale = scale, .scale_stride = scale_stride};
    job.is_signed = is_signed;
    job.kernels = ocs_kernel_table();
    ocs_status status = ocs_check_scale(scale, scale_stride == 0 ? 1 : O);
    if (status == OCS_OK && N > 0) {
        ocs_parallel_for(O, ocs_grain(N), dequantize_rows, &job);
    }
    return status;
}
