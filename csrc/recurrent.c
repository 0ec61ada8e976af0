/* Recurrent layers whose weights stay packed: every step of one layer in one direction.

   sigmoid(x) = 1 / (1 + e^-x) and tanh(x) = 1 - 2 / (1 + e^2x), with e^x = 2^n e^r, n the integer nearest to x / ln 2
   and |r| <= ln 2 / 2, where Taylor's polynomial of degree 7 is exact to 6e-9. Both are within 2e-7 of the true
   value. Products and sums are rounded once each (fmaf), in one order, so that all variants agree bit for bit. */
#include "kernels.h"

#include <stdlib.h>

/* --- Plain kernels ---------------------------------------------------------------------------- */

static float exponential(float x) {
    x = OCS_EXP_MOST < x ? OCS_EXP_MOST : x; /* NaN stays */
    x = OCS_EXP_LEAST > x ? OCS_EXP_LEAST : x;
    const float shifted = fmaf(x, OCS_LOG2_E, OCS_SHIFT), n = shifted - OCS_SHIFT;
    const float r = fmaf(n, -OCS_LN_2_LOW, fmaf(n, -OCS_LN_2_HIGH, x));
    float sum = OCS_EXP_TERMS[0];
    for (int i = 1; i < OCS_EXP_DEGREE + 1; ++i) {
        sum = fmaf(sum, r, OCS_EXP_TERMS[i]);
    }
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23; /* 2^n: the low bits of `shifted` are n */
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

static float sigmoid(float x) {
    return 1.0f / (1.0f + exponential(-x));
}

static float hyperbolic_tangent(float x) {
    return 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
}

static void lstm_cell(float *restrict h, float *restrict c, const float *from_x, const float *from_h, int64_t H,
                      int64_t u) {
    const float i = sigmoid(from_x[u] + from_h[u]), f = sigmoid(from_x[H + u] + from_h[H + u]);
    const float g = hyperbolic_tangent(from_x[2 * H + u] + from_h[2 * H + u]);
    const float o = sigmoid(from_x[3 * H + u] + from_h[3 * H + u]);
    c[u] = fmaf(f, c[u], i * g);
    h[u] = o * hyperbolic_tangent(c[u]);
}

static void gru_cell(float *restrict h, const float *from_x, const float *from_h, int64_t H, int64_t u) {
    const float r = sigmoid(from_x[u] + from_h[u]), z = sigmoid(from_x[H + u] + from_h[H + u]);
    const float n = hyperbolic_tangent(fmaf(r, from_h[2 * H + u], from_x[2 * H + u]));
    h[u] = fmaf(z, h[u] - n, n);
}

void ocs_cell_ref(float *restrict h, float *restrict c, const float *from_x, const float *from_h, int64_t H,
                  int64_t first, int64_t last, ocs_cell_kind kind) {
    for (int64_t u = first; u < last; ++u) {
        const float sum = from_x[u] + from_h[u];
        switch (kind) {
        case OCS_LSTM: lstm_cell(h, c, from_x, from_h, H, u); break;
        case OCS_GRU: gru_cell(h, from_x, from_h, H, u); break;
        case OCS_RNN_TANH: h[u] = hyperbolic_tangent(sum); break;
        default: h[u] = sum < 0.0f ? 0.0f : sum; /* NaN stays */
        }
    }
}

/* --- One direction ---------------------------------------------------------------------------- */

int64_t ocs_cell_gates(ocs_cell_kind kind) {
    return kind == OCS_LSTM ? 4 : kind == OCS_GRU ? 3 : 1;
}

enum { UNITS = 16 }; /* hidden units of one sequence that are a thread's least */

typedef struct {
    const ocs_recurrent_layer *layer;
    const float *from_x;
    const int64_t *batch_sizes;
    int64_t T, H;
    float *from_h; /* [N, gates H] */
    float *unit;   /* [N, H]: the state, or what is projected to it */
    float *h, *c;
    float *y;
    bool reverse;
    void *scratch; /* of products */
} layer_job;

typedef struct {
    const layer_job *of;
    int64_t row, batch; /* rows of from_x and y, and how many */
} step_job;

/* y = h from element `first` on. */
static void write_states(const step_job *step, int64_t first, int64_t count) {
    float *y = step->of->y + step->row * step->of->layer->hidden.C;
    ocs_copy(y + first, step->of->h + first, count * (int64_t)sizeof *y);
}

static void run_cells(ocs_range *range) {
    const step_job *step = range->ctx;
    const layer_job *job = step->of;
    const int64_t H = job->H, gates = ocs_cell_gates(job->layer->kind) * H, parts = ocs_ceil_div(H, UNITS);
    const ocs_kernels *kernels = ocs_kernel_table();
    for (int64_t i = range->begin, left; i < range->end; i += left) {
        const int64_t n = i / parts, first = i % parts;
        left = parts - first < range->end - i ? parts - first : range->end - i;
        const int64_t last = (first + left) * UNITS < H ? (first + left) * UNITS : H;
        kernels->cell(job->unit + n * H, job->c != NULL ? job->c + n * H : NULL, job->from_x + (step->row + n) * gates,
                      job->from_h + n * gates, H, first * UNITS, last, job->layer->kind);
        if (job->layer->projection == NULL) {
            write_states(step, n * H + first * UNITS, last - first * UNITS);
        }
    }
}

static void write_rows(ocs_range *range) {
    const step_job *step = range->ctx;
    const int64_t P = step->of->layer->hidden.C;
    write_states(step, range->begin * P, (range->end - range->begin) * P);
}

/* h [batch, P] and c become those of the next step. */
static ocs_status run_step(ocs_member *member, step_job *step) {
    const layer_job *job = step->of;
    const ocs_recurrent_layer *layer = job->layer;
    const int64_t work = 16 * ocs_cell_gates(layer->kind) * UNITS; /* a cell costs some 16 plain elements */
    OCS_TRY(ocs_product_in(member, job->scratch, job->from_h, job->h, layer->bias, &layer->hidden, layer->grid,
                           step->batch));
    OCS_TRY(ocs_parallel_in(member, step->batch * ocs_ceil_div(job->H, UNITS), ocs_grain(work), 0, run_cells, step));
    if (layer->projection == NULL) {
        return OCS_OK;
    }
    OCS_TRY(ocs_product_in(member, job->scratch, job->h, job->unit, NULL, layer->projection, layer->grid, step->batch));
    return ocs_parallel_in(member, step->batch, ocs_grain(layer->hidden.C), 0, write_rows, step);
}

static ocs_status run_steps(ocs_member *member, void *ctx) {
    const layer_job *job = ctx;
    step_job step = {.of = job};
    for (int64_t t = 0; t < job->T && job->reverse; ++t) {
        step.row += job->batch_sizes[t];
    }
    for (int64_t s = 0; s < job->T; ++s) {
        step.batch = job->batch_sizes[job->reverse ? job->T - 1 - s : s];
        step.row -= job->reverse ? step.batch : 0;
        OCS_TRY(run_step(member, &step));
        step.row += job->reverse ? 0 : step.batch;
    }
    return OCS_OK;
}

/* Whether all sizes fit one another. */
static ocs_status check_layer(const ocs_recurrent_layer *layer) {
    const ocs_packed_weight *hidden = &layer->hidden, *projection = layer->projection;
    OCS_TRY(layer->kind <= OCS_RNN_RELU ? ocs_check_grid(layer->grid) : OCS_BAD_METHOD);
    OCS_TRY(ocs_check_packed(hidden));
    if (projection != NULL) {
        OCS_TRY(ocs_check_packed(projection));
    }
    const int64_t gates = ocs_cell_gates(layer->kind), H = projection != NULL ? projection->C : hidden->C;
    const bool projects = projection != NULL && layer->kind == OCS_LSTM && projection->O == hidden->C;
    return hidden->O != gates * H || (projection != NULL && !projects) ? OCS_BAD_SHAPE : OCS_OK;
}

/* Whether states and scratch memory of N sequences can exist; a tile pads a weight's channels. */
static ocs_status check_batch(const ocs_packed_weight *w, int64_t R, int64_t T, int64_t N) {
    OCS_TRY(ocs_check_sizes(T, 1, 1));
    OCS_TRY(ocs_check_sizes(R, w->O, 1));
    OCS_TRY(ocs_check_sizes(N, w->O, 1));
    return ocs_check_sizes(N, w->C + w->S + OCS_TILE_CHANNELS, 1);
}

/* Copies the sizes, which another thread could change, and checks these: they fall, and all are there at first. */
static ocs_status own_sizes(int64_t *sizes, const int64_t *batch_sizes, int64_t T, int64_t N, int64_t R) {
    ocs_copy(sizes, batch_sizes, T * (int64_t)sizeof *sizes);
    for (int64_t t = 0; t < T; ++t) {
        if (sizes[t] < 0 || sizes[t] > (t > 0 ? sizes[t - 1] : N) || sizes[t] > R) {
            return OCS_BAD_SHAPE;
        }
        R -= sizes[t];
    }
    return R == 0 ? OCS_OK : OCS_BAD_SHAPE;
}

ocs_status ocs_recurrent_f32(float *y, float *h, float *c, const float *from_x, const ocs_recurrent_layer *layer,
                             const int64_t *batch_sizes, int64_t R, int64_t T, int64_t N, bool reverse) {
    OCS_TRY(check_layer(layer));
    OCS_TRY(check_batch(&layer->hidden, R, T, N));
    ocs_recurrent_layer own = *layer;
    ocs_packed_weight projection = {0};
    if (layer->projection != NULL) {
        OCS_TRY(check_batch(layer->projection, R, T, N));
        projection = *layer->projection;
        own.projection = &projection;
    }
    const size_t for_hidden = ocs_product_scratch(&own.hidden, N), for_projection = ocs_product_scratch(&projection, N);
    const size_t scratch = for_hidden > for_projection ? for_hidden : for_projection;
    const int64_t H = own.projection != NULL ? projection.C : own.hidden.C, copies = own.hidden.S + projection.S;
    const int64_t units = own.projection != NULL ? N * H : 0, gates = N * ocs_cell_gates(own.kind) * H;
    int64_t *sizes = malloc((size_t)T * sizeof *sizes + (size_t)(gates + units + copies) * sizeof(float) + scratch);
    if (sizes == NULL) {
        return OCS_NO_MEMORY;
    }
    float *from_h = (float *)(void *)(sizes + T);
    int32_t *of_hidden = (int32_t *)(void *)(from_h + gates + units), *of_projection = of_hidden + own.hidden.S;
    layer_job job = {.layer = &own,
                     .from_x = from_x,
                     .batch_sizes = sizes,
                     .T = T,
                     .H = H,
                     .from_h = from_h,
                     .h = h,
                     .c = c,
                     .y = y,
                     .reverse = reverse,
                     .scratch = of_projection + projection.S};
    job.unit = own.projection != NULL ? from_h + gates : h;
    ocs_status status = own_sizes(sizes, batch_sizes, T, N, R);
    status = status == OCS_OK ? ocs_own_copies(&own.hidden, of_hidden) : status;
    status = status == OCS_OK ? ocs_own_copies(&projection, of_projection) : status;
    if (status == OCS_OK) {
        const int64_t rows = N < 16 ? N : 16; /* enough for all threads, and too few to overflow */
        status = ocs_with_team(rows * own.hidden.O * own.hidden.C, run_steps, &job);
    }
    free(sizes);
    return status;
}
