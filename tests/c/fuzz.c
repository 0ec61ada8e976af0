/* Packed bytes that come from strangers: the gapless codes of files, the tiles of products.

   `make fuzz` has libFuzzer choose them; built without it, `fuzz 5000` takes random ones. An input says in its first
   bytes what is called and how large it is; the rest, over and over, are integers, which are packed and then damaged,
   or the packed bytes themselves. Unpacking must find what the definition says, taken bit by bit, and refuse all else;
   products and rows must be those of the plain kernels bit for bit, whatever stands where the weight has no element. */
#include "arrays.h"

#include <stdio.h>

static const uint8_t *input;
static size_t input_size, taken;

static int next_byte(void) {
    return input_size > 0 ? input[taken++ % input_size] : 0;
}

static void require(bool holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "%s: %s\n", ocs_isa(), what);
        abort();
    }
}

typedef ocs_status (*packer)(uint8_t *packed, const int8_t *q, int64_t O, int64_t E, int bits);

static ocs_status pack_gapless(uint8_t *packed, const int8_t *q, int64_t O, int64_t E, int bits) {
    return ocs_pack_i8(packed, q, O * E, bits);
}

/* Integers [O, E] that are packed, then damaged in up to two bytes; or any bytes. */
static uint8_t *next_packed(packer pack, int64_t bytes, int64_t O, int64_t E, int bits) {
    uint8_t *packed = new_array(bytes, 1);
    if (next_byte() % 4 == 0) {
        for (int64_t i = 0; i < bytes; ++i) {
            packed[i] = (uint8_t)next_byte();
        }
        return packed;
    }
    int8_t *q = new_array(O * E, 1);
    for (int64_t i = 0; i < O * E; ++i) {
        q[i] = (int8_t)(next_byte() % (2 * ocs_qmax(bits) + 1) - ocs_qmax(bits));
    }
    require(pack(packed, q, O, E, bits) == OCS_OK, "integers are not packed");
    for (int times = bytes > 0 ? next_byte() % 3 : 0; times > 0; --times) {
        packed[256 * next_byte() % bytes] ^= (uint8_t)next_byte();
    }
    return packed;
}

/* --- Gapless codes ---------------------------------------------------------------------------- */

static void check_gapless(void) {
    const int bits = 2 + next_byte() % 7;
    const int64_t N = next_byte() + 256 * (next_byte() % 2), bytes = ocs_packed_bytes(N, bits);
    const uint8_t *packed = next_packed(pack_gapless, bytes, N, 1, bits);
    int8_t *expected = new_array(N, 1);
    bool valid = true;
    for (int64_t at = 0; at < 8 * bytes; at += bits) {
        int code = 0;
        for (int b = 0; b < bits && at + b < 8 * bytes; ++b) {
            code |= (packed[(at + b) / 8] >> (at + b) % 8 & 1) << b;
        }
        if (at / bits < N) {
            expected[at / bits] = (int8_t)(code - ocs_qmax(bits));
        }
        valid = valid && code <= (at / bits < N ? 2 * ocs_qmax(bits) : 0);
    }
    for (int i = 0; ocs_isa_name(i) != NULL; ++i) {
        ocs_set_isa(ocs_isa_name(i));
        int8_t *q = new_array(N, 1);
        uint8_t *again = new_array(bytes, 1);
        require(ocs_unpack_i8(q, packed, N, bits) == (valid ? OCS_OK : OCS_BAD_CODE), "what unpacking returns");
        if (valid && N > 0) {
            require(memcmp(q, expected, (size_t)N) == 0, "other integers than the bits say");
            require(ocs_pack_i8(again, q, N, bits) == OCS_OK && memcmp(again, packed, (size_t)bytes) == 0,
                    "other bytes");
        }
    }
}

/* --- Tiles ------------------------------------------------------------------------------------ */

/* The code of output o and channel e, of which the tile may have more than the weight. */
static int code_of(const uint8_t *packed, int64_t o, int64_t e, int64_t E, int bits) {
    const uint8_t *tile = packed + o / 16 * ocs_block_bytes(E, bits) + e / 32 * ocs_tile_bytes(bits);
    const int64_t line = e % 32 / 4, byte = 4 * (o % 16) + e % 4, left = E - e / 32 * 32;
    const int64_t lines = ((left < 32 ? left : 32) + 3) / 4;
    int code = 0, place = 0;
    for (int width = 8; width > 0; width /= 2) {
        if ((bits & width) != 0) {
            const int field = tile[line * width / 8 * 64 + byte] >> line * width % 8;
            code |= (field & ((1 << width) - 1)) << place;
            tile += (lines * width + 7) / 8 * 64;
            place += width;
        }
    }
    return code;
}

static bool read_codes(int8_t *q, const uint8_t *packed, int64_t O, int64_t E, int bits) {
    bool valid = true;
    for (int64_t o = 0; o < (O + 15) / 16 * 16; ++o) {
        for (int64_t e = 0; e < (E + 3) / 4 * 4; ++e) {
            const int code = code_of(packed, o, e, E, bits);
            valid = valid && code <= 2 * ocs_qmax(bits);
            if (o < O && e < E) {
                q[o * E + e] = (int8_t)(code - ocs_qmax(bits));
            }
        }
    }
    return valid;
}

/* Any NaN equals any other. */
static bool same_floats(const float *a, const float *b, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (!(isnan(a[i]) && isnan(b[i])) && memcmp(a + i, b + i, sizeof *a) != 0) {
            return false;
        }
    }
    return true;
}

static ocs_packed_weight next_weight(void) {
    ocs_packed_weight w = {.O = next_byte() % 35, .C = next_byte() % 80, .bits = 2 + next_byte() % 7};
    w.S = w.C > 0 ? next_byte() % 6 : 0;
    w.group = 32 * (next_byte() % 3);
    const int64_t E = w.C + w.S, groups = w.group ? ocs_ceil_div(E, w.group) : 1;
    w.scale.stride = w.group > 0 || next_byte() % 2;
    const int64_t outputs = w.group > 0 ? ocs_ceil_div(w.O, 16) * 16 : w.O;
    const int64_t scales = w.scale.stride ? groups * outputs : 1;
    float *scale = new_array(scales, sizeof *scale);
    for (int64_t i = 0; i < scales; ++i) {
        scale[i] = 1e-3f * (float)(1 + next_byte());
    }
    int32_t *copies = new_array(w.S, sizeof *copies);
    for (int64_t i = 0; i < w.S; ++i) {
        copies[i] = next_byte() % (int32_t)w.C;
    }
    w.scale.value = scale, w.copies = copies;
    w.packed = next_packed(ocs_product_pack_i8, ocs_product_bytes(w.O, E, w.bits), w.O, E, w.bits);
    return w;
}

static void check_tiles(void) {
    const ocs_packed_weight w = next_weight();
    const int64_t E = w.C + w.S, bytes = ocs_product_bytes(w.O, E, w.bits);
    int8_t *expected = new_array(w.O * E, 1);
    uint8_t *clean = new_array(bytes, 1);
    const bool valid = read_codes(expected, w.packed, w.O, E, w.bits);
    for (int i = 0; ocs_isa_name(i) != NULL; ++i) {
        ocs_set_isa(ocs_isa_name(i));
        int8_t *q = new_array(w.O * E, 1);
        const ocs_status status = ocs_product_unpack_i8(q, w.packed, w.O, E, w.bits);
        require(status == (valid ? OCS_OK : OCS_BAD_CODE), "what unpacking tiles returns");
        if (valid && w.O * E > 0) {
            require(memcmp(q, expected, (size_t)(w.O * E)) == 0, "other integers than the tiles say");
            require(ocs_product_pack_i8(clean, q, w.O, E, w.bits) == OCS_OK, "integers are not packed again");
        }
    }
    const ocs_row_grid grids[] = {{0, true, 0.0f}, {2 + next_byte() % 7, true, 0.0f}, {8, next_byte() % 2, 0.01f}};
    const ocs_row_grid grid = grids[next_byte() % 3];
    seed = (uint64_t)next_byte();
    const int64_t R = 1 + any(9);
    const float *x = any_floats(R * w.C);
    int64_t *index = new_array(R, sizeof *index);
    for (int64_t r = 0; r < R; ++r) {
        index[r] = any(w.O > 0 ? w.O : 1);
    }
    float *first[2] = {NULL, NULL};
    for (int i = 0; ocs_isa_name(i / 2) != NULL; ++i) {
        ocs_packed_weight of = w;
        of.packed = i % 2 && valid ? clean : w.packed;
        ocs_set_isa(ocs_isa_name(i / 2));
        float *y = new_array(R * w.O, sizeof *y), *rows = new_array(R * w.C, sizeof *rows);
        require(ocs_product(y, x, NULL, &of, grid, R, OCS_ROWS_F32) == OCS_OK, "what a product returns");
        require(ocs_product_rows_f32(rows, index, &of, R) == (w.O > 0 ? OCS_OK : OCS_BAD_INDEX), "what rows return");
        first[0] = i == 0 ? y : first[0];
        first[1] = i == 0 ? rows : first[1];
        require(same_floats(first[0], y, R * w.O), "another product");
        require(w.O == 0 || same_floats(first[1], rows, R * w.C), "another row");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data, input_size = size, taken = 0;
    if (next_byte() % 2 == 0) {
        check_gapless();
    } else {
        check_tiles();
    }
    free_arrays();
    return 0;
}

#ifndef OCS_LIBFUZZER
int main(int count, char **arguments) {
    const int times = count > 1 ? atoi(arguments[1]) : 1000;
    uint64_t own = 1;
    for (int i = 0; i < times; ++i) {
        uint8_t bytes[300];
        seed = own;
        const int64_t size = 20 + any(280);
        for (int64_t j = 0; j < size; ++j) {
            bytes[j] = (uint8_t)any(256);
        }
        own = seed;
        LLVMFuzzerTestOneInput(bytes, (size_t)size);
    }
    printf("%d packed weights are what their bits say, by every instruction set\n", times);
}
#endif
