/* Products of rows with k-bit weights, which stay packed (tiles.c).

   All are of whole numbers. Rows that are to be rounded are; float rows are cut into three bytes each, in steps of
   their largest magnitude / (2^23 - 2^16), which are three rows of integers: as exact as floats, whose sums round to as
   many bits, and faster. A block of 16 outputs meets several rows at a time, so that they share each read of the
   weights. With codes u = q + qmax, the sum over q x is that over u x minus qmax times that over x; where x is
   unsigned, so that codes cannot be, qmax is taken from each code instead. A pair of products then fits 16 bits up to 7
   bits. */
#include "kernels.h"

#include <stdlib.h>

/* --- Plain kernels ---------------------------------------------------------------------------- */

/* In 8 bits: 255, which stands for no integer, wraps around, as it does in vectors of bytes. */
static int8_t integer_of(uint8_t code, int bits) {
    return (int8_t)(code - ocs_qmax(bits));
}

/* sum [R, 16] += the products of a tile. */
static void add_tile(int32_t *restrict sum, const uint8_t *codes, const uint8_t *x, int64_t R, int64_t stride,
                     int channels, int bits, bool is_signed) {
    for (int64_t r = 0; r < R; ++r) {
        for (int c = 0; c < channels; ++c) {
            const uint8_t byte = x[r * stride + c];
            const int32_t value = is_signed ? (int8_t)byte : byte;
            for (int o = 0; o < OCS_TILE_OUTPUTS; ++o) {
                const uint8_t code = codes[c / 4 * OCS_TILE_LINE + 4 * o + c % 4];
                sum[r * OCS_TILE_OUTPUTS + o] += (is_signed ? code : integer_of(code, bits)) * value;
            }
        }
    }
}

void ocs_product_ref(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t B, int64_t V, int64_t R,
                     int64_t tile_step, int64_t x_step, int64_t stride, int bits, bool is_signed) {
    uint8_t codes[OCS_TILE_CODES];
    memset(sum, 0, (size_t)(B * R) * OCS_TILE_OUTPUTS * sizeof *sum);
    for (int64_t b = 0; b < B; ++b, sum += R * OCS_TILE_OUTPUTS) {
        const uint8_t *tile = tiles + b * tile_step, *of_x = x + b * x_step;
        for (int64_t v = 0; v < V; v += OCS_TILE_LINES, tile += ocs_tile_bytes(bits)) {
            const int lines = ocs_tile_lines(V - v), channels = lines * OCS_LINE_CHANNELS;
            ocs_unpack_tile_ref(codes, tile, lines, bits);
            add_tile(sum, codes, of_x + v * OCS_LINE_CHANNELS, R, stride, channels, bits, is_signed);
        }
    }
}

/* value [16] = the integers that sums [places, 16] stand for; below 2^53, so that nothing is rounded before the end. */
static void values_of_sums(float *restrict value, const int32_t *sum, const int32_t *row_sum, int64_t places,
                           int64_t row_stride, int32_t qmax) {
    if (places == 1) {
        const int32_t offset = qmax * row_sum[0];
        for (int o = 0; o < OCS_TILE_OUTPUTS; ++o) {
            value[o] = (float)(sum[o] - offset);
        }
        return;
    }
    double whole[OCS_TILE_OUTPUTS] = {0.0};
    for (int64_t place = 0; place < places; ++place, sum += OCS_TILE_OUTPUTS) {
        const int32_t offset = qmax * row_sum[place * row_stride];
        for (int o = 0; o < OCS_TILE_OUTPUTS; ++o) {
            whole[o] = 256.0 * whole[o] + (double)(sum[o] - offset);
        }
    }
    for (int o = 0; o < OCS_TILE_OUTPUTS; ++o) {
        value[o] = (float)whole[o];
    }
}

void ocs_scale_sums_ref(float *restrict total, const int32_t *sum, const int32_t *row_sum, const float *scale,
                        int64_t B, int64_t S, int64_t places, int64_t sum_step, int64_t row_stride,
                        int64_t scale_stride, int32_t qmax) {
    float value[OCS_TILE_OUTPUTS];
    for (int64_t b = 0; b < B; ++b, total += OCS_TILE_OUTPUTS, scale += OCS_TILE_OUTPUTS) {
        for (int64_t s = 0; s < S; ++s, sum += sum_step) {
            values_of_sums(value, sum, row_sum + s, places, row_stride, qmax);
            for (int o = 0; o < OCS_TILE_OUTPUTS; ++o) {
                total[o] += value[o] * scale[s * scale_stride + o];
            }
        }
    }
}

void ocs_cut_row_ref(int8_t *restrict bytes, const float *x, int64_t N, int64_t stride, float step) {
    for (int64_t i = 0; i < N; ++i) {
        int32_t left = (int32_t)nearbyintf(x[i] / step);
        for (int place = 2; place > 0; --place) {
            const int8_t byte = (int8_t)left;
            bytes[place * stride + i] = byte;
            left = (left - byte) / 256;
        }
        bytes[i] = (int8_t)left;
    }
}

/* --- Rows ------------------------------------------------------------------------------------- */

enum {
    SEGMENT = 32768, /* channels whose products add up in 32 bits, 2^15 * 255 * 128 < 2^31 */
    PLACES = 3,      /* bytes of a float */
};
#define MOST_STEPS 8323072.0f /* 2^23 - 2^16, the largest such number whose first byte is 127 */

/* Everything that a call has prepared. */
typedef struct {
    const ocs_kernels *kernels;
    const ocs_packed_weight *weight;
    const float *bias;
    ocs_row_grid grid;
    ocs_row_dtype dtype;
    const char *x; /* as given */
    char *y;
    int64_t R;
    int64_t stride;   /* of prepared rows: channels of all tiles */
    int64_t span;     /* channels of a segment, whose sums are scaled as one */
    int64_t segments; /* of a row */
    int64_t places;   /* rows of integers for each row: PLACES of floats, 1 where it is rounded */
    bool is_signed;   /* those integers */
    uint8_t *rows;    /* [R, places, stride] */
    float *row_scale; /* [R] */
    int32_t *row_sum; /* [R, places, segments] of the integers */
} product_job;

static int64_t padded_channels(const ocs_packed_weight *w) {
    return ocs_ceil_div(w->C + w->S, OCS_TILE_CHANNELS) * OCS_TILE_CHANNELS;
}

/* The largest part of a group that is no larger than a segment; a group is a multiple of 32. */
static int64_t segment_channels(const ocs_packed_weight *w) {
    if (w->group == 0 || w->group % SEGMENT == 0) {
        return SEGMENT;
    }
    return w->group < SEGMENT ? w->group : w->group & -w->group;
}

static float from_bf16(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Rounded half to even; NaN stays one. */
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static size_t size_of(ocs_row_dtype dtype) {
    return dtype == OCS_ROWS_BF16 ? sizeof(uint16_t) : sizeof(float);
}

/* Row r [C] as floats: where it is, or converted into `room`. */
static const float *row_as_floats(const product_job *job, int64_t r, float *room) {
    const int64_t C = job->weight->C;
    const char *row = job->x + (size_t)(r * C) * size_of(job->dtype);
    if (job->dtype == OCS_ROWS_F32) {
        return (const float *)(const void *)row;
    }
    for (int64_t c = 0; c < C; ++c) {
        uint16_t bits;
        memcpy(&bits, row + 2 * c, sizeof bits);
        room[c] = from_bf16(bits);
    }
    return room;
}

/* The scale of a row whose largest magnitude is given; NaN where it cannot have one. */
static float scale_of_row(const product_job *job, float largest) {
    const bool fixed = job->grid.bits != 0 && job->grid.scale != 0.0f;
    if (isnan(largest) || (!fixed && isinf(largest))) {
        return NAN;
    }
    if (fixed) {
        return job->grid.scale;
    }
    const float scale = largest / (job->grid.bits == 0 ? MOST_STEPS : (float)ocs_qmax(job->grid.bits));
    const float smallest = 0x1p-149f;
    return largest == 0.0f ? 1.0f : scale > smallest ? scale : smallest;
}

/* Appends the copies to a row of integers, and sums up each segment. */
static void finish_integers(const product_job *job, uint8_t *q, int32_t *sums) {
    const ocs_packed_weight *w = job->weight;
    for (int64_t i = 0; i < w->S; ++i) {
        q[w->C + i] = q[w->copies[i]];
    }
    memset(q + w->C + w->S, 0, (size_t)(job->stride - w->C - w->S));
    for (int64_t s = 0; s < job->segments; ++s) {
        const int64_t end = (s + 1) * job->span < job->stride ? (s + 1) * job->span : job->stride;
        sums[s] = 0;
        for (int64_t e = s * job->span; e < end; ++e) {
            sums[s] += (int8_t)q[e];
        }
    }
}

/* Integers of a row: its rounded values, or the bytes of whole numbers. */
static void make_integers(const product_job *job, int64_t r, const float *row) {
    const int64_t C = job->weight->C;
    const ocs_row_grid grid = job->grid;
    const float scale = scale_of_row(job, job->kernels->abs_max(row, C));
    uint8_t *q = job->rows + r * job->places * job->stride;
    job->row_scale[r] = scale;
    if (isnan(scale)) {
        memset(q, 0, (size_t)(job->places * job->stride));
    } else if (grid.bits == 0) {
        job->kernels->cut_row((int8_t *)q, row, C, job->stride, scale);
    } else {
        const float most = grid.is_signed ? (float)ocs_qmax(grid.bits) : (float)((1 << grid.bits) - 1);
        job->kernels->quantize(q, row, C, scale, grid.is_signed ? -most : 0.0f, most);
    }
    for (int64_t place = 0; place < job->places; ++place) {
        const int64_t i = r * job->places + place;
        finish_integers(job, q + place * job->stride, job->row_sum + i * job->segments);
    }
}

static void prepare_rows(ocs_range *range) {
    const product_job *job = range->ctx;
    for (int64_t r = range->begin; r < range->end; ++r) {
        make_integers(job, r, row_as_floats(job, r, range->scratch));
    }
}

/* --- Products --------------------------------------------------------------------------------- */

/* Rows first .. first + R - 1 of B blocks of outputs. */
typedef struct {
    int64_t block, B, first, R;
    int32_t sum[OCS_MOST_ROWS * OCS_TILE_OUTPUTS]; /* [B, S, R, places, 16] of S segments; B or S is 1 */
    float total[OCS_MOST_ROWS * OCS_TILE_OUTPUTS]; /* [R, B, 16] of all segments, scaled */
    const float *scale;                            /* [B, G, 16] */
} product_part;

/* How many of a part's outputs the weight has. */
static int64_t outputs_of(const product_part *part, const ocs_packed_weight *w) {
    const int64_t outputs = part->B * OCS_TILE_OUTPUTS, left = w->O - part->block * OCS_TILE_OUTPUTS;
    return left < outputs ? left : outputs;
}

/* scale [outputs of a part] = those of one scale, or of outputs; of outputs that the weight lacks, any. */
static void copy_scales(float *restrict scale, const product_part *part, const ocs_packed_weight *w) {
    const int64_t first = part->block * OCS_TILE_OUTPUTS, N = outputs_of(part, w);
    for (int64_t i = 0; i < part->B * OCS_TILE_OUTPUTS; ++i) {
        scale[i] = ocs_scale_of(w->scale, i < N ? first + i : first);
    }
}

/* The scales of a part [B, G, 16]: where they are, or in a range's memory, for all parts where there is one. */
static const float *scales_of(const product_part *part, const ocs_packed_weight *w, ocs_range *range) {
    if (w->group > 0) {
        return ocs_scales_of_block(w, part->block);
    }
    if (w->scale.stride == 1 && outputs_of(part, w) == part->B * OCS_TILE_OUTPUTS) {
        return w->scale.value + part->block * OCS_TILE_OUTPUTS;
    }
    if (w->scale.stride == 1 || part->block == range->begin) {
        copy_scales(range->scratch, part, w);
    }
    return range->scratch;
}

/* Adds what S segments give, which are whole ones where there are several. */
static void add_segments(product_part *part, const product_job *job, int64_t segment, int64_t S) {
    const ocs_packed_weight *w = job->weight;
    const int64_t begin = segment * job->span, left = w->C + w->S - begin, rows = part->R * job->places;
    const int64_t V = ocs_ceil_div(left < job->span ? left : job->span, OCS_LINE_CHANNELS);
    const int64_t block = ocs_block_bytes(w->C + w->S, w->bits), tile = ocs_tile_bytes(w->bits);
    const uint8_t *tiles = w->packed + part->block * block + begin / OCS_TILE_CHANNELS * tile;
    const uint8_t *x = job->rows + part->first * job->places * job->stride + begin;
    const int64_t tile_step = S > 1 ? job->span / OCS_TILE_CHANNELS * tile : block, x_step = S > 1 ? job->span : 0;
    job->kernels->product(part->sum, tiles, x, part->B * S, V, rows, tile_step, x_step, job->stride, w->bits,
                          job->is_signed);
    const float *scale = part->scale + (w->group > 0 ? begin / w->group * OCS_TILE_OUTPUTS : 0);
    for (int64_t r = 0; r < part->R; ++r) {
        const int32_t *of_row = job->row_sum + (part->first + r) * job->places * job->segments + segment;
        job->kernels->scale_sums(part->total + r * part->B * OCS_TILE_OUTPUTS,
                                 part->sum + r * job->places * OCS_TILE_OUTPUTS, of_row, scale, part->B, S, job->places,
                                 rows * OCS_TILE_OUTPUTS, job->segments, w->group > 0 ? OCS_TILE_OUTPUTS : 0,
                                 job->is_signed ? ocs_qmax(w->bits) : 0);
    }
}

/* Scales row r once more, adds the bias and writes it. */
static void write_row(const product_job *job, product_part *part, int64_t r) {
    const int64_t O = job->weight->O, first = part->block * OCS_TILE_OUTPUTS, N = outputs_of(part, job->weight);
    const float scale = job->row_scale[part->first + r];
    float *restrict total = part->total + r * part->B * OCS_TILE_OUTPUTS;
    for (int64_t i = 0; i < N; ++i) {
        total[i] *= scale;
    }
    for (int64_t i = 0; i < N && job->bias != NULL; ++i) {
        total[i] += job->bias[first + i];
    }
    char *y = job->y + (size_t)((part->first + r) * O + first) * size_of(job->dtype);
    if (job->dtype == OCS_ROWS_F32) {
        memcpy(y, total, (size_t)N * sizeof *total);
        return;
    }
    for (int64_t i = 0; i < N; ++i) {
        const uint16_t bits = to_bf16(total[i]);
        memcpy(y + 2 * i, &bits, sizeof bits);
    }
}

static void multiply_part(product_part *part, const product_job *job) {
    const int64_t whole = (job->weight->C + job->weight->S) / job->span;
    const int64_t most = job->weight->group > job->span ? 1 : OCS_MOST_ROWS / (part->R * job->places);
    memset(part->total, 0, (size_t)(part->R * part->B) * OCS_TILE_OUTPUTS * sizeof *part->total);
    for (int64_t segment = 0, S; segment < job->segments; segment += S) {
        S = part->B > 1 || whole - segment < 1 ? 1 : whole - segment < most ? whole - segment : most;
        add_segments(part, job, segment, S);
    }
    for (int64_t r = 0; r < part->R; ++r) {
        write_row(job, part, r);
    }
}

/* Where sums are of one segment, several blocks share a call of the kernels, else several segments do. */
static void multiply_blocks(ocs_range *range) {
    const product_job *job = range->ctx;
    const int64_t most_rows = OCS_MOST_ROWS / job->places, rows = job->R < most_rows ? job->R : most_rows;
    const int64_t blocks = job->segments > 1 || rows == 0 ? 1 : most_rows / rows;
    product_part part;
    for (part.block = range->begin; part.block < range->end; part.block += part.B) {
        part.B = range->end - part.block < blocks ? range->end - part.block : blocks;
        part.scale = scales_of(&part, job->weight, range);
        for (part.first = 0; part.first < job->R; part.first += part.R) {
            part.R = job->R - part.first < rows ? job->R - part.first : rows;
            multiply_part(&part, job);
        }
    }
}

/* --- Entries ---------------------------------------------------------------------------------- */

size_t ocs_product_scratch(const ocs_packed_weight *weight, int64_t R) {
    const int64_t stride = padded_channels(weight), segments = ocs_ceil_div(stride, segment_channels(weight));
    return (size_t)R * (size_t)(PLACES * stride + (1 + PLACES * segments) * (int64_t)sizeof(float)) + 64;
}

/* What is the same for all rows. */
static product_job job_of(const ocs_packed_weight *weight, const float *bias, ocs_row_grid grid, ocs_row_dtype dtype) {
    product_job job = {.kernels = ocs_kernel_table(), .weight = weight, .bias = bias, .grid = grid, .dtype = dtype};
    job.places = grid.bits == 0 ? PLACES : 1;
    job.is_signed = grid.bits == 0 || grid.is_signed;
    job.stride = padded_channels(weight);
    job.span = segment_channels(weight);
    job.segments = ocs_ceil_div(job.stride, job.span);
    return job;
}

/* Multiplies R rows, for which there is scratch memory. */
static ocs_status run_rows(ocs_member *member, product_job *job, void *scratch, int64_t R) {
    const ocs_packed_weight *weight = job->weight;
    job->R = R;
    job->rows = (uint8_t *)(((uintptr_t)scratch + 63) / 64 * 64);
    job->row_scale = (float *)(void *)(job->rows + (size_t)(R * job->places * job->stride));
    job->row_sum = (int32_t *)(void *)(job->row_scale + R);
    const size_t room = job->dtype == OCS_ROWS_F32 ? 0 : (size_t)weight->C * sizeof(float) + 1;
    OCS_TRY(ocs_parallel_in(member, R, ocs_grain(4 * job->stride), room, prepare_rows, job));
    const size_t room_of_scales = OCS_MOST_ROWS * OCS_TILE_OUTPUTS * sizeof(float);
    const int64_t blocks = ocs_ceil_div(weight->O, OCS_TILE_OUTPUTS);
    const int64_t grain = ocs_grain(OCS_TILE_OUTPUTS * job->stride);
    return ocs_parallel_in(member, blocks, grain, room_of_scales, multiply_blocks, job);
}

ocs_status ocs_product_in(ocs_member *member, void *scratch, float *y, const float *x, const float *bias,
                          const ocs_packed_weight *weight, ocs_row_grid grid, int64_t R) {
    product_job job = job_of(weight, bias, grid, OCS_ROWS_F32);
    job.x = (const char *)x, job.y = (char *)y;
    return run_rows(member, &job, scratch, R);
}

ocs_status ocs_check_grid(ocs_row_grid grid) {
    if (grid.bits == 0) {
        return OCS_OK;
    }
    OCS_TRY(ocs_check_bits(grid.bits));
    const bool own = grid.scale == 0.0f && grid.is_signed;
    return own || (grid.scale > 0.0f && isfinite(grid.scale)) ? OCS_OK : OCS_BAD_SCALE;
}

ocs_status ocs_product(void *y, const void *x, const float *bias, const ocs_packed_weight *weight, ocs_row_grid grid,
                       int64_t R, ocs_row_dtype dtype) {
    enum { ROWS_AT_ONCE = 256 }; /* that are prepared: the scratch memory stays in the cache */
    OCS_TRY(dtype <= OCS_ROWS_BF16 ? ocs_check_grid(grid) : OCS_BAD_METHOD);
    OCS_TRY(ocs_check_packed(weight));
    OCS_TRY(ocs_check_sizes(R, weight->C, 1));
    OCS_TRY(ocs_check_sizes(R, weight->O, 1));
    R = weight->O > 0 ? R : 0; /* without outputs there can be any number of rows */
    const int64_t at_once = R < ROWS_AT_ONCE ? R : ROWS_AT_ONCE;
    int32_t *copies = malloc((size_t)weight->S * sizeof *copies + ocs_product_scratch(weight, at_once));
    if (copies == NULL) {
        return OCS_NO_MEMORY;
    }
    ocs_packed_weight w = *weight;
    ocs_status status = ocs_own_copies(&w, copies);
    product_job job = job_of(&w, bias, grid, dtype);
    for (int64_t r = 0; r < R && status == OCS_OK; r += at_once) {
        job.x = (const char *)x + (size_t)(r * w.C) * size_of(dtype);
        job.y = (char *)y + (size_t)(r * w.O) * size_of(dtype);
        status = run_rows(NULL, &job, copies + w.S, R - r < at_once ? R - r : at_once);
    }
    free(copies);
    return status;
}
