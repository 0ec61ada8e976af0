/* Every entry of ocs.h with hostile sizes, bits, plans, histograms, orders, indices and packed bytes; teams.

   Each call is made once by every instruction set, cut by the host in different ways; statuses and outputs must agree
   bit for bit. Arrays have the sizes they should have; a size replaced by an extreme one must be refused before
   anything is read. `entries 1000` makes so many rounds, `entries 1000 4` in four threads at once, whose host is
   threads too. */
#include "arrays.h"

#include <float.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>

/* --- Hostile arguments ------------------------------------------------------------------------ */

/* The size itself, or one that no array has. */
static int64_t hostile(int64_t size) {
    static const int64_t extremes[] = {-1, INT64_MIN, INT64_MAX, INT64_C(1) << 61, (INT64_C(1) << 62) + 2};
    return any(12) == 0 ? extremes[any(5)] : size;
}

static int any_bits(void) {
    static const int extremes[] = {INT_MIN, -1, 0, 1, 9, 32, 33, INT_MAX};
    return any(8) == 0 ? extremes[any(8)] : 2 + (int)any(7);
}

static float any_limit(void) {
    static const float odd[] = {0.0f, -1.0f, NAN, INFINITY, 1e-45f, FLT_MAX};
    return any(4) == 0 ? odd[any(6)] : 1e-3f * (float)(1 + any(3000));
}

static ocs_scale any_scale(int64_t O) {
    const int64_t stride = any(2), count = stride == 0 ? 1 : O;
    float *value = new_array(count, sizeof *value);
    for (int64_t i = 0; i < count; ++i) {
        value[i] = any(40) == 0 ? any_limit() : 1e-3f * (float)(1 + any(900));
    }
    return (ocs_scale){value, any(20) == 0 ? hostile(2) : stride};
}

static int64_t *any_int64s(int64_t count, int64_t n) {
    int64_t *x = new_array(count, sizeof *x);
    for (int64_t i = 0; i < count; ++i) {
        x[i] = any(30) == 0 ? hostile(n) : any(n);
    }
    return x;
}

static int8_t *any_integers(int64_t count) {
    return (int8_t *)any_bytes(count);
}

/* A weight whose shape and plan may be impossible, but whose arrays have the sizes of a possible one. */
typedef struct {
    ocs_shape shape;
    int64_t N, M, E, all; /* of the possible shape: C K, (C + S) K, G (C + S), O M */
    const float *w;
    int64_t *source;
    int32_t *parts, *offset;
    float *split_max;
    ocs_plan plan;
    ocs_scale scale;
} weight;

static void damage_plan(weight *a) {
    for (int64_t times = a->E > 0 ? any(3) : 0; times > 0; --times) {
        const int64_t at = any(a->E);
        a->source[at] = any(2) ? hostile(any(a->E)) : a->source[at];
        a->parts[at] = any(2) ? (int32_t)any(5) - 1 : any(4) == 0 ? INT32_MAX : a->parts[at];
        a->offset[at] = any(2) ? (int32_t)any(5) - 1 : any(4) == 0 ? INT32_MIN : a->offset[at];
    }
}

static weight any_weight(void) {
    const int64_t G = 1 + any(3), C = any(7), O = G * any(6), K = any(4), S = C > 0 ? any(8) : 0;
    weight a = {.shape = {O == 0 ? 1 : G, O, C, K, S}, .N = C * K, .M = (C + S) * K, .all = O * (C + S) * K};
    a.E = a.shape.G * (C + S);
    a.w = any_floats(O * a.N);
    a.source = new_array(a.E, sizeof *a.source);
    a.parts = new_array(a.E, sizeof *a.parts);
    a.offset = new_array(a.E, sizeof *a.offset);
    a.split_max = new_array(a.E, sizeof *a.split_max);
    float *channel_max = new_array(a.shape.G * C, sizeof *channel_max);
    for (int64_t i = 0; i < a.shape.G * C; ++i) {
        channel_max[i] = (float)any(9);
    }
    ocs_split_plan(a.source, a.parts, a.offset, a.split_max, channel_max, a.shape.G, C, S, any(2));
    if (any(3) == 0) {
        damage_plan(&a);
    }
    a.plan = (ocs_plan){a.source, a.parts, a.offset};
    a.scale = any_scale(O);
    int64_t *sizes[] = {&a.shape.G, &a.shape.O, &a.shape.C, &a.shape.K, &a.shape.S}, *size = sizes[any(5)];
    *size = any(3) == 0 ? hostile(*size) : *size;
    return a;
}

/* --- What is compared ------------------------------------------------------------------------- */

static _Thread_local uint64_t digest;

static void record(const void *x, int64_t count, size_t size) {
    for (int64_t i = 0; i < count * (int64_t)size; ++i) {
        digest = (digest ^ ((const uint8_t *)x)[i]) * UINT64_C(1099511628211);
    }
}

/* Outputs count where there are any. */
static void record_if_ok(ocs_status status, const void *x, int64_t count, size_t size) {
    record(&status, 1, sizeof status);
    record(x, status == OCS_OK ? count : 0, size);
}

/* --- Arrays ----------------------------------------------------------------------------------- */

static void check_abs_max(void) {
    const int64_t N = any(70);
    const float *x = any_floats(N), max = ocs_abs_max_f32(x, any(9) == 0 ? -N : N);
    record(&max, 1, sizeof max);
}

static void check_histogram(void) {
    const int64_t N = any(4) == 0 ? any(3000) : any(300), bins = 1 + any(200), both = 2 * bins + 1;
    int64_t *counts = new_array(bins, sizeof *counts), *of_both = new_array(both, sizeof *of_both);
    const float *x = any_floats(N), limit = any_limit();
    record_if_ok(ocs_histogram_f32(counts, x, hostile(N), hostile(bins), limit), counts, bins, sizeof *counts);
    record_if_ok(ocs_signed_histogram_f32(of_both, x, hostile(N), hostile(bins), limit), of_both, both,
                 sizeof *of_both);
}

static void check_octave_histogram(void) {
    const int64_t N = any(9), C = any(5), K = any(9);
    int64_t *counts = new_array(C * OCS_OCTAVE_BINS, sizeof *counts);
    const float *x = any_floats(N * C * K), limit = any(3) == 0 ? any_limit() : ldexpf(1.0f, (int)any(239) - 111);
    const ocs_status status = ocs_octave_histogram_f32(counts, x, hostile(N), hostile(C), hostile(K), limit);
    record_if_ok(status, counts, C * OCS_OCTAVE_BINS, sizeof *counts);
}

/* Floats around the ties of a grid, where a quotient must not be wrong in its last place. */
static void move_to_ties(float *x, int64_t N, float scale) {
    const int64_t moved = any(2) ? N : 0;
    for (int64_t i = 0; i < moved; ++i) {
        uint32_t bits;
        const float tie = (float)(((double)any(514) - 256.5) * scale);
        memcpy(&bits, &tie, sizeof bits);
        bits += (uint32_t)any(5) - 2;
        memcpy(&x[i], &bits, sizeof bits);
    }
}

static void check_quantize(void) {
    const int64_t N = any(90);
    const float scale = any(2) ? any_limit() : 1e-3f * (float)(1 + any(1 << 20));
    float *x = any_floats(N);
    move_to_ties(x, N, scale);
    uint8_t *q = new_array(N, 1);
    float *x_hat = new_array(N, sizeof *x_hat);
    const int bits = any_bits();
    const bool is_signed = any(2);
    record_if_ok(ocs_quantize_f32(q, x, hostile(N), scale, bits, is_signed), q, N, 1);
    record_if_ok(ocs_fake_quantize_f32(x_hat, x, hostile(N), scale, bits, is_signed), x_hat, N, sizeof *x_hat);
}

static void check_dequantize(void) {
    const int64_t O = any(9), N = any(40), stride = N + any(3);
    float *x = new_array(O * N, sizeof *x);
    const uint8_t *q = any_bytes(O * stride);
    const ocs_scale scale = any_scale(O);
    const ocs_status status = ocs_dequantize_f32(x, q, scale, hostile(O), hostile(N), hostile(stride), any(2));
    record_if_ok(status, x, O * N, sizeof *x);
}

static void check_pack(void) {
    const int64_t N = any(90), given = hostile(N);
    const int bits = any_bits();
    const int64_t bytes = ocs_packed_bytes(N, bits), of_given = ocs_packed_bytes(given, bits);
    record(&of_given, 1, sizeof of_given);
    uint8_t *packed = new_array(bytes, 1);
    int8_t *q = new_array(N, 1), *integers = any_integers(N);
    for (int64_t i = 0; i < N && any(20) > 0; ++i) {
        integers[i] = (int8_t)(integers[i] % (ocs_qmax(bits) + 1));
    }
    const ocs_status status = ocs_pack_i8(packed, integers, given, bits);
    record_if_ok(status, packed, bytes, 1);
    const uint8_t *any_packed = any_bytes(bytes);
    record_if_ok(ocs_unpack_i8(q, status != OCS_OK || any(2) ? any_packed : packed, given, bits), q, N, 1);
}

static void check_small(void) {
    const int32_t qmax = ocs_qmax(any_bits());
    const ocs_status bits = ocs_check_bits(hostile(any(12)));
    const int64_t method = hostile(any(11)), gates = ocs_cell_gates((ocs_cell_kind)any(6));
    const char *name = ocs_clip_name(method), *text = ocs_status_text((ocs_status)any(20));
    const bool takes_values = ocs_clip_takes_values(method), refused = ocs_set_isa("none") == OCS_BAD_ISA;
    record(&qmax, 1, sizeof qmax);
    record(&bits, 1, sizeof bits);
    record(&gates, 1, sizeof gates);
    record(name, name != NULL ? (int64_t)strlen(name) : 0, 1);
    record(text, (int64_t)strlen(text), 1);
    record((bool[]){takes_values, refused, ocs_isa() != NULL}, 3, sizeof(bool));
}

/* --- Weights ---------------------------------------------------------------------------------- */

static void check_channel_max(void) {
    const weight a = any_weight();
    const int64_t channels = a.shape.G < 0 || a.shape.C < 0 ? 0 : a.E;
    float *max = new_array(a.E, sizeof *max);
    record_if_ok(ocs_channel_max_f32(max, a.w, &a.shape), max, channels, sizeof *max);
}

static void check_split_plan(void) {
    const weight a = any_weight();
    const float *channel_max = any_floats(a.E);
    const ocs_status status =
        ocs_split_plan(a.source, a.parts, a.offset, a.split_max, channel_max, a.shape.G, a.shape.C, a.shape.S, any(2));
    record_if_ok(status, a.source, a.E, sizeof *a.source);
    record_if_ok(status, a.parts, a.E, sizeof *a.parts);
    record_if_ok(status, a.offset, a.E, sizeof *a.offset);
    record_if_ok(status, a.split_max, a.E, sizeof *a.split_max);
}

static void check_split_weights(void) {
    const weight a = any_weight();
    const int64_t O = a.N > 0 ? a.all / a.M : any(2) ? a.shape.O : 0, bins = 1 + any(60);
    const int64_t outputs = O < 0 || O > 99 ? 0 : O, given = any(2) ? 1 : a.shape.O, R = given == 1 ? 1 : outputs;
    float *max = new_array(99, sizeof *max), *limit = new_array(99, sizeof *limit);
    for (int64_t i = 0; i < 99; ++i) {
        limit[i] = any(60) == 0 ? any_limit() : 1e-2f * (float)any(200);
    }
    int64_t *counts = new_array(99 * bins, sizeof *counts);
    record_if_ok(ocs_output_max_f32(max, a.w, &a.plan, &a.shape), max, outputs, sizeof *max);
    const ocs_status status =
        ocs_split_histogram_f32(counts, a.w, &a.plan, &a.shape, hostile(given), hostile(bins), limit);
    record_if_ok(status, counts, R * bins, sizeof *counts);
}

static void check_rounding(void) {
    const weight a = any_weight();
    const int bits = any_bits();
    int8_t *ints = new_array(a.all, 1), *compensated = new_array(a.all, 1);
    record_if_ok(ocs_quantize_weight_f32(ints, a.w, &a.plan, a.scale, &a.shape, bits, any(2)), ints, a.all, 1);
    record_if_ok(ocs_squant_weight_f32(compensated, a.w, &a.plan, a.scale, &a.shape, bits), compensated, a.all, 1);
}

static void check_gptq(void) {
    const weight a = any_weight();
    const int64_t L = 1 + any(6), columns = (a.N + L - 1) / L * L, G = a.E > 0 ? 3 : 0;
    int64_t *order = new_array(G * columns, sizeof *order);
    for (int64_t i = 0; i < G * columns; ++i) {
        order[i] = any(300) == 0 ? hostile(0) : columns - 1 - i % columns;
    }
    int8_t *ints = new_array(a.all, 1);
    double *error = new_array(99, sizeof *error);
    const float *factor = any_floats(G * columns * L);
    const ocs_status status = ocs_gptq_weight_f32(ints, error, a.w, order, factor, &a.plan, a.scale, &a.shape,
                                                  any(9) == 0 ? any(2) * hostile(L) : L, any_bits());
    record_if_ok(status, ints, a.all, 1);
    record_if_ok(status, error, a.M > 0 ? a.all / a.M : 0, sizeof *error);
}

static void check_fold(void) {
    const weight a = any_weight();
    const int8_t *ints = any_integers(a.all);
    const int64_t outputs = a.M > 0 ? a.all / a.M : 0;
    float *w_hat = new_array(outputs * a.N, sizeof *w_hat);
    double error[2], *output_error = new_array(99, sizeof *output_error);
    const ocs_status status = ocs_fold_f32(w_hat, ints, a.source, a.scale, &a.shape);
    record_if_ok(status, w_hat, outputs * a.N, sizeof *w_hat);
    record_if_ok(ocs_weight_error_f32(error, a.w, ints, a.source, a.scale, &a.shape), error, 2, sizeof *error);
    record_if_ok(ocs_output_error_f32(output_error, a.w, ints, a.source, a.scale, &a.shape, any_limit()), output_error,
                 outputs, sizeof *output_error);
}

/* --- Thresholds ------------------------------------------------------------------------------- */

static void check_clip(void) {
    const int64_t R = any(4), bins = 1 + any(60), most = any(3) == 0 ? INT64_C(1) << 40 : 50;
    const int64_t *counts = any_int64s(R * bins, most);
    float *threshold = new_array(R, sizeof *threshold), *limit = new_array(R, sizeof *limit);
    for (int64_t r = 0; r < R; ++r) {
        limit[r] = any_limit();
    }
    const ocs_clip method = (ocs_clip)any(11);
    const bool is_signed = any(2);
    record_if_ok(
        ocs_clip_threshold_f32(threshold, counts, limit, hostile(R), hostile(bins), any_bits(), is_signed, method),
        threshold, R, sizeof *threshold);
}

static void check_release(void) {
    const int64_t R = any(3), N = any(50);
    const int64_t *counts = any(2) ? any_int64s(R * N, 9) : NULL;
    const float *x = any_floats(R * N);
    float *threshold = new_array(R, sizeof *threshold);
    const ocs_clip method =
        any(3) ? (ocs_clip[]){OCS_CLIP_MSE_RELEASE, OCS_CLIP_ACIQ_RELEASE}[any(2)] : (ocs_clip)any(11);
    const ocs_status status =
        ocs_release_threshold_f32(threshold, x, counts, hostile(R), hostile(N), any_bits(), any(2), method);
    record_if_ok(status, threshold, R, sizeof *threshold);
}

/* --- Packed weights; what is possible is in products.c ----------------------------------------- */

static void check_tiles(void) {
    const int64_t O = any(40), E = any(70);
    const int bits = any_bits();
    const int64_t bytes = ocs_product_bytes(O, E, bits), of_given = ocs_product_bytes(hostile(O), hostile(E), bits);
    record(&of_given, 1, sizeof of_given);
    uint8_t *packed = new_array(bytes, 1);
    int8_t *q = new_array(O * E, 1), *integers = any_integers(O * E);
    for (int64_t i = 0; i < O * E && any(99) > 0; ++i) {
        integers[i] = (int8_t)(integers[i] % (ocs_qmax(bits) + 1));
    }
    record_if_ok(ocs_product_pack_i8(packed, integers, hostile(O), hostile(E), bits), packed, bytes, 1);
    record_if_ok(ocs_product_unpack_i8(q, any(3) ? packed : any_bytes(bytes), hostile(O), hostile(E), bits), q, O * E,
                 1);
}

static ocs_packed_weight any_packed(int64_t O, int64_t C) {
    const int64_t S = C > 0 ? any(5) : 0, group = 32 * any(3), groups = group ? ocs_ceil_div(C + S, group) : 1;
    const int64_t scales = ocs_ceil_div(O, 16) * 16 * groups; /* enough for any other group, too */
    const int bits = any_bits();
    int32_t *copies = new_array(S, sizeof *copies);
    for (int64_t i = 0; i < S; ++i) {
        copies[i] = any(20) == 0 ? (int32_t)(any(2) * INT32_MAX) - 1 : (int32_t)any(C);
    }
    ocs_packed_weight w = {
        any_bytes(ocs_product_bytes(O, C + S, bits)), any_scale(scales), copies, O, C, S, group, bits};
    int64_t *sizes[] = {&w.O, &w.C, &w.S, &w.group}, *size = sizes[any(4)];
    *size = any(4) == 0 ? hostile(*size) : *size;
    return w;
}

/* Bits of outputs; any NaN counts as any other. */
static void record_floats(ocs_status status, float *x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        x[i] = isnan(x[i]) ? NAN : x[i];
    }
    record_if_ok(status, x, count, sizeof *x);
}

static void check_product(void) {
    const int64_t O = any(40), C = any(70), R = any(20);
    const ocs_packed_weight w = any_packed(O, C);
    const ocs_row_grid grid = {any(2) ? 0 : any_bits(), any(3) > 0, any(2) ? 0.0f : any_limit()};
    const float *x = any_floats(R * C), *bias = any(2) ? any_floats(O) : NULL;
    float *y = new_array(R * O, sizeof *y), *rows = new_array(R * C, sizeof *rows);
    const int64_t *index = any_int64s(R, O > 0 ? O : 1);
    const ocs_row_dtype dtype = any(20) == 0 ? (ocs_row_dtype)hostile(2) : OCS_ROWS_F32;
    record_floats(ocs_product(y, x, bias, &w, grid, hostile(R), dtype), y, R * O);
    record_floats(ocs_product_rows_f32(rows, index, &w, hostile(R)), rows, R * C);
}

static void check_recurrent(void) {
    const ocs_cell_kind kind = (ocs_cell_kind)any(4);
    const bool projects = any(4) == 0;
    const int64_t H = any(20), P = projects ? any(20) : H, N = any(9), gates = ocs_cell_gates(kind) * H;
    const ocs_packed_weight projection = any_packed(P, H);
    const ocs_recurrent_layer layer = {.hidden = any_packed(gates, P),
                                       .bias = any(2) ? any_floats(gates) : NULL,
                                       .projection = projects ? &projection : NULL,
                                       .grid = {any(2) ? 0 : any_bits(), true, 0.0f},
                                       .kind = any(20) == 0 ? (ocs_cell_kind)hostile(4) : kind};
    int64_t sizes[] = {N, any(N + 1), 0};
    sizes[2] = any(20) == 0 ? hostile(N) : any(sizes[1] + 1);
    const int64_t R = N + sizes[1] + any(2) * (sizes[2] > 0 && sizes[2] <= N ? sizes[2] : 0);
    const float *from_x = any_floats(3 * N * gates);
    float *y = any_floats(3 * N * P), *h = any_floats(N * P), *c = any_floats(N * H);
    const ocs_status status =
        ocs_recurrent_f32(y, h, c, from_x, &layer, sizes, hostile(R), hostile(3), hostile(N), any(2));
    record_floats(status, y, R * P <= 3 * N * P ? R * P : 0);
    record_floats(status, h, N * P);
}

/* Sums of neighbours, again and again. */
typedef struct {
    uint32_t *last, *next; /* [n] */
    int64_t n, steps;
} neighbours;

static void add_neighbours(ocs_range *range) {
    const neighbours *row = range->ctx;
    for (int64_t i = range->begin; i < range->end; ++i) {
        row->next[i] = row->last[i] + 3 * row->last[(i + 1) % row->n];
    }
}

static ocs_status add_all(ocs_member *member, void *ctx) {
    neighbours row = *(const neighbours *)ctx;
    for (int64_t step = 0; step < row.steps; ++step) {
        OCS_TRY(ocs_parallel_in(member, step % 3 == 2 ? 0 : row.n, 1 + step % 4 * 20, 8, add_neighbours, &row));
        uint32_t *last = row.last;
        row.last = row.next, row.next = last;
    }
    return OCS_OK;
}

/* A team computes what one thread does. */
static void check_team(void) {
    const int64_t n = 1 + any(90), bytes = n * (int64_t)sizeof(uint32_t);
    neighbours team = {new_array(n, 4), new_array(n, 4), n, any(60)}, alone = team;
    alone.last = new_array(n, 4), alone.next = new_array(n, 4);
    for (int64_t i = 0; i < n; ++i) {
        team.last[i] = alone.last[i] = (uint32_t)any(1000);
    }
    const ocs_status status = ocs_with_team(any(2) * 20 * OCS_GRAIN, add_all, &team);
    if (status != add_all(NULL, &alone) || memcmp(team.last, alone.last, (size_t)bytes) != 0 ||
        memcmp(team.next, alone.next, (size_t)bytes) != 0) {
        printf("a team of the host's threads does not compute what one thread does\n");
        exit(1);
    }
    record(team.last, n, sizeof *team.last);
}

/* --- All of them, by every instruction set and in threads -------------------------------------- */

static const struct {
    const char *name;
    void (*check)(void);
} checks[] = {
#define CHECK(name) {#name, check_##name}
    CHECK(abs_max),       CHECK(histogram),   CHECK(octave_histogram),
    CHECK(quantize),      CHECK(dequantize),  CHECK(pack),
    CHECK(small),         CHECK(channel_max), CHECK(split_plan),
    CHECK(split_weights), CHECK(rounding),    CHECK(gptq),
    CHECK(fold),          CHECK(clip),        CHECK(release),
    CHECK(tiles),         CHECK(product),     CHECK(recurrent),
    CHECK(team),
};
enum { CHECKS = sizeof checks / sizeof checks[0] };

static void one_by_one(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx) {
    (void)grain;
    for (int64_t i = 0; i < n; ++i) {
        fn(i, i + 1, ctx);
    }
}

typedef struct {
    int64_t begin, end;
    ocs_range_fn fn;
    void *ctx;
} piece;

static void *run_piece(void *of) {
    const piece *p = of;
    p->fn(p->begin, p->end, p->ctx);
    return NULL;
}

/* Two halves, one of them in a thread of its own. */
static void in_threads(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx) {
    (void)grain;
    piece half[] = {{0, n / 2, fn, ctx}, {n / 2, n, fn, ctx}};
    pthread_t thread;
    const bool started = n > 1 && pthread_create(&thread, NULL, run_piece, &half[0]) == 0;
    if (!started && n > 1) {
        run_piece(&half[0]);
    }
    run_piece(&half[1]);
    if (started) {
        pthread_join(thread, NULL);
    }
}

static int rounds = 1000, threads = 1;

static void *run_checks(void *number) {
    uint64_t next = (uint64_t)(uintptr_t)number;
    for (int i = 0; i < rounds * CHECKS; ++i) {
        const uint64_t start = next;
        uint64_t first = 0;
        for (int set = 0; ocs_isa_name(set) != NULL; ++set) {
            ocs_set_isa(ocs_isa_name(set));
            if (threads == 1) {
                ocs_set_parallel_for(set % 2 == 0 ? NULL : one_by_one);
            }
            seed = start, digest = 0;
            checks[i % CHECKS].check();
            next = seed;
            free_arrays();
            first = set == 0 ? digest : first;
            if (digest != first) {
                printf("%s by %s is not that of the plain kernels: round %d\n", checks[i % CHECKS].name,
                       ocs_isa_name(set), i / CHECKS);
                exit(1);
            }
        }
    }
    return NULL;
}

int main(int count, char **arguments) {
    rounds = count > 1 ? atoi(arguments[1]) : rounds;
    threads = count > 2 ? atoi(arguments[2]) : threads;
    ocs_set_parallel_for(threads > 1 ? in_threads : NULL);
    pthread_t started[16];
    for (int i = 0; i < threads && i < 16; ++i) {
        if (pthread_create(&started[i], NULL, run_checks, (void *)(uintptr_t)(i + 1)) != 0) {
            return 1;
        }
    }
    for (int i = 0; i < threads && i < 16; ++i) {
        pthread_join(started[i], NULL);
    }
    printf("%d hostile calls of every entry: refused, or those of the plain kernels\n", rounds * threads);
}
