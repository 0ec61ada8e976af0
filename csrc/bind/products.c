/* The operators on k-bit weights that stay packed; see operators.c, which lists them. */
#include "arguments.h"

ocs_status product_pack(ocs_call *call) {
    const ocs_array *q = array(call, 0);
    const int bits = read_bits(call, 1);
    require_shape(call, q->rank == 2, "q must be [O, E]");
    const int64_t O = q->sizes[0], E = q->sizes[1];
    result_1d(call, OCS_UINT8, ocs_product_bytes(O, E, bits));
    return begin(call) ? ocs_product_pack_i8(result(call), q->data, O, E, bits) : call->status;
}

/* Refuses packed bytes of another size than a weight [O, E] has. */
static void require_packed(ocs_call *call, const ocs_array *packed, int64_t O, int64_t E, int bits) {
    require_shape(call, packed->numel == ocs_product_bytes(O, E, bits),
                  "packed has another size than a weight of %lld outputs and %lld channels", (long long)O,
                  (long long)E);
}

ocs_status product_unpack(ocs_call *call) {
    const ocs_array *packed = array(call, 0);
    const int64_t O = integer(call, 1), E = integer(call, 2);
    const int bits = read_bits(call, 3);
    require_packed(call, packed, O, E, bits);
    result_2d(call, OCS_INT8, O, E);
    return begin(call) ? ocs_product_unpack_i8(result(call), packed->data, O, E, bits) : call->status;
}

/* The six arguments of a packed weight, the first of which is argument i: packed, scale, copies, outputs, group, bits.
 */
static ocs_packed_weight read_packed(ocs_call *call, int i, int64_t C) {
    const ocs_array *scale = array(call, i + 1), *copies = array(call, i + 2);
    ocs_packed_weight w = {.packed = data(call, i), .copies = copies->data, .C = C, .S = copies->numel};
    w.scale = (ocs_scale){scale->data, scale->rank > 0};
    w.O = integer(call, i + 3), w.group = integer(call, i + 4), w.bits = read_bits(call, i + 5);
    require_packed(call, array(call, i), w.O, w.C + w.S, w.bits);
    require(call, w.group >= 0 && w.group % 32 == 0, OCS_BAD_GROUP);
    if (call->status == OCS_OK && w.group > 0) {
        const int64_t groups = (w.C + w.S) / w.group + ((w.C + w.S) % w.group != 0);
        const int64_t blocks = w.O / 16 + (w.O % 16 != 0);
        const int64_t *sizes = scale->sizes;
        require_shape(call, scale->rank == 3 && sizes[0] == blocks && sizes[1] == groups && sizes[2] == 16,
                      "scale must be [%lld blocks, %lld groups, 16]", (long long)blocks, (long long)groups);
    } else if (call->status == OCS_OK) {
        require_per_row(call, "scale", scale, w.O);
    }
    return w;
}

/* How rows are rounded, from three arguments: bits (0: not), their scale (empty: each row's own), signed. */
static ocs_row_grid read_grid(ocs_call *call, int i) {
    const ocs_array *scale = array(call, i + 1);
    const ocs_row_grid grid = {integer(call, i) == 0 ? 0 : read_bits(call, i), integer(call, i + 2),
                               scale->numel == 1 ? *(const float *)scale->data : 0.0f};
    require_shape(call, scale->numel <= 1, "the scale of rows must be one number, or empty");
    require(call, scale->numel == 0 || grid.bits == 0 || (grid.scale > 0.0f && isfinite(grid.scale)), OCS_BAD_SCALE);
    require(call, scale->numel == 1 || grid.is_signed || grid.bits == 0, OCS_BAD_SCALE);
    return grid;
}

static ocs_row_dtype row_dtype(const ocs_array *x) {
    return x->dtype == OCS_BFLOAT16 ? OCS_ROWS_BF16 : OCS_ROWS_F32;
}

/* The numbers of argument i [O], or NULL where it is empty. */
static const float *read_bias(ocs_call *call, int i, int64_t O) {
    const ocs_array *bias = array(call, i);
    require_shape(call, bias->numel == 0 || (bias->rank == 1 && bias->numel == O),
                  "bias must be empty, or hold one number for each of the %lld outputs", (long long)O);
    return bias->numel > 0 ? bias->data : NULL;
}

ocs_status product_rows(ocs_call *call) {
    const ocs_array *index = array(call, 0);
    const int64_t C = integer(call, 7);
    require_shape(call, C >= 0, "channels must not be negative");
    const ocs_packed_weight w = read_packed(call, 1, C < 0 ? 0 : C);
    result_2d(call, OCS_FLOAT32, index->numel, C);
    return begin(call) ? ocs_product_rows_f32(result(call), index->data, &w, index->numel) : call->status;
}

ocs_status product(ocs_call *call) {
    const ocs_array *x = array(call, 0);
    const int64_t C = x->sizes[x->rank - 1];
    int64_t R = 1;
    for (int64_t i = 0; i + 1 < x->rank; ++i) {
        require_shape(call, !__builtin_mul_overflow(R, x->sizes[i], &R), "x has too many rows");
    }
    const ocs_packed_weight w = read_packed(call, 1, C);
    const float *bias = read_bias(call, 7, w.O);
    const ocs_row_grid grid = read_grid(call, 8);
    ocs_result *y = result_like(call, x->dtype, 0);
    y->outputs = w.O;
    y->same = true;
    return begin(call) ? ocs_product(result(call), x->data, bias, &w, grid, R, row_dtype(x)) : call->status;
}

/* How the states of a recurrent layer are rounded: to so many bits, each row with its own scale, or not (0). */
static ocs_row_grid read_state_grid(ocs_call *call, int i) {
    return (ocs_row_grid){integer(call, i) == 0 ? 0 : read_bits(call, i), true, 0.0f};
}

/* from_x, hidden (6), bias, projection (6), h, c, batch_sizes, row_bits, cell, reverse. */
ocs_status recurrent(ocs_call *call) {
    enum { HIDDEN = 1, BIAS = 7, PROJECTION = 8, H = 14, C, BATCH_SIZES, ROW_BITS, CELL, REVERSE };
    const ocs_array *from_x = array(call, 0), *h = array(call, H), *c = array(call, C),
                    *sizes = array(call, BATCH_SIZES);
    require_shape(call, integer(call, CELL) >= OCS_LSTM && integer(call, CELL) <= OCS_RNN_RELU,
                  "there is no such cell");
    ocs_recurrent_layer layer = {.grid = read_state_grid(call, ROW_BITS), .kind = (ocs_cell_kind)integer(call, CELL)};
    const int64_t N = h->sizes[0], P = h->sizes[1], gates = ocs_cell_gates(layer.kind);
    layer.hidden = read_packed(call, HIDDEN, P);
    layer.bias = read_bias(call, BIAS, layer.hidden.O);
    const int64_t units = layer.hidden.O / gates;
    const bool projects = integer(call, PROJECTION + 3) != 0;
    require_shape(call, !projects || layer.kind == OCS_LSTM, "only an LSTM has a projection");
    const ocs_packed_weight projection = projects ? read_packed(call, PROJECTION, units) : (ocs_packed_weight){0};
    layer.projection = projects ? &projection : NULL;
    const bool has_c = layer.kind == OCS_LSTM;
    require_shape(call, !has_c || (c->sizes[0] == N && c->sizes[1] == units), "c must be [N, H]");
    int64_t steps = 0;
    for (int64_t t = 0; t < sizes->numel; ++t) {
        const int64_t size = ((const int64_t *)sizes->data)[t];
        require_shape(call, size >= 0 && size <= N, "batch_sizes must be those of N sequences, and fall");
        require_shape(call, size <= from_x->sizes[0] - steps, "from_x must be [steps, gates H]");
        steps += call->status == OCS_OK ? size : 0;
    }
    require_shape(call, from_x->sizes[0] == steps && from_x->sizes[1] == layer.hidden.O,
                  "from_x must be [steps, gates H]");
    result_2d(call, OCS_FLOAT32, from_x->sizes[0], P);
    result_2d(call, OCS_FLOAT32, N, P);
    result_2d(call, OCS_FLOAT32, has_c ? N : 0, has_c ? units : 0);
    if (!begin(call)) {
        return call->status;
    }
    const ocs_result *r = call->results;
    memcpy(r[1].data, h->data, (size_t)h->numel * sizeof(float));
    memcpy(r[2].data, c->data, has_c ? (size_t)c->numel * sizeof(float) : 0);
    return ocs_recurrent_f32(r[0].data, r[1].data, has_c ? r[2].data : NULL, from_x->data, &layer, sizes->data, steps,
                             sizes->numel, N, integer(call, REVERSE));
}
