/* A function for each operator, which checks shapes, describes results and calls an entry of ocs.h; and their list.

   Whatever the arguments are, the entry must not read or write out of bounds. The first thing that is wrong is kept in
   the call, so that a function can go on as if nothing were until it begins. */
#include "arguments.h"

#include <stdio.h>
#include <string.h>

/* --- Where the outliers are ------------------------------------------------------------------- */

static ocs_status abs_max(ocs_call *call) {
    const ocs_array *x = array(call, 0);
    add_result(call, OCS_FLOAT32, 0);
    if (begin(call)) {
        *(float *)result(call) = ocs_abs_max_f32(x->data, x->numel);
    }
    return call->status;
}

static ocs_status histogram(ocs_call *call) {
    const ocs_array *x = array(call, 0);
    const int64_t bins = read_bins(call, 1);
    result_1d(call, OCS_INT64, bins);
    return begin(call) ? ocs_histogram_f32(result(call), x->data, x->numel, bins, number(call, 2)) : call->status;
}

static ocs_status signed_histogram(ocs_call *call) {
    const ocs_array *x = array(call, 0);
    const int64_t bins = read_bins(call, 1);
    result_1d(call, OCS_INT64, 2 * bins + 1);
    return begin(call) ? ocs_signed_histogram_f32(result(call), x->data, x->numel, bins, number(call, 2))
                       : call->status;
}

static ocs_status octave_histogram(ocs_call *call) {
    const ocs_array *x = array(call, 0);
    const ocs_shape s = read_shape(call, x, 1);
    result_2d(call, OCS_INT64, s.C, OCS_OCTAVE_BINS);
    return begin(call) ? ocs_octave_histogram_f32(result(call), x->data, s.O, s.C, s.K, number(call, 1)) : call->status;
}

static ocs_status channel_max(ocs_call *call) {
    const ocs_array *w = array(call, 0);
    const ocs_shape shape = read_shape(call, w, integer(call, 1));
    result_1d(call, OCS_FLOAT32, shape.G * shape.C);
    return begin(call) ? ocs_channel_max_f32(result(call), w->data, &shape) : call->status;
}

/* --- Which channels to split ------------------------------------------------------------------ */

static ocs_status split_plan(ocs_call *call) {
    const ocs_array *max = array(call, 0);
    const int64_t G = integer(call, 1), S = integer(call, 2), channels = max->numel;
    const bool valid = G >= 1 && channels % G == 0 && S >= 0 && S <= channels / G;
    require_shape(call, valid,
                  "groups must divide the channels, and splits be at most their number in a group: groups=%lld, %lld "
                  "channels, splits=%lld",
                  (long long)G, (long long)channels, (long long)S);
    const int64_t expanded = valid ? channels + G * S : 0;
    result_1d(call, OCS_INT64, expanded);
    result_1d(call, OCS_INT32, expanded);
    result_1d(call, OCS_INT32, expanded);
    result_1d(call, OCS_FLOAT32, expanded);
    if (!begin(call)) {
        return call->status;
    }
    const ocs_result *r = call->results;
    return ocs_split_plan(r[0].data, r[1].data, r[2].data, r[3].data, max->data, G, channels / G, S, integer(call, 3));
}

static ocs_status output_max(ocs_call *call) {
    const ocs_array *w = array(call, 0), *source = array(call, 1);
    const ocs_shape shape = read_split_shape(call, w, integer(call, 3), source);
    const ocs_plan plan = read_plan(call, source, array(call, 2), NULL);
    result_1d(call, OCS_FLOAT32, shape.O);
    return begin(call) ? ocs_output_max_f32(result(call), w->data, &plan, &shape) : call->status;
}

/* --- Where to clip ---------------------------------------------------------------------------- */

static ocs_status split_histogram(ocs_call *call) {
    const ocs_array *w = array(call, 0), *source = array(call, 1), *limit = array(call, 5);
    const int64_t bins = read_bins(call, 4);
    const ocs_shape shape = read_split_shape(call, w, integer(call, 3), source);
    const ocs_plan plan = read_plan(call, source, array(call, 2), NULL);
    require_per_row(call, "limit", limit, shape.O);
    if (limit->rank == 0) {
        result_1d(call, OCS_INT64, bins);
    } else {
        result_2d(call, OCS_INT64, shape.O, bins);
    }
    return begin(call) ? ocs_split_histogram_f32(result(call), w->data, &plan, &shape, limit->numel, bins, limit->data)
                       : call->status;
}

static ocs_status clip_threshold(ocs_call *call) {
    const ocs_array *counts = array(call, 0), *limit = array(call, 1);
    const int64_t bins = counts->sizes[counts->rank - 1], method = integer(call, 4);
    const int bits = read_bits(call, 2);
    require(call, ocs_clip_name(method) != NULL && !ocs_clip_takes_values(method), OCS_BAD_METHOD);
    require_shape(call, counts->numel == limit->numel * bins,
                  "counts must be [..., bins], and limit hold one number for each histogram");
    result_like(call, OCS_FLOAT32, 1);
    return begin(call) ? ocs_clip_threshold_f32(result(call), counts->data, limit->data, limit->numel, bins, bits,
                                                integer(call, 3), (ocs_clip)method)
                       : call->status;
}

static ocs_status release_threshold(ocs_call *call) {
    const ocs_array *x = array(call, 0), *counts = array(call, 1);
    const int64_t R = x->sizes[0], method = integer(call, 4);
    const int bits = read_bits(call, 2);
    require(call, ocs_clip_takes_values(method), OCS_BAD_METHOD);
    require_shape(call, counts->numel == 0 || counts->numel == x->numel,
                  "counts must be empty, or say of each value how often it is there");
    result_1d(call, OCS_FLOAT32, R);
    return begin(call) ? ocs_release_threshold_f32(result(call), x->data, counts->numel > 0 ? counts->data : NULL, R,
                                                   R > 0 ? x->numel / R : 0, bits, integer(call, 3), (ocs_clip)method)
                       : call->status;
}

/* --- Weights to integers and back ------------------------------------------------------------- */

/* What quantize_weight and squant_weight share: w, scale, source, parts, offset, groups, bits. */
typedef struct {
    ocs_shape shape;
    ocs_scale scale;
    ocs_plan plan;
    int bits;
} weight_arguments;

static weight_arguments read_weight_arguments(ocs_call *call) {
    const ocs_array *w = array(call, 0), *source = array(call, 2);
    weight_arguments a = {.shape = read_split_shape(call, w, integer(call, 5), source), .bits = read_bits(call, 6)};
    a.scale = read_scale(call, 1, a.shape.O);
    a.plan = read_plan(call, source, array(call, 3), array(call, 4));
    result_like(call, OCS_INT8, 0)->channels = a.shape.C + a.shape.S;
    return a;
}

static ocs_status quantize_weight(ocs_call *call) {
    const weight_arguments a = read_weight_arguments(call);
    const bool aware = integer(call, 7);
    return begin(call) ? ocs_quantize_weight_f32(result(call), data(call, 0), &a.plan, a.scale, &a.shape, a.bits, aware)
                       : call->status;
}

static ocs_status squant_weight(ocs_call *call) {
    const weight_arguments a = read_weight_arguments(call);
    return begin(call) ? ocs_squant_weight_f32(result(call), data(call, 0), &a.plan, a.scale, &a.shape, a.bits)
                       : call->status;
}

static ocs_status gptq_weight(ocs_call *call) {
    const ocs_array *w = array(call, 0), *source = array(call, 2), *order = array(call, 6), *factor = array(call, 7);
    const ocs_shape shape = read_split_shape(call, w, order->sizes[0], source);
    const ocs_scale scale = read_scale(call, 1, shape.O);
    const ocs_plan plan = read_plan(call, source, array(call, 3), array(call, 4));
    const int bits = read_bits(call, 5);
    const int64_t L = factor->sizes[1], N = shape.C * shape.K, B = L > 0 ? (N + L - 1) / L : 0;
    require_shape(call, factor->sizes[2] == L && factor->numel == shape.G * B * L * L && (L > 0 || N == 0),
                  "factor must be [groups blocks, L, L] in blocks of L of the %lld columns", (long long)N);
    require_shape(call, order->numel == shape.G * B * L, "order must be [groups, blocks L], L as of factor");
    result_like(call, OCS_INT8, 0)->channels = shape.C + shape.S;
    result_1d(call, OCS_FLOAT64, shape.O);
    return begin(call) ? ocs_gptq_weight_f32(result(call), call->results[1].data, w->data, order->data, factor->data,
                                             &plan, scale, &shape, L, bits)
                       : call->status;
}

static ocs_status fold(ocs_call *call) {
    const ocs_array *ints = array(call, 0), *source = array(call, 2);
    ocs_shape shape = read_shape(call, ints, integer(call, 3));
    const int64_t expanded = shape.C, channels = integer(call, 4);
    const ocs_scale scale = read_scale(call, 1, shape.O);
    require(call, source->numel % shape.G == 0 && source->numel / shape.G == expanded, OCS_BAD_PLAN);
    require_shape(call, channels >= 0 && channels <= expanded,
                  "channels must be 0 to the number of expanded channels in a group");
    shape.C = channels;
    shape.S = expanded - channels;
    result_like(call, OCS_FLOAT32, 0)->channels = channels;
    return begin(call) ? ocs_fold_f32(result(call), ints->data, source->data, scale, &shape) : call->status;
}

/* What weight_error and output_error share: w, ints, scale, source, groups. */
static ocs_shape read_error_shape(ocs_call *call) {
    const ocs_array *w = array(call, 0), *ints = array(call, 1);
    const ocs_shape shape = read_split_shape(call, w, integer(call, 4), array(call, 3));
    const int64_t E = shape.C + shape.S;
    require(call, ints->sizes[0] == shape.O && ints->sizes[1] == E && ints->numel == shape.O * E * shape.K,
            OCS_BAD_PLAN);
    return shape;
}

static ocs_status weight_error(ocs_call *call) {
    const ocs_shape shape = read_error_shape(call);
    const ocs_scale scale = read_scale(call, 2, shape.O);
    result_1d(call, OCS_FLOAT64, 2);
    return begin(call) ? ocs_weight_error_f32(result(call), data(call, 0), data(call, 1), data(call, 3), scale, &shape)
                       : call->status;
}

static ocs_status output_error(ocs_call *call) {
    const ocs_shape shape = read_error_shape(call);
    const ocs_scale scale = read_scale(call, 2, shape.O);
    result_1d(call, OCS_FLOAT64, shape.O);
    const double gain = call->arguments[5].number;
    return begin(call)
               ? ocs_output_error_f32(result(call), data(call, 0), data(call, 1), data(call, 3), scale, &shape, gain)
               : call->status;
}

/* --- Any array to the grid and back ----------------------------------------------------------- */

static ocs_status quantize(ocs_call *call) {
    const ocs_array *x = array(call, 0);
    const int bits = read_bits(call, 2);
    const bool is_signed = integer(call, 3);
    result_like(call, is_signed ? OCS_INT8 : OCS_UINT8, 0);
    return begin(call) ? ocs_quantize_f32(result(call), x->data, x->numel, number(call, 1), bits, is_signed)
                       : call->status;
}

static ocs_status dequantize(ocs_call *call) {
    const ocs_array *q = array(call, 0);
    const int64_t O = q->rank > 0 ? q->sizes[0] : 1, N = O > 0 ? q->numel / O : 0;
    const ocs_scale scale = read_scale(call, 1, O);
    result_like(call, OCS_FLOAT32, 0);
    return begin(call) ? ocs_dequantize_f32(result(call), q->data, scale, O, N, q->row_stride, q->dtype == OCS_INT8)
                       : call->status;
}

static ocs_status fake_quantize(ocs_call *call) {
    const ocs_array *x = array(call, 0);
    const int bits = read_bits(call, 2);
    result_like(call, OCS_FLOAT32, 0)->same = true;
    return begin(call) ? ocs_fake_quantize_f32(result(call), x->data, x->numel, number(call, 1), bits, integer(call, 3))
                       : call->status;
}

/* --- k-bit integers in k bits ----------------------------------------------------------------- */

static ocs_status pack(ocs_call *call) {
    const ocs_array *q = array(call, 0);
    const int bits = read_bits(call, 1);
    result_1d(call, OCS_UINT8, ocs_packed_bytes(q->numel, bits));
    return begin(call) ? ocs_pack_i8(result(call), q->data, q->numel, bits) : call->status;
}

static ocs_status unpack(ocs_call *call) {
    const ocs_array *packed = array(call, 0);
    const int64_t numel = integer(call, 1);
    const int bits = read_bits(call, 2);
    require_shape(call, packed->numel == ocs_packed_bytes(numel, bits),
                  "packed has another size than that many integers");
    result_1d(call, OCS_INT8, numel);
    return begin(call) ? ocs_unpack_i8(result(call), packed->data, numel, bits) : call->status;
}

/* --- The list --------------------------------------------------------------------------------- */

#define FLOATS(name, min_rank) {#name, OCS_FLOATS, min_rank}
#define DENSE_FLOATS(name, min_rank) {#name, OCS_DENSE_FLOATS, min_rank}
#define FLOAT_ROWS(name, min_rank) {#name, OCS_FLOAT_ROWS, min_rank}
#define INT64S(name, min_rank) {#name, OCS_INT64S, min_rank}
#define INT32S(name, min_rank) {#name, OCS_INT32S, min_rank}
#define INT8S(name, min_rank) {#name, OCS_INT8S, min_rank}
#define BYTES(name, min_rank) {#name, OCS_BYTES, min_rank}
#define BYTE_ROWS(name, min_rank) {#name, OCS_BYTE_ROWS, min_rank}
#define ONE_FLOAT(name) {#name, OCS_ONE_FLOAT, 0}
#define FLOAT(name) {#name, OCS_FLOAT, 0}
#define INT(name) {#name, OCS_INT, 0}
#define BOOL(name) {#name, OCS_BOOL, 0}

/* A packed weight; of another than the first, the names begin with what it is. */
#define PACKED(of)                                                                                                     \
    BYTES(of##packed, 1), FLOATS(of##scale, 0), INT32S(of##copies, 1), INT(of##outputs), INT(of##group), INT(of##bits)

#define OPERATOR(name, results, result, ...)                                                                           \
    {                                                                                                                  \
        #name, name, results, result, {                                                                                \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
    }

/* Name, number of results, what they are, arguments; of an array, how many dimensions it has at least. */
const ocs_operator ocs_operators[OCS_MOST_OPERATORS + 1] = {
    OPERATOR(abs_max, 1, "float32 []", FLOATS(x, 0)),
    OPERATOR(histogram, 1, "int64 [bins]", FLOATS(x, 0), INT(bins), FLOAT(limit)),
    OPERATOR(signed_histogram, 1, "int64 [2 bins + 1]", FLOATS(x, 0), INT(bins), FLOAT(limit)),
    OPERATOR(octave_histogram, 1, "int64 [C, 128]", FLOATS(x, 2), FLOAT(limit)),
    OPERATOR(channel_max, 1, "float32 [C]", FLOATS(w, 2), INT(groups)),

    OPERATOR(split_plan, 4, "(source, parts, offset, split_max)", FLOATS(channel_max, 1), INT(groups), INT(splits),
             BOOL(even)),
    OPERATOR(output_max, 1, "float32 [O]", FLOATS(w, 2), INT64S(source, 1), INT32S(parts, 1), INT(groups)),

    OPERATOR(split_histogram, 1, "int64 [bins] or [O, bins]", FLOATS(w, 2), INT64S(source, 1), INT32S(parts, 1),
             INT(groups), INT(bins), FLOATS(limit, 0)),
    OPERATOR(clip_threshold, 1, "float32, shaped like limit", INT64S(counts, 1), FLOATS(limit, 0), INT(bits),
             BOOL(signed), INT(method)),
    OPERATOR(release_threshold, 1, "float32 [R]", FLOATS(x, 1), INT64S(counts, 1), INT(bits), BOOL(signed),
             INT(method)),

    OPERATOR(quantize_weight, 1, "int8 [O, C + n, ...]", FLOATS(w, 2), FLOATS(scale, 0), INT64S(source, 1),
             INT32S(parts, 1), INT32S(offset, 1), INT(groups), INT(bits), BOOL(quantization_aware)),
    OPERATOR(squant_weight, 1, "int8 [O, C + n, ...]", FLOATS(w, 2), FLOATS(scale, 0), INT64S(source, 1),
             INT32S(parts, 1), INT32S(offset, 1), INT(groups), INT(bits)),
    OPERATOR(gptq_weight, 2, "(ints, error)", FLOATS(w, 2), FLOATS(scale, 0), INT64S(source, 1), INT32S(parts, 1),
             INT32S(offset, 1), INT(bits), INT64S(order, 2), FLOATS(factor, 3)),
    OPERATOR(fold, 1, "float32 [O, C, ...]", INT8S(ints, 2), FLOATS(scale, 0), INT64S(source, 1), INT(groups),
             INT(channels)),
    OPERATOR(weight_error, 1, "float64 [2]: sums of w^2 and of (w - w_hat)^2", FLOATS(w, 2), INT8S(ints, 2),
             FLOATS(scale, 0), INT64S(source, 1), INT(groups)),
    OPERATOR(output_error, 1, "float64 [O]", FLOATS(w, 2), INT8S(ints, 2), FLOATS(scale, 0), INT64S(source, 1),
             INT(groups), FLOAT(gain)),

    OPERATOR(quantize, 1, "int8 or uint8", FLOATS(x, 0), ONE_FLOAT(scale), INT(bits), BOOL(signed)),
    OPERATOR(dequantize, 1, "float32", BYTE_ROWS(q, 0), FLOATS(scale, 0)),
    OPERATOR(fake_quantize, 1, "float32", DENSE_FLOATS(x, 0), ONE_FLOAT(scale), INT(bits), BOOL(signed)),

    OPERATOR(pack, 1, "uint8 [ceil(N bits / 8)]", INT8S(ints, 0), INT(bits)),
    OPERATOR(unpack, 1, "int8 [numel]", BYTES(packed, 1), INT(numel), INT(bits)),

    OPERATOR(product_pack, 1, "uint8 [bytes]", INT8S(q, 2), INT(bits)),
    OPERATOR(product_unpack, 1, "int8 [outputs, channels]", BYTES(packed, 1), INT(outputs), INT(channels), INT(bits)),
    OPERATOR(product_rows, 1, "float32 [R, channels]", INT64S(index, 1), PACKED(), INT(channels)),
    OPERATOR(product, 1, "float32 or bfloat16 [..., outputs]", FLOAT_ROWS(x, 1), PACKED(), FLOATS(bias, 1),
             INT(row_bits), FLOATS(row_scale, 0), BOOL(row_signed)),
    OPERATOR(recurrent, 3, "(y, h, c)", FLOATS(from_x, 2), PACKED(hidden_), FLOATS(bias, 1), PACKED(projection_),
             FLOATS(h, 2), FLOATS(c, 2), INT64S(batch_sizes, 1), INT(row_bits), INT(cell), BOOL(reverse)),
};

static const char *torch_type(ocs_kind kind) {
    switch (kind) {
    case OCS_FLOAT: return "float ";
    case OCS_INT: return "int ";
    case OCS_BOOL: return "bool ";
    default: return "Tensor ";
    }
}

/* Appends as much as there is room for. */
static void append(char *text, size_t size, const char *more) {
    const size_t length = strlen(text);
    snprintf(text + length, size - length, "%s", more);
}

void ocs_write_signature(char *text, size_t size, const ocs_operator *op, bool as_schema) {
    snprintf(text, size, "%s(", op->name);
    for (const ocs_argument *argument = op->argument; argument->name != NULL; ++argument) {
        append(text, size, argument > op->argument ? ", " : "");
        append(text, size, as_schema ? torch_type(argument->kind) : "");
        append(text, size, argument->name);
    }
    append(text, size, op->results > 1 && as_schema ? ") -> (" : ") -> ");
    append(text, size, as_schema ? "Tensor" : op->result);
    for (int i = 1; as_schema && i < op->results; ++i) {
        append(text, size, i + 1 < op->results ? ", Tensor" : ", Tensor)");
    }
}

const char *ocs_run(const ocs_operator *op, ocs_call *call) {
    call->result_count = 0;
    call->status = OCS_OK;
    call->error[0] = '\0';
    call->status = op->run(call);
    if (call->status == OCS_OK) {
        return NULL;
    }
    return call->error[0] != '\0' ? call->error : ocs_status_text(call->status);
}
