/* The form in which products read k-bit weights: tiles.

   A tile has the codes q + qmax of 16 outputs and 32 channels in 64 k bytes. Its unpacked form are eight lines of 64
   bytes: line v holds channels 4 v .. 4 v + 3, that of output o and channel 4 v + j at byte 4 o + j, so that a vector
   of four bytes of the input meets every output, and no sum goes across a vector.

   Packed, a code of k bits is cut as k is written in binary: 7 bits into fields of 4, 2 and 1, the lowest bits first.
   The fields of one width w are a plane of w lines: byte i of a plane's line has the fields of byte i of 8 / w unpacked
   lines, the first one lowest. So a vector of any size is unpacked by a shift and a mask for each plane.

   Tiles follow each other along the channels, then along the outputs. What a tile has beyond the weight is q = 0. The
   last tile of a block of outputs is short where its channels take L < 8 lines: of each plane it has only the first
   ceil(L w / 8) lines. */
#include "kernels.h"

#include <stdlib.h>

/* --- Sizes ------------------------------------------------------------------------------------ */

int64_t ocs_block_bytes(int64_t E, int bits) {
    int64_t bytes = 0;
    for (int width = 8; width > 0; width /= 2) {
        bytes += (bits & width) != 0 ? ocs_plane_bytes(ocs_ceil_div(E, OCS_LINE_CHANNELS), width) : 0;
    }
    return bytes;
}

int64_t ocs_product_bytes(int64_t O, int64_t E, int bits) {
    if (ocs_check_bits(bits) != OCS_OK || ocs_check_sizes(O, E, 1) != OCS_OK) {
        return -1;
    }
    return O == 0 ? 0 : ocs_ceil_div(O, OCS_TILE_OUTPUTS) * ocs_block_bytes(E, bits);
}

/* --- Plain kernels ---------------------------------------------------------------------------- */

void ocs_unpack_tile_ref(uint8_t *restrict codes, const uint8_t *tile, int lines, int bits) {
    memset(codes, 0, (size_t)(lines * OCS_TILE_LINE));
    int place = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) {
            continue;
        }
        const int fields = 8 / width, mask = (1 << width) - 1;
        for (int v = 0; v < lines; ++v) {
            for (int i = 0; i < OCS_TILE_LINE; ++i) {
                const int byte = tile[v / fields * OCS_TILE_LINE + i];
                codes[v * OCS_TILE_LINE + i] |= (uint8_t)((byte >> v % fields * width & mask) << place);
            }
        }
        tile += ocs_plane_bytes(lines, width);
        place += width;
    }
}

/* The way back, from all lines, of which some may be beyond the tile's; all other bits of the codes must be 0. */
static void pack_tile(uint8_t *restrict tile, const uint8_t *codes, int lines, int bits) {
    int place = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) == 0) {
            continue;
        }
        const int fields = 8 / width, mask = (1 << width) - 1;
        const int64_t bytes = ocs_plane_bytes(lines, width);
        memset(tile, 0, (size_t)bytes);
        for (int v = 0; v < bytes / OCS_TILE_LINE * fields; ++v) {
            for (int i = 0; i < OCS_TILE_LINE; ++i) {
                const int field = codes[v * OCS_TILE_LINE + i] >> place & mask;
                tile[v / fields * OCS_TILE_LINE + i] |= (uint8_t)(field << v % fields * width);
            }
        }
        tile += bytes;
        place += width;
    }
}

/* --- Integers to tiles and back --------------------------------------------------------------- */

typedef struct {
    const ocs_kernels *kernels;
    uint8_t *packed_out;
    const uint8_t *packed_in;
    int8_t *q_out;
    const int8_t *q_in;
    int64_t O, E;
    int bits;
} tile_job;

/* How many of a tile's outputs or channels a weight has that ends at `size`. */
static int64_t within(int64_t begin, int64_t size, int64_t most) {
    return size - begin < most ? size - begin : most;
}

/* How many lines so many channels of a tile take. */
static int lines_of(int64_t channels) {
    return (int)ocs_ceil_div(channels, OCS_LINE_CHANNELS);
}

/* Whether all are in [-qmax, qmax]; q is the tile's first element in the weight. */
static bool codes_of_tile(uint8_t *restrict codes, const int8_t *q, int64_t outputs, int64_t channels, int64_t E,
                          int bits) {
    const int32_t qmax = ocs_qmax(bits);
    bool valid = true;
    memset(codes, qmax, OCS_TILE_CODES);
    for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t e = 0; e < channels; ++e) {
            const int32_t code = q[o * E + e] + qmax;
            valid = valid && code >= 0 && code <= 2 * qmax;
            codes[e / 4 * OCS_TILE_LINE + 4 * o + e % 4] = (uint8_t)code;
        }
    }
    return valid;
}

static void pack_blocks(ocs_range *range) {
    const tile_job *job = range->ctx;
    const int64_t T = ocs_ceil_div(job->E, OCS_TILE_CHANNELS), block = ocs_block_bytes(job->E, job->bits);
    uint8_t codes[OCS_TILE_CODES];
    for (int64_t i = range->begin * T; i < range->end * T; ++i) {
        const int64_t o = i / T * OCS_TILE_OUTPUTS, e = i % T * OCS_TILE_CHANNELS;
        const int64_t outputs = within(o, job->O, OCS_TILE_OUTPUTS), channels = within(e, job->E, OCS_TILE_CHANNELS);
        if (!codes_of_tile(codes, job->q_in + o * job->E + e, outputs, channels, job->E, job->bits)) {
            range->status = OCS_BAD_CODE;
        }
        uint8_t *tile = job->packed_out + i / T * block + i % T * ocs_tile_bytes(job->bits);
        pack_tile(tile, codes, lines_of(channels), job->bits);
    }
}

/* Outputs of a block, each a row of `stride` integers: the first `outputs` of 16 rows. Returns the largest code. */
static uint8_t unpack_block(int8_t *q, const uint8_t *tiles, const ocs_kernels *kernels, int64_t outputs, int64_t E,
                            int64_t stride, int bits) {
    const uint8_t qmax = (uint8_t)ocs_qmax(bits);
    uint8_t codes[OCS_TILE_CODES], largest = 0;
    for (int64_t e = 0; e < E; e += OCS_TILE_CHANNELS, tiles += ocs_tile_bytes(bits)) {
        const int64_t channels = within(e, E, OCS_TILE_CHANNELS);
        const int lines = lines_of(channels);
        kernels->unpack_tile(codes, tiles, lines, bits);
        for (int i = 0; i < lines * OCS_TILE_LINE; ++i) {
            largest = codes[i] > largest ? codes[i] : largest;
            codes[i] = (uint8_t)(codes[i] - qmax);
        }
        for (int64_t o = 0; o < outputs; ++o) {
            int8_t *row = q + o * stride + e;
            int64_t c = 0;
            for (; c + 4 <= channels; c += 4) {
                memcpy(row + c, codes + c / 4 * OCS_TILE_LINE + 4 * o, 4);
            }
            for (; c < channels; ++c) {
                row[c] = (int8_t)codes[c / 4 * OCS_TILE_LINE + 4 * o + c % 4];
            }
        }
    }
    return largest;
}

static void unpack_blocks(ocs_range *range) {
    const tile_job *job = range->ctx;
    const int64_t block = ocs_block_bytes(job->E, job->bits);
    for (int64_t b = range->begin; b < range->end; ++b) {
        const int64_t o = b * OCS_TILE_OUTPUTS, outputs = within(o, job->O, OCS_TILE_OUTPUTS);
        const uint8_t largest = unpack_block(job->q_out + o * job->E, job->packed_in + b * block, job->kernels, outputs,
                                             job->E, job->E, job->bits);
        range->status = largest > 2 * ocs_qmax(job->bits) ? OCS_BAD_CODE : range->status;
    }
}

static ocs_status run_blocks(tile_job *job, ocs_work_fn work) {
    OCS_TRY(ocs_check_bits(job->bits));
    OCS_TRY(ocs_check_sizes(job->O, job->E, 1));
    if (job->E == 0) { /* and there can be any number of outputs */
        return OCS_OK;
    }
    job->kernels = ocs_kernel_table();
    const int64_t grain = ocs_grain(OCS_TILE_OUTPUTS * job->E);
    return ocs_parallel_for(ocs_ceil_div(job->O, OCS_TILE_OUTPUTS), grain, 0, work, job);
}

ocs_status ocs_product_pack_i8(uint8_t *packed, const int8_t *q, int64_t O, int64_t E, int bits) {
    tile_job job = {.packed_out = packed, .q_in = q, .O = O, .E = E, .bits = bits};
    return run_blocks(&job, pack_blocks);
}

ocs_status ocs_product_unpack_i8(int8_t *q, const uint8_t *packed, int64_t O, int64_t E, int bits) {
    tile_job job = {.packed_in = packed, .q_out = q, .O = O, .E = E, .bits = bits};
    return run_blocks(&job, unpack_blocks);
}

/* --- Rows as floats --------------------------------------------------------------------------- */

ocs_status ocs_check_packed(const ocs_packed_weight *w) {
    OCS_TRY(ocs_check_bits(w->bits));
    OCS_TRY(ocs_check_sizes(w->C, w->S, 0)); /* their sum does not wrap around */
    OCS_TRY(ocs_check_sizes(w->O, w->C + w->S, 1));
    if (w->group < 0 || w->group % OCS_TILE_CHANNELS != 0) {
        return OCS_BAD_GROUP;
    }
    if (w->group == 0) {
        return ocs_check_scale(w->scale, w->O);
    }
    const int64_t scales = ocs_ceil_div(w->O, OCS_TILE_OUTPUTS) * OCS_TILE_OUTPUTS * ocs_group_count(w);
    return w->scale.stride == 1 ? ocs_check_scale(w->scale, scales) : OCS_BAD_SCALE;
}

ocs_status ocs_own_copies(ocs_packed_weight *weight, int32_t *memory) {
    ocs_copy(memory, weight->copies, weight->S * (int64_t)sizeof *memory);
    weight->copies = memory;
    for (int64_t i = 0; i < weight->S; ++i) {
        if (memory[i] < 0 || memory[i] >= weight->C) {
            return OCS_BAD_PLAN;
        }
    }
    return OCS_OK;
}

typedef struct {
    const ocs_kernels *kernels;
    const ocs_packed_weight *weight;
    const int64_t *index;
    float *rows;
} row_job;

/* w [C] of integers q [C + S] with a scale for each group. */
static void fold_groups(float *restrict row, const int8_t *q, const ocs_packed_weight *w, int64_t o) {
    const float *scale = ocs_scales_of_block(w, o / OCS_TILE_OUTPUTS) + o % OCS_TILE_OUTPUTS;
    for (int64_t e = 0; e < w->C + w->S; ++e) {
        const float value = (float)q[e] * scale[e / w->group * OCS_TILE_OUTPUTS];
        if (e < w->C) {
            row[e] = value;
        } else {
            row[w->copies[e - w->C]] += value;
        }
    }
}

/* Neighbours in one block are unpacked together. */
static void fold_rows(ocs_range *range) {
    const row_job *job = range->ctx;
    const ocs_packed_weight *w = job->weight;
    const int64_t E = w->C + w->S, block = ocs_block_bytes(E, w->bits);
    int8_t *q = range->scratch;
    int64_t unpacked = -1;
    for (int64_t r = range->begin; r < range->end; ++r) {
        const int64_t o = job->index[r], b = o / OCS_TILE_OUTPUTS;
        if (o < 0 || o >= w->O) {
            range->status = OCS_BAD_INDEX;
            return;
        }
        if (b != unpacked) {
            unpack_block(q, w->packed + b * block, job->kernels, OCS_TILE_OUTPUTS, E, E, w->bits);
            unpacked = b;
        }
        const int8_t *row = q + o % OCS_TILE_OUTPUTS * E;
        if (w->group == 0) {
            job->kernels->fold_row(job->rows + r * w->C, row, w->copies, w->C, E, ocs_scale_of(w->scale, o));
        } else {
            fold_groups(job->rows + r * w->C, row, w, o);
        }
    }
}

ocs_status ocs_product_rows_f32(float *rows, const int64_t *index, const ocs_packed_weight *weight, int64_t R) {
    OCS_TRY(ocs_check_packed(weight));
    OCS_TRY(ocs_check_sizes(R, weight->C, 1));
    int32_t *copies = malloc((size_t)(weight->S + 1) * sizeof *copies);
    if (copies == NULL) {
        return OCS_NO_MEMORY;
    }
    ocs_packed_weight w = *weight;
    ocs_status status = ocs_own_copies(&w, copies);
    if (status == OCS_OK) {
        row_job job = {ocs_kernel_table(), &w, index, rows};
        const int64_t E = w.C + w.S;
        status = ocs_parallel_for(R, ocs_grain(E), (size_t)(OCS_TILE_OUTPUTS * E + 1), fold_rows, &job);
    }
    free(copies);
    return status;
}
