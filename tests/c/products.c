/* Products and recurrent layers on packed weights, by every instruction set, over random and hostile shapes and bytes.

   `make sanitize` builds it with all C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, `make arm` for
   another processor. All results must be those of the plain kernels bit for bit; any NaN equals any other. */
#include "arrays.h"

#include <stdio.h>

static void require(bool holds, const char *what) {
    if (!holds) {
        printf("%s: %s is not that of the plain kernels\n", ocs_isa(), what);
        exit(1);
    }
}

static float element(const void *x, int64_t i, ocs_row_dtype dtype) {
    const uint32_t wide = dtype == OCS_ROWS_BF16 ? (uint32_t)((const uint16_t *)x)[i] << 16 : ((const uint32_t *)x)[i];
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Keeps the results of the first instruction set, and compares those of the others with them. */
static void require_first(void **first, void *x, int64_t count, int i, ocs_row_dtype dtype, const char *what) {
    *first = i == 0 ? x : *first;
    for (int64_t j = 0; j < count; ++j) {
        const float a = element(*first, j, dtype), b = element(x, j, dtype);
        require((isnan(a) && isnan(b)) || memcmp(&a, &b, sizeof a) == 0, what);
    }
}

/* Packs and unpacks integers; every third weight then has any bytes at all. */
static ocs_packed_weight any_weight(int64_t O, int64_t C) {
    ocs_packed_weight w = {.O = O, .C = C, .S = C > 0 ? any(5) : 0, .bits = 2 + (int)any(7), .group = 32 * any(3)};
    const int64_t E = w.C + w.S, bytes = ocs_product_bytes(O, E, w.bits),
                  groups = w.group ? ocs_ceil_div(E, w.group) : 1;
    uint8_t *packed = any_bytes(bytes);
    int8_t *q = new_array(O * E, 1), *unpacked = new_array(O * E, 1);
    for (int64_t i = 0; i < O * E; ++i) {
        q[i] = (int8_t)(any(2 * ocs_qmax(w.bits) + 1) - ocs_qmax(w.bits));
    }
    if (any(3) > 0) {
        require(ocs_product_pack_i8(packed, q, O, E, w.bits) == OCS_OK, "what packing returns");
        require(ocs_product_unpack_i8(unpacked, packed, O, E, w.bits) == OCS_OK, "what unpacking returns");
        require(O * E == 0 || memcmp(q, unpacked, (size_t)(O * E)) == 0, "what was packed");
    }
    int32_t *copies = new_array(w.S, sizeof *copies);
    for (int64_t i = 0; i < w.S; ++i) {
        copies[i] = (int32_t)any(C);
    }
    w.scale.stride = w.group > 0 || any(2);
    const int64_t outputs = w.group > 0 ? ocs_ceil_div(O, OCS_TILE_OUTPUTS) * OCS_TILE_OUTPUTS : O;
    const int64_t scales = w.scale.stride > 0 ? groups * outputs : 1;
    float *scale = new_array(scales, sizeof *scale);
    for (int64_t i = 0; i < scales; ++i) {
        scale[i] = 1e-3f * (float)(1 + any(100));
    }
    w.packed = packed, w.copies = copies, w.scale.value = scale;
    return w;
}

static void check_inner_kernels(void) {
    const int bits = 2 + (int)any(7);
    const bool is_signed = any(2);
    const int lines = 1 + (int)any(OCS_TILE_LINES);
    const int64_t V = any(30), B = 1 + any(3), R = 1 + any(OCS_MOST_ROWS / B), stride = 4 * V + any(40);
    const int64_t x_step = any(2) ? 4 * any(9) : 0, width = stride + (B - 1) * x_step;
    const int64_t block = ocs_block_bytes(4 * V, bits), sums = B * R * OCS_TILE_OUTPUTS;
    const uint8_t *tile = any_bytes(ocs_block_bytes(4 * lines, bits)), *tiles = any_bytes(B * block);
    const uint8_t *x = any_bytes(R * width);
    void *first[2];
    for (int i = 0; ocs_isa_name(i) != NULL; ++i) {
        ocs_set_isa(ocs_isa_name(i));
        uint8_t *codes = new_array(lines * OCS_TILE_LINE, 1);
        int32_t *whole = new_array(sums, sizeof *whole);
        ocs_kernel_table()->unpack_tile(codes, tile, lines, bits);
        ocs_kernel_table()->product(whole, tiles, x, B, V, R, block, x_step, width, bits, is_signed);
        require_first(&first[0], codes, lines * OCS_TILE_LINE / 4, i, OCS_ROWS_F32, "a tile");
        require_first(&first[1], whole, sums, i, OCS_ROWS_F32, "a sum of integers");
    }
}

static void check_products(void) {
    const int64_t O = any(2) ? any(3) : any(70), C = any(2) ? any(3) : any(200), R = any(40);
    const ocs_packed_weight w = any_weight(O, C);
    const ocs_row_dtype dtype = any(3) == 0 ? OCS_ROWS_BF16 : OCS_ROWS_F32;
    const ocs_row_grid grids[] = {{0, true, 0.0f}, {2 + (int)any(7), true, 0.0f}, {8, any(2), 0.01f}};
    const ocs_row_grid grid = grids[any(3)];
    const float *x = any_floats(R * C), *bias = any(2) ? any_floats(O) : NULL;
    int64_t *index = new_array(R, sizeof *index);
    for (int64_t r = 0; r < R; ++r) {
        index[r] = any(O > 0 ? O : 1);
    }
    void *first[2];
    for (int i = 0; ocs_isa_name(i) != NULL; ++i) {
        ocs_set_isa(ocs_isa_name(i));
        float *y = new_array(R * O, sizeof *y), *rows = new_array(R * C, sizeof *rows);
        require(ocs_product(y, x, bias, &w, grid, R, dtype) == OCS_OK, "what a product returns");
        const ocs_status status = ocs_product_rows_f32(rows, index, &w, R);
        require(status == (R > 0 && O == 0 ? OCS_BAD_INDEX : OCS_OK), "what rows return");
        require_first(&first[0], y, R * O, i, dtype, "a product");
        require_first(&first[1], rows, R * C, i, OCS_ROWS_F32, "a row");
    }
}

static void check_recurrent(void) {
    const ocs_cell_kind kind = (ocs_cell_kind)any(4);
    const bool projects = kind == OCS_LSTM && any(2), reverse = any(2);
    const int64_t H = any(40), P = projects ? any(30) : H, N = any(20), gates = ocs_cell_gates(kind) * H;
    const ocs_packed_weight projection = any_weight(P, H);
    ocs_recurrent_layer layer = {.hidden = any_weight(gates, P), .bias = any_floats(gates), .kind = kind};
    layer.projection = projects ? &projection : NULL;
    layer.grid = (ocs_row_grid){any(2) ? 8 : 0, true, 0.0f};
    int64_t sizes[] = {any(N + 1), 0, 0};
    sizes[1] = any(sizes[0] + 1), sizes[2] = any(sizes[1] + 1);
    const int64_t steps = sizes[0] + sizes[1] + sizes[2];
    const float *from_x = any_floats(steps * gates);
    const uint64_t states = seed;
    void *first[3];
    for (int i = 0; ocs_isa_name(i) != NULL; ++i) {
        ocs_set_isa(ocs_isa_name(i));
        seed = states; /* the same states for all */
        float *y = any_floats(steps * P), *h = any_floats(N * P), *c = any_floats(N * H);
        const ocs_status status = ocs_recurrent_f32(y, h, c, from_x, &layer, sizes, steps, 3, N, reverse);
        require(status == OCS_OK, "what a layer returns");
        require_first(&first[0], y, steps * P, i, OCS_ROWS_F32, "a layer's output");
        require_first(&first[1], h, N * P, i, OCS_ROWS_F32, "a layer's state");
        require_first(&first[2], c, N * H, i, OCS_ROWS_F32, "a layer's second state");
    }
}

/* Copies of a weight, and sizes of batches, that another thread changes while the work runs. */
static int32_t *copies_to_change;
static int64_t count_to_change, *size_to_change;

/* A host that cuts work into the smallest pieces. */
static void one_by_one(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx) {
    (void)grain;
    for (int64_t i = 0; i < count_to_change; ++i) {
        copies_to_change[i] = INT32_MAX;
    }
    if (size_to_change != NULL) {
        *size_to_change = INT64_MAX / 1024;
    }
    for (int64_t i = 0; i < n; ++i) {
        fn(i, i + 1, ctx);
    }
}

/* What was checked is what is read. */
static void check_changing_arrays(void) {
    const int64_t H = 1 + any(40), N = 1 + any(4);
    ocs_packed_weight w = any_weight(H, H);
    int32_t *given = new_array(w.S, sizeof *given);
    const float *x = any_floats(2 * N * H);
    float *y[3][2], *h = new_array(N * H, sizeof *h);
    int64_t index[] = {any(H)}, sizes[] = {N, N};
    for (int i = 0; i < 2; ++i) {
        const ocs_packed_weight changing = {w.packed, w.scale, given, w.O, w.C, w.S, w.group, w.bits};
        const ocs_recurrent_layer layer = {.hidden = changing, .kind = OCS_RNN_TANH};
        ocs_set_parallel_for(one_by_one);
        copies_to_change = given, count_to_change = i > 0 ? w.S : 0;
        for (int kind = 0; kind < 3; ++kind) {
            y[kind][i] = new_array(2 * N * H, sizeof(float));
            ocs_copy(given, w.copies, w.S * (int64_t)sizeof *given);
            ocs_status status;
            if (kind == 0) {
                status = ocs_product(y[kind][i], x, NULL, &changing, layer.grid, N, OCS_ROWS_F32);
            } else if (kind == 1) {
                status = ocs_product_rows_f32(y[kind][i], index, &changing, 1);
            } else {
                memset(h, 0, (size_t)(N * H) * sizeof *h);
                size_to_change = i > 0 ? &sizes[1] : NULL;
                status = ocs_recurrent_f32(y[kind][i], h, NULL, x, &layer, sizes, 2 * N, 2, N, false);
            }
            require(status == OCS_OK, "what a call returns");
            require_first((void **)&y[kind][0], y[kind][i], 2 * N * H, i, OCS_ROWS_F32, "what is read once");
        }
    }
    count_to_change = 0, size_to_change = NULL;
}

int main(int count, char **arguments) {
    void (*const checks[])(void) = {check_inner_kernels, check_products, check_recurrent, check_changing_arrays};
    const int times = count > 1 ? atoi(arguments[1]) : 1000;
    for (int i = 0; i < 4 * times; ++i, free_arrays()) {
        ocs_set_parallel_for(any(2) ? one_by_one : NULL);
        checks[i % 4]();
    }
    printf("%d products and layers are those of the plain kernels by", times);
    for (int i = 1; ocs_isa_name(i) != NULL; ++i) {
        printf(" %s", ocs_isa_name(i));
    }
    puts("");
}
