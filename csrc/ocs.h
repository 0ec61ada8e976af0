/* ocs: outlier channel splitting and linear quantization on float32 arrays.
 *
 * Zhao et al., "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting", ICML 2019,
 * arXiv 1901.09504 ("the paper"). This header is the whole C API; it knows neither Python nor torch.
 *
 *     ocs_shape shape = {.G = 1, .O = O, .C = C, .K = K, .S = S};
 *     ocs_channel_max_f32(channel_max, w, &shape);                            where the outliers are
 *     ocs_split_plan(source, parts, offset, split_max, channel_max, 1, C, S, false);   which channels to split
 *     ocs_plan plan = {source, parts, offset};
 *     float step = ocs_abs_max_f32(split_max, C + S) / ocs_qmax(bits);
 *     ocs_scale scale = {&step, 0};                                           one for all output channels
 *     ocs_quantize_weight_f32(ints, w, &plan, scale, &shape, bits, true);
 *     ocs_fold_f32(w_hat, ints, source, scale, &shape);                       what the integers stand for
 *
 * Shapes. A weight is [O, C, K], C-contiguous; all sizes may be 0.
 *     G  groups of a grouped convolution, 1 otherwise; divides O
 *     O  output channels, of all groups together
 *     C  input channels of one group
 *     K  elements of one filter (height x width; 1 for a linear layer)
 *     S  splits, hence copies, in one group (n = ceil(r C) in the paper)
 *     N  elements of a plain array
 *     R  rows: vectors that a weight is multiplied with
 * An expanded weight is [O, C + S, K]: each group's own channels, then its copies. Channel numbers in `source` count
 * over all groups: group g owns channels gC .. gC + C - 1 and the expanded channels g(C + S) .. (g + 1)(C + S) - 1.
 *
 * Numbers. k bits are the integers -qmax .. qmax, qmax = 2^(k-1) - 1, or 0 .. 2^k - 1 where unsigned; x^ = q * scale.
 * x / scale is a true division, rounded once to float32; all that decides an integer after it is exact. The results do
 * not depend on the instruction set or on the number of threads. No input is written to; outputs must not overlap them.
 *
 * Threads. An entry cuts its work by the host's parallel_for; see ocs_set_parallel_for.
 *
 * Limits and names that others need too (Python has them as constants of ocs._C) are written here and nowhere else.
 */
#ifndef OCS_H
#define OCS_H

#include <stdbool.h>
#include <stdint.h>

/* GCC and Clang say what they compile for. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ocs needs a little-endian processor: packed weights and saved files have their low bytes first"
#endif
#if UINTPTR_MAX < UINT64_MAX
#error "ocs needs a 64-bit processor: sizes of arrays are 64-bit numbers"
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define OCS_MIN_BITS 2
#define OCS_MAX_BITS 8
#define OCS_MAX_DEPTH 22              /* how often a channel can be halved: keeps all that follows inside 32 bits */
#define OCS_MAX_PARTS (1 << 22)       /* of a channel, for the same reason */
#define OCS_MAX_BINS (1 << 24)        /* of a histogram: float32 tells no more of them apart */
#define OCS_MAX_SEARCH_BINS (1 << 16) /* of one that is searched: beyond, sums of squared positions cancel too much */
#define OCS_MAX_ELEMENTS (INT64_C(1) << 48) /* of any array, and of any size: bytes then fit 64 bits */
#define OCS_OCTAVES 16                      /* of a logarithmic histogram */
#define OCS_OCTAVE_BINS (8 * OCS_OCTAVES)

typedef enum {
    OCS_OK = 0,
    OCS_NO_MEMORY,  /* scratch memory could not be allocated */
    OCS_BAD_BITS,   /* bits outside OCS_MIN_BITS .. OCS_MAX_BITS */
    OCS_BAD_SCALE,  /* a scale that is not a positive finite number */
    OCS_BAD_BINS,   /* bins outside 1 .. OCS_MAX_BINS, a negative count, or a limit that is negative or not finite */
    OCS_BAD_LIMIT,  /* a limit that is no power of two, or below 2^-110 */
    OCS_BAD_SHAPE,  /* a negative size, G that does not divide O or exceeds it, or splits without channels */
    OCS_BAD_PLAN,   /* source, parts or offset that no split plan of this shape has */
    OCS_NOT_FINITE, /* NaN or Inf where a maximum is expected */
    OCS_BAD_ORDER,  /* an order of columns that leaves one out */
    OCS_TOO_LARGE,  /* more than OCS_MAX_ELEMENTS, an output channel of 2^31 or more weights, or a channel split into
                       more than OCS_MAX_PARTS */
    OCS_BAD_CODE,   /* an integer outside -qmax .. qmax, or bits beyond the last packed one */
    OCS_BAD_METHOD, /* a clip method, kind of cell or type of rows that there is not */
    OCS_BAD_ISA,    /* an instruction set that this build or CPU does not have */
    OCS_BAD_GROUP,  /* a group of channels that is no multiple of 32 */
    OCS_BAD_INDEX,  /* an index of a row that there is not */
} ocs_status;

/* One sentence for a status, without a full stop. */
const char *ocs_status_text(ocs_status status);

/* --- Host ------------------------------------------------------------------------------------- */

/* A piece of work: items begin .. end - 1 of what ctx describes. */
typedef void (*ocs_range_fn)(int64_t begin, int64_t end, void *ctx);

/* Runs fn over 0 .. n - 1 in disjoint ranges of at least `grain` items (the last may be smaller), possibly at once.
   Set it before the first call of an entry; without it, entries run serially. */
typedef void (*ocs_parallel_for_fn)(int64_t n, int64_t grain, ocs_range_fn fn, void *ctx);
void ocs_set_parallel_for(ocs_parallel_for_fn parallel_for);

/* The instruction sets that this build and CPU have: number i, the plain "ref" first, the best last, then NULL. */
const char *ocs_isa_name(int i);

/* The one in use: the best, unless set. */
const char *ocs_isa(void);

/* Chooses one by name; "auto" takes the best. OCS_BAD_ISA changes nothing. */
ocs_status ocs_set_isa(const char *name);

/* --- Where the outliers are (histogram.c) ----------------------------------------------------- */

/* The sizes of a weight and of its expansion, as at the top. */
typedef struct {
    int64_t G, O, C, K, S;
} ocs_shape;

/* max |x|; 0 for N = 0. NaN or Inf in x gives NaN or Inf. */
float ocs_abs_max_f32(const float *x, int64_t N);

/* counts[i] of the |x| in [i, i + 1) * limit / bins, all that is beyond in the last bin.

   The bin of x is floor(|x| / limit * bins), each step rounded to float32. limit = 0 puts everything into the first
   bin; NaN counts as beyond the limit. */
ocs_status ocs_histogram_f32(int64_t *counts, const float *x, int64_t N, int64_t bins, float limit);

/* counts [2 bins + 1]: of the x in each bin over [-limit, limit], those that are no normal number (0, or |x| < 2^-126)
   in the middle; x > 0 is as many bins above it, x < 0 below it, as ocs_histogram_f32 says of |x|, plus 1. limit = 0
   puts everything into the middle. */
ocs_status ocs_signed_histogram_f32(int64_t *counts, const float *x, int64_t N, int64_t bins, float limit);

/* counts [C, OCS_OCTAVE_BINS]: of each channel, the |x| of x [N, C, K] by size, on a logarithmic scale below limit.

   Eight bins to the octave, of equal width within it; all that is below the last of OCS_OCTAVES is in the first bin.
   limit must be a power of two above every |x|, 2^-110 at least: doubling it moves every count eight bins down, so that
   histograms over different limits add up. NaN counts into the last bin. */
ocs_status ocs_octave_histogram_f32(int64_t *counts, const float *x, int64_t N, int64_t C, int64_t K, float limit);

/* channel_max [G C]: max |w| of each input channel; NaN or Inf in a channel gives NaN or Inf there. */
ocs_status ocs_channel_max_f32(float *channel_max, const float *w, const ocs_shape *shape);

/* --- Which channels to split (split.c), section 3 --------------------------------------------- */

/* A split plan; every array is [G (C + S)], over expanded channels.

   source: the original channel. parts n: how many like this one make it up, so that its weights are about w / n; 2^m
   after m halvings. offset i in 0 .. n - 1: which of the n parts it is in quantization-aware splitting. */
typedef struct {
    const int64_t *source;
    const int32_t *parts;
    const int32_t *offset;
} ocs_plan;

/* Fills a plan's arrays and split_max [G (C + S)], the max |w| of each expanded channel, from channel_max [G C].

   In each group, S times: the channel with the largest maximum (copies included, lowest index on ties) is halved into
   itself and a copy at the end, or copied as it is where its maximum is 0. Where even, the original channel whose parts
   have the largest maximum gets one part more at the end, and all of its parts are equal: channel_max / n, offsets
   0 .. n - 1 in order. O(S log C). */
ocs_status ocs_split_plan(int64_t *source, int32_t *parts, int32_t *offset, float *split_max, const float *channel_max,
                          int64_t G, int64_t C, int64_t S, bool even);

/* output_max [O]: max |w| of each output channel after splitting, for one threshold per output channel. */
ocs_status ocs_output_max_f32(float *output_max, const float *w, const ocs_plan *plan, const ocs_shape *shape);

/* counts [R, bins]: the histogram of |w| after splitting over [0, limit], of the whole weight (R = 1) or of each output
   channel (R = O, limit [O]), as ocs_histogram_f32 counts. A copy that is one of n parts counts as w / n; zeros, which
   are on every grid, do not count. */
ocs_status ocs_split_histogram_f32(int64_t *counts, const float *w, const ocs_plan *plan, const ocs_shape *shape,
                                   int64_t R, int64_t bins, const float *limit);

/* --- Where to clip (clip.c, clip_release.c), sections 2.1 and 4 ------------------------------- */

typedef enum {
    OCS_CLIP_MSE,          /* least squared error after rounding: every bin edge, refined around the best */
    OCS_CLIP_ACIQ,         /* the optimum for the likelier of a Gaussian and a Laplace distribution */
    OCS_CLIP_ACIQ_RELEASE, /* as the paper's release computes it, for its tables, from the values themselves */
    OCS_CLIP_KL,           /* least Kullback-Leibler divergence of the rounded from the clipped distribution */
    OCS_CLIP_PERCENTILE,   /* 99.99 % of the values at 8 bits, 99.9 % at 4, 1 - 10^-(2 + bits / 4) at any */
    OCS_CLIP_STD,          /* (k + 1) / 2 root mean squares, k = bits, or bits + 1 where not is_signed */
    OCS_CLIP_SAWB,         /* a linear function of root mean square and mean |x|; good up to 5 bits */
    OCS_CLIP_MSE_RELEASE,  /* both as the paper's release does */
    OCS_CLIP_KL_RELEASE,
} ocs_clip;

/* "mse", "aciq", "aciq-release" ...: the method's name in Python; NULL where there is no such method. */
const char *ocs_clip_name(int64_t method);

/* Whether ocs_release_threshold_f32 finds it, from values; the others are searched in a histogram of |x|. */
bool ocs_clip_takes_values(int64_t method);

/* threshold [R] in (0, limit], from R histograms of |x|: counts [R, bins] over [0, limit [R]].

   The grid to come is -qmax .. qmax, or 0 .. 2^bits - 1 where not is_signed. A histogram without values, or with limit
   0, gives its limit. O(bins qmax) at most for each. */
ocs_status ocs_clip_threshold_f32(float *threshold, const int64_t *counts, const float *limit, int64_t R, int64_t bins,
                                  int bits, bool is_signed, ocs_clip method);

/* threshold [R] of x [R, N] as the paper's release finds it; counts [R, N]: how often each value is there, NULL: once.

   k = bits, or bits + 1 where not is_signed; n = 2^k - 1, a = max |x|, M values. The error of t is, over the bins of a
   histogram with centers c, the sum of (|c| - t)^2 where |c| > t, and of (c - c^)^2 where not, with c^ = q t / Q,
   q = round_half_even(c Q / t) clamped to -Q - 1 .. Q, Q = 2^(k - 1) - 1. Bins are those of numpy.histogram.
   mse: of 0.01 a, 0.02 a .. 0.99 a the first with the least error, in 201 bins over min .. max.
   aciq: Gaussian constants times (max - min) 0.175 (1 + sqrt(pi ln 4)) / sqrt(2 ln M), or Laplace ones times
       mean |x - mean x|; the first where its error is smaller, in 101 bins over -a .. a. It may exceed a.
   kl: 1,001 bins over -a .. a. For i = n / 2 .. 500, p is the middle 2 i + 1 bins h with all that is outside added to
       its ends; q merges (2 i + 1) / n bins of h into each of n levels, the rest into the last, and spreads each evenly
       over its non-zero bins, the last bin left out. In both each zero becomes 1e-4, taken evenly from the others. The
       right end of the first i with the least divergence of the normalized p from q, infinite where q is zero.
   Without a positive threshold, as aciq has none for a constant, it is a. OCS_NOT_FINITE: x holds NaN or Inf. */
ocs_status ocs_release_threshold_f32(float *threshold, const float *x, const int64_t *counts, int64_t R, int64_t N,
                                     int bits, bool is_signed, ocs_clip method);

/* --- Weights to integers and back (quantize.c) ------------------------------------------------ */

/* 2^(bits - 1) - 1: 1 at 2 bits, 127 at 8; 0 for bits outside 1 .. 31. */
int32_t ocs_qmax(int bits);

/* OCS_BAD_BITS where there is no such grid. */
ocs_status ocs_check_bits(int64_t bits);

/* Steps between grid points: one for all output channels (stride 0), or one for each (stride 1). */
typedef struct {
    const float *value;
    int64_t stride;
} ocs_scale;

/* ints [O, C + S, K] of the split weight, in [-qmax, qmax].

   In grid units u = w / scale, part i of n is (u + 1/2 + i) / n - 1/2 where quantization_aware, u / n where not, and
   rounds as floor(v + 1/2). The former are what halving gives, (u - 1/2) / 2 and (u + 1/2) / 2, again and again; the
   n of them that make up a channel add up to floor(u + 1/2) (Hermite) while none saturates. */
ocs_status ocs_quantize_weight_f32(int8_t *ints, const float *w, const ocs_plan *plan, ocs_scale scale,
                                   const ocs_shape *shape, int bits, bool quantization_aware);

/* ints [O, C + S, K] of quantization-aware splits, moved so that rounding errors cancel (squant.c; SQuant, ICLR 2022).

   T is the sum of the integers of a channel and its copies, its error T - w / scale in grid steps (cut off below 2^-24,
   at most 64). A candidate is an element whose error has the sign of the error that is to be reduced, and whose T,
   moved a step against it, can be split into parts in [-qmax, qmax]. For each output channel:
   1. in each filter whose errors sum to e, the floor(|e| + 1/2) candidates with the largest errors move (K > 1);
   2. of all filters, whose errors sum to E then, floor(|E| + 1/2) move one more element: those that have the sign of E
      and a candidate, with the largest |e|; in each the candidate with the largest error.
   Lowest index on ties; fewer where there are not enough. Where nothing saturates, every error stays below 1, those of
   filters too, and those of output channels end within 1/2. Saturated elements stay as they are. */
ocs_status ocs_squant_weight_f32(int8_t *ints, const float *w, const ocs_plan *plan, ocs_scale scale,
                                 const ocs_shape *shape, int bits);

/* ints [O, C + S, K], quantization-aware (gptq.c): column by column, what rounding one does to the outputs is
   compensated in those of its block that follow. The N = C K columns of each group are in B = ceil(N / L) blocks of L
   columns, of which those beyond N do not exist; order [G, B L] has each of the numbers 0 .. B L - 1 once, a block's in
   its place; factor [G B, L, L]: where H = E[x x^T] of a block in that order is U U^T, U upper triangular, factor[j][i]
   is U_ij / U_jj for i < j and factor[j][j] is U_jj^2; the rest is not read. error [O]: d H d^T for each row
   d = w_hat - w, as the blocks' H say. OCS_BAD_ORDER: order is not such. */
ocs_status ocs_gptq_weight_f32(int8_t *ints, double *error, const float *w, const int64_t *order, const float *factor,
                               const ocs_plan *plan, ocs_scale scale, const ocs_shape *shape, int64_t L, int bits);

/* w_hat [O, C, K] = scale * (sum of the integers of a channel and its copies): what the expanded weight computes. */
ocs_status ocs_fold_f32(float *w_hat, const int8_t *ints, const int64_t *source, ocs_scale scale,
                        const ocs_shape *shape);

/* error[0] = sum of w^2, error[1] = sum of (w - w_hat)^2 with ocs_fold_f32's w_hat; in double, in a fixed order; every
   NaN is NAN. */
ocs_status ocs_weight_error_f32(double error[2], const float *w, const int8_t *ints, const int64_t *source,
                                ocs_scale scale, const ocs_shape *shape);

/* error [O]: an estimate of how far each output is off, without inputs. With rows d = w_hat - w and w it is

       q(d) + gain q(w) (sum d w / sum w^2)^2,   q(v) = (sum v^2 + sum_c (sum_k v)^2 + (sum_ck v)^2) / 3:

   v^T E[x x^T] v for inputs of which E[x^2] = 1, a third of it the squared mean, a third common to the K inputs of a
   filter. gain: how much more a change of the output's gain weighs, the number of layers that it multiplies through. */
ocs_status ocs_output_error_f32(double *error, const float *w, const int8_t *ints, const int64_t *source,
                                ocs_scale scale, const ocs_shape *shape, double gain);

/* --- Any array to the grid and back (quantize.c) ---------------------------------------------- */

/* q = clamp(round_half_even(x / scale)); int8 where is_signed, else uint8. NaN gives 0. */
ocs_status ocs_quantize_f32(void *q, const float *x, int64_t N, float scale, int bits, bool is_signed);

/* x [O, N] = q * scale, q int8 where is_signed, else uint8. A row of q starts q_stride elements after the one before.
 */
ocs_status ocs_dequantize_f32(float *x, const void *q, ocs_scale scale, int64_t O, int64_t N, int64_t q_stride,
                              bool is_signed);

/* x_hat = scale * clamp(round_half_even(x / scale)). Inf saturates, NaN stays NaN, zero comes out as +0. */
ocs_status ocs_fake_quantize_f32(float *x_hat, const float *x, int64_t N, float scale, int bits, bool is_signed);

/* --- k-bit integers in k bits (pack.c) -------------------------------------------------------- */

/* ceil(N bits / 8); -1 for a negative N, or bits that ocs_check_bits refuses. */
int64_t ocs_packed_bytes(int64_t N, int bits);

/* packed [ocs_packed_bytes(N, bits)] of q [N], in [-qmax, qmax]: the codes q + qmax without gaps, low bits first.
   OCS_BAD_CODE: q is outside, and what was written is of no use. */
ocs_status ocs_pack_i8(uint8_t *packed, const int8_t *q, int64_t N, int bits);

/* q [N] of the packed codes. OCS_BAD_CODE: no integers were packed so; q is then of no use. */
ocs_status ocs_unpack_i8(int8_t *q, const uint8_t *packed, int64_t N, int bits);

/* --- Products with k-bit weights (product.c) -------------------------------------------------- */

/* A weight [O, C + S] of one group in the form that products read: tiles of 16 outputs and 32 channels, of 64 k
   bytes or, the last of 16 outputs, less; tiles.c says how they hold it. */
typedef struct {
    const uint8_t *packed; /* [ocs_product_bytes(O, C + S, bits)] */
    ocs_scale scale;       /* of all, of each output channel, or of groups: [ceil(O / 16), groups, 16], stride 1 */
    const int32_t *copies; /* [S]: the original channel of each copy */
    int64_t O, C, S;
    int64_t group; /* expanded channels that have a scale of their own, a multiple of 32; 0: all have the same */
    int bits;
} ocs_packed_weight;

/* How the rows of an input are rounded, as ocs_quantize_f32 does. */
typedef struct {
    int bits;       /* 0: they stay floats */
    bool is_signed; /* as is each row with a scale of its own */
    float scale;    /* 0: for each row max |x| / qmax, or 1 where that is 0 */
} ocs_row_grid;

typedef enum { OCS_ROWS_F32, OCS_ROWS_BF16 } ocs_row_dtype; /* of inputs and outputs; all else is float32 */

/* Of a weight [O, E]: 64 ceil(O / 16) times the sum of ceil(ceil(E / 4) w / 8) over the powers of two w that add up to
   bits, so bits / 8 for each element but for what is padded; -1 for sizes or bits that no weight has. */
int64_t ocs_product_bytes(int64_t O, int64_t E, int bits);

/* packed [ocs_product_bytes(O, E, bits)] of q [O, E], in [-qmax, qmax]; OCS_BAD_CODE: q is outside. */
ocs_status ocs_product_pack_i8(uint8_t *packed, const int8_t *q, int64_t O, int64_t E, int bits);

/* q [O, E] of a packed weight; OCS_BAD_CODE: no integers were packed so. */
ocs_status ocs_product_unpack_i8(int8_t *q, const uint8_t *packed, int64_t O, int64_t E, int bits);

/* rows [R, C]: the rows index [R] of what a packed weight stands for, copies added to their channel. */
ocs_status ocs_product_rows_f32(float *rows, const int64_t *index, const ocs_packed_weight *weight, int64_t R);

/* y [R, O] = x [R, C] w^T + bias [O], which may be NULL.

   Rows are whole numbers times a scale: rounded ones as the grid says, float rows in steps of their largest magnitude /
   (2^23 - 2^16), rounded half to even. Sums of up to 32,768 products are exact; each is rounded to float32, as is each
   step of what follows: * scale of the weight, added up over groups, * scale of the row, + bias. A row that holds NaN
   gives NaN, as does one with Inf unless its scale is given. Packed bytes are not checked: those of no integers give
   numbers that mean nothing. */
ocs_status ocs_product(void *y, const void *x, const float *bias, const ocs_packed_weight *weight, ocs_row_grid grid,
                       int64_t R, ocs_row_dtype dtype);

/* --- Recurrent layers with k-bit weights (recurrent.c) ---------------------------------------- */

typedef enum { OCS_LSTM, OCS_GRU, OCS_RNN_TANH, OCS_RNN_RELU } ocs_cell_kind;

/* Rows of a recurrent weight for each hidden unit, in torch's order: 4 (i, f, g, o), 3 (r, z, n) or 1. */
int64_t ocs_cell_gates(ocs_cell_kind kind);

/* What one layer computes with in each step, in one direction; H hidden units, a state of P numbers. */
typedef struct {
    ocs_packed_weight hidden;            /* [gates H, P] */
    const float *bias;                   /* [gates H], or NULL */
    const ocs_packed_weight *projection; /* [P, H] of an LSTM; NULL: P = H */
    ocs_row_grid grid;                   /* of the states, which products round anew in each step */
    ocs_cell_kind kind;
} ocs_recurrent_layer;

/* y [R, P], R being the sum of batch_sizes [T]: the states h of all steps; h [N, P] and, of an LSTM, c [N, H]: first
   states in, last ones out. from_x [R, gates H]: what the input gives to the gates, with its bias.

   Step t has the first batch_sizes[t] sequences, the longest first, so that these sizes fall. Where reverse, the last
   step is the first. Cells are torch's: h = o tanh(c), c = f c + i g; n = tanh(x_n + r h_n), h = n + z (h - n). */
ocs_status ocs_recurrent_f32(float *y, float *h, float *c, const float *from_x, const ocs_recurrent_layer *layer,
                             const int64_t *batch_sizes, int64_t R, int64_t T, int64_t N, bool reverse);

#ifdef __cplusplus
}
#endif
#endif
