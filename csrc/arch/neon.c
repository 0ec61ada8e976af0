/* The variants for NEON, which every 64-bit ARM CPU has: four floats at a time, every result that of the plain kernels.
 */
#if defined(__aarch64__)
#include "arch/tile_neon.h"

/* --- What loops.h asks for ----------------------------------------------------------------------- */

#define LOOP static inline

enum { LANES = 4 };
typedef float32x4_t floats;
typedef int32x4_t ints;

INLINE floats load(const float *x) {
    return vld1q_f32(x);
}

INLINE void store(float *to, floats x) {
    vst1q_f32(to, x);
}

INLINE floats all(float x) {
    return vdupq_n_f32(x);
}

INLINE floats add(floats a, floats b) {
    return vaddq_f32(a, b);
}

INLINE floats sub(floats a, floats b) {
    return vsubq_f32(a, b);
}

INLINE floats mul(floats a, floats b) {
    return vmulq_f32(a, b);
}

INLINE floats divide(floats a, floats b) {
    return vdivq_f32(a, b);
}

INLINE floats plus_product(floats c, floats a, floats b) {
    return vfmaq_f32(c, a, b);
}

INLINE floats minus_product(floats c, floats a, floats b) {
    return vfmsq_f32(c, a, b);
}

/* Comparisons, as NEON's own minimum and maximum are NaN where either is one. */
INLINE floats smaller(floats a, floats b) {
    return vbslq_f32(vcltq_f32(a, b), a, b);
}

INLINE floats larger(floats a, floats b) {
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}

INLINE floats magnitude(floats x) {
    return vabsq_f32(x);
}

INLINE floats floor_of(floats x) {
    return vrndmq_f32(x);
}

INLINE ints truncated(floats x) {
    return vcvtq_s32_f32(x);
}

INLINE ints nearest(floats x) {
    return vcvtnq_s32_f32(x);
}

INLINE ints int_load(const void *x) {
    return vld1q_s32(x);
}

INLINE void int_store(void *to, ints x) {
    vst1q_s32(to, x);
}

INLINE ints int_all(int32_t x) {
    return vdupq_n_s32(x);
}

INLINE ints int_add(ints a, ints b) {
    return vaddq_s32(a, b);
}

INLINE ints int_smaller(ints a, ints b) {
    return vminq_s32(a, b);
}

INLINE ints int_larger(ints a, ints b) {
    return vmaxq_s32(a, b);
}

INLINE ints shift_right(ints x, ints by) {
    return vshlq_s32(x, vnegq_s32(by));
}

INLINE ints abs_bits(floats x) {
    return vreinterpretq_s32_f32(vabsq_f32(x));
}

INLINE ints octave_of(ints bits) {
    return vshrq_n_s32(bits, 20);
}

INLINE ints signed_as(ints n, floats x) {
    const uint32x4_t normal = vcgtq_s32(abs_bits(x), int_all(0x7fffff)),
                     negative = vcltzq_s32(vreinterpretq_s32_f32(x));
    return vandq_s32(vbslq_s32(negative, vnegq_s32(n), n), vreinterpretq_s32_u32(normal));
}

INLINE int64_t keep(uint32_t *to, ints n, ints usual) {
    int_store(to, n);
    (void)usual;
    return LANES;
}

INLINE floats gather(const float *from, const int32_t *index) {
    const float x[LANES] = {from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
    return vld1q_f32(x);
}

INLINE ints floor_divide(ints x, const int32_t *odd) {
    int32_t q[LANES];
    int_store(q, x);
    for (int i = 0; i < LANES; ++i) {
        q[i] = q[i] / odd[i] - (q[i] % odd[i] < 0);
    }
    return int_load(q);
}

INLINE void store_bytes(uint8_t *bytes, const ints x[4]) {
    const int16x8_t low = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
    vst1q_u8(bytes, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high))));
}

INLINE void fetch_ahead(const float *x, float *x_hat) {
    (void)x, (void)x_hat;
}

#include "arch/loops.h"

/* --- Tiles ------------------------------------------------------------------------------------ */

static void unpack_tile_neon(uint8_t *restrict codes, const uint8_t *tile, int lines, int bits) {
    for (int v = 0; v < lines; ++v) {
        for (int part = 0; part < 4; ++part) {
            vst1q_u8(codes + v * OCS_TILE_LINE + 16 * part, codes_of(tile, v, part, lines, bits));
        }
    }
}

/* --- Integers --------------------------------------------------------------------------------- */

/* sum [4] += u * x of a tile's channels, modulo 2^32; two lanes have the pairs of one output. */
INLINE void add_part(int32_t *sum, const uint8_t *u, const uint8_t *x, int lines, bool is_signed) {
    int32x4_t with_sign[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    uint32x4_t without[2] = {vdupq_n_u32(0), vdupq_n_u32(0)};
#pragma GCC unroll 8
    for (int v = 0; v < lines; ++v) {
        const uint8x16_t line = vld1q_u8(u + v * OCS_TILE_LINE), four = four_bytes(x + 4 * v);
        if (is_signed) {
            const int8x16_t a = vreinterpretq_s8_u8(line), b = vreinterpretq_s8_u8(four);
            with_sign[0] = vpadalq_s16(with_sign[0], vmull_s8(vget_low_s8(a), vget_low_s8(b)));
            with_sign[1] = vpadalq_s16(with_sign[1], vmull_high_s8(a, b));
        } else {
            without[0] = vpadalq_u16(without[0], vmull_u8(vget_low_u8(line), vget_low_u8(four)));
            without[1] = vpadalq_u16(without[1], vmull_high_u8(line, four));
        }
    }
    const uint32x4_t signed_pairs = vreinterpretq_u32_s32(vpaddq_s32(with_sign[0], with_sign[1]));
    const uint32x4_t pairs = is_signed ? signed_pairs : vpaddq_u32(without[0], without[1]);
    vst1q_s32(sum, vreinterpretq_s32_u32(vaddq_u32(vreinterpretq_u32_s32(vld1q_s32(sum)), pairs)));
}

/* sum [R, 16] += u * x of a tile. */
INLINE void add_tile(int32_t *restrict sum, const uint8_t *tile, const uint8_t *x, int64_t R, int64_t stride, int lines,
                     bool is_signed, int bits) {
    uint8_t u[OCS_TILE_CODES];
    factors_of_tile(u, tile, lines, is_signed, bits);
    for (int64_t r = 0; r < R; ++r) {
        for (int part = 0; part < 4; ++part) {
            add_part(sum + r * OCS_TILE_OUTPUTS + 4 * part, u + 16 * part, x + r * stride, lines, is_signed);
        }
    }
}

OCS_DEFINE_ADD_TILES(, add_tiles, add_tile)

INLINE void product_of_block(int32_t *restrict sum, const uint8_t *tiles, const uint8_t *x, int64_t V, int64_t R,
                             int64_t stride, bool is_signed, int bits) {
    begin_sums(sum, x, V, R, stride, is_signed, bits);
    add_tiles(sum, tiles, x, V, R, stride, is_signed, bits);
}

OCS_DEFINE_PRODUCT(, static, product_neon)

/* --- Floats in three bytes -------------------------------------------------------------------- */

/* The lowest byte of each integer, and what is left of it once that is taken away. */
INLINE int32x4_t take_byte(int32x4_t *left) {
    const int32x4_t byte = vshrq_n_s32(vshlq_n_s32(*left, 24), 24);
    *left = vshrq_n_s32(vsubq_s32(*left, byte), 8);
    return byte;
}

static void cut_row_neon(int8_t *restrict bytes, const float *x, int64_t N, int64_t stride, float step) {
    const float32x4_t steps = vdupq_n_f32(step);
    int32x4_t places[3][4];
    int64_t i = 0;
    for (; i + 16 <= N; i += 16) {
        for (int j = 0; j < 4; ++j) {
            int32x4_t left = vcvtnq_s32_f32(vdivq_f32(vld1q_f32(x + i + 4 * j), steps));
            places[2][j] = take_byte(&left);
            places[1][j] = take_byte(&left);
            places[0][j] = left;
        }
        for (int place = 0; place < 3; ++place) {
            store_bytes((uint8_t *)bytes + place * stride + i, places[place]);
        }
    }
    ocs_cut_row_ref(bytes + i, x + i, N - i, stride, step);
}

/* --- Cells, four hidden units at a time; see recurrent.c --------------------------------------- */

/* Comparisons rather than min and max, of which NEON's own give NaN where either is one. */
INLINE float32x4_t exponential(float32x4_t x) {
    const float32x4_t most = vdupq_n_f32(OCS_EXP_MOST), least = vdupq_n_f32(OCS_EXP_LEAST);
    const float32x4_t shift = vdupq_n_f32(OCS_SHIFT);
    x = vbslq_f32(vcltq_f32(most, x), most, x);
    x = vbslq_f32(vcgtq_f32(least, x), least, x);
    const float32x4_t shifted = vfmaq_f32(shift, x, vdupq_n_f32(OCS_LOG2_E)), n = vsubq_f32(shifted, shift);
    const float32x4_t high = vfmaq_f32(x, n, vdupq_n_f32(-OCS_LN_2_HIGH));
    const float32x4_t r = vfmaq_f32(high, n, vdupq_n_f32(-OCS_LN_2_LOW));
    float32x4_t sum = vdupq_n_f32(OCS_EXP_TERMS[0]);
    for (int i = 1; i < OCS_EXP_DEGREE + 1; ++i) {
        sum = vfmaq_f32(vdupq_n_f32(OCS_EXP_TERMS[i]), sum, r);
    }
    const uint32x4_t power = vshlq_n_u32(vaddq_u32(vreinterpretq_u32_f32(shifted), vdupq_n_u32(127)), 23);
    return vmulq_f32(sum, vreinterpretq_f32_u32(power));
}

INLINE float32x4_t sigmoid(float32x4_t x) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    return vdivq_f32(one, vaddq_f32(one, exponential(vnegq_f32(x))));
}

INLINE float32x4_t hyperbolic_tangent(float32x4_t x) {
    const float32x4_t one = vdupq_n_f32(1.0f), two = vdupq_n_f32(2.0f);
    return vsubq_f32(one, vdivq_f32(two, vaddq_f32(one, exponential(vmulq_f32(two, x)))));
}

INLINE float32x4_t gate(const float *from_x, const float *from_h) {
    return vaddq_f32(vld1q_f32(from_x), vld1q_f32(from_h));
}

INLINE void lstm_cells(float *h, float *c, const float *from_x, const float *from_h, int64_t H) {
    const float32x4_t i = sigmoid(gate(from_x, from_h)), f = sigmoid(gate(from_x + H, from_h + H));
    const float32x4_t g = hyperbolic_tangent(gate(from_x + 2 * H, from_h + 2 * H));
    const float32x4_t o = sigmoid(gate(from_x + 3 * H, from_h + 3 * H));
    const float32x4_t next = vfmaq_f32(vmulq_f32(i, g), f, vld1q_f32(c));
    vst1q_f32(c, next);
    vst1q_f32(h, vmulq_f32(o, hyperbolic_tangent(next)));
}

INLINE void gru_cells(float *h, const float *from_x, const float *from_h, int64_t H) {
    const float32x4_t r = sigmoid(gate(from_x, from_h)), z = sigmoid(gate(from_x + H, from_h + H));
    const float32x4_t n = hyperbolic_tangent(vfmaq_f32(vld1q_f32(from_x + 2 * H), r, vld1q_f32(from_h + 2 * H)));
    vst1q_f32(h, vfmaq_f32(n, z, vsubq_f32(vld1q_f32(h), n)));
}

INLINE float32x4_t rectified(float32x4_t x) {
    const float32x4_t zero = vdupq_n_f32(0.0f);
    return vbslq_f32(vcltq_f32(x, zero), zero, x);
}

static void cell_neon(float *restrict h, float *restrict c, const float *from_x, const float *from_h, int64_t H,
                      int64_t first, int64_t last, ocs_cell_kind kind) {
    int64_t u = first;
    for (; u + 4 <= last; u += 4) {
        switch (kind) {
        case OCS_LSTM: lstm_cells(h + u, c + u, from_x + u, from_h + u, H); break;
        case OCS_GRU: gru_cells(h + u, from_x + u, from_h + u, H); break;
        case OCS_RNN_TANH: vst1q_f32(h + u, hyperbolic_tangent(gate(from_x + u, from_h + u))); break;
        default: vst1q_f32(h + u, rectified(gate(from_x + u, from_h + u)));
        }
    }
    ocs_cell_ref(h, c, from_x, from_h, H, u, last, kind);
}

static bool always(void) {
    return true;
}

const ocs_instruction_set ocs_isa_neon = {
    .name = "neon",
    .supported = always,
    .kernels.abs_max = abs_max,
    .kernels.scaled_max = scaled_max,
    .kernels.channel_max = channel_max,
    .kernels.histogram = histogram,
    .kernels.signed_histogram = signed_histogram,
    .kernels.octave_histogram = octave_histogram,
    .kernels.quantize_row = quantize_row,
    .kernels.quantize = quantize,
    .kernels.fake_quantize = fake_quantize,
    .kernels.unpack_tile = unpack_tile_neon,
    .kernels.product = product_neon,
    .kernels.cut_row = cut_row_neon,
    .kernels.cell = cell_neon,
};
#endif
