/* Loops over floats that are the same on every instruction set with vectors, for the file that includes it.

   That file has defined LANES, the types `floats` and `ints` of so many lanes, INLINE (static inline functions that are
   compiled for its target) and LOOP (the same, not always inlined), and these inline functions:

     load, store, all           floats from and to memory, and one number in all lanes
     add, sub, mul, divide      each rounded
     plus_product (c, a, b)     c + a b, rounded once
     minus_product (c, a, b)    c - a b, rounded once
     smaller, larger (a, b)     b where one of them is NaN
     magnitude, floor_of        |x| and the largest integer below
     truncated, nearest         to ints; the low byte of what NaN becomes is 0
     abs_bits                   |x| as ints, which order as the values do, Inf and NaN above
     int_load, int_store, int_all, int_add, int_smaller, int_larger, shift_right (by another number in each lane)
     octave_of                  ints of abs_bits >> 20: exponent and three bits of the fraction
     signed_as (ints, floats)   n, or -n where x < 0, or 0 where |x| is below every normal number
     keep (to, n, usual)        puts those ints in memory that are not the usual one, or all; returns how many
     floor_divide               ints by others in memory, mostly 1, rounded down. Doubles hold both, and a quotient that
                                is no integer is at least 2^-22 away from one, which is more than it is rounded by
     gather                     floats at indices in memory
     store_bytes                the low bytes of four ints in order
     fetch_ahead                memory that a loop reads and writes soon, where that helps

   Every result equals that of the plain kernel, which does what is left, bit for bit. */
#ifndef OCS_ARCH_LOOPS_H
#define OCS_ARCH_LOOPS_H

/* --- Maxima ----------------------------------------------------------------------------------- */

INLINE float largest_lane(ints max) {
    float lanes[LANES];
    int_store(lanes, max);
    return ocs_abs_max_ref(lanes, LANES);
}

LOOP float abs_max(const float *x, int64_t N) {
    ints max[4] = {int_all(0), int_all(0), int_all(0), int_all(0)};
    int64_t i = 0;
    for (; i + 4 * LANES <= N; i += 4 * LANES) {
        for (int j = 0; j < 4; ++j) {
            max[j] = int_larger(max[j], abs_bits(load(x + i + LANES * j)));
        }
    }
    max[0] = int_larger(int_larger(max[0], max[1]), int_larger(max[2], max[3]));
    return ocs_larger_abs(largest_lane(max[0]), ocs_abs_max_ref(x + i, N - i));
}

LOOP float scaled_max(const float *x, const float *factor, int64_t N) {
    ints max = int_all(0);
    int64_t i = 0;
    for (; i + LANES <= N; i += LANES) {
        max = int_larger(max, abs_bits(mul(load(x + i), load(factor + i))));
    }
    return ocs_larger_abs(largest_lane(max), ocs_scaled_max_ref(x + i, factor + i, N - i));
}

/* max[i] = the larger of max[i] and |w[i]|, i < columns. */
LOOP void max_into(float *restrict max, const float *w, int64_t columns) {
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        int_store(max + i, int_larger(abs_bits(load(max + i)), abs_bits(load(w + i))));
    }
    for (; i < columns; ++i) {
        max[i] = ocs_larger_abs(max[i], w[i]);
    }
}

/* Long filters are reduced one by one. Of others the rows are first, column by column in a tile that fits the L1 cache,
   then the K columns of a channel. */
LOOP void channel_max(float *restrict channel_max, const float *w, int64_t O, int64_t C, int64_t K, int64_t stride) {
    enum { TILE = 4096, LONG = 4 * LANES };
    float max[TILE];
    memset(channel_max, 0, (size_t)C * sizeof *channel_max);
    for (int64_t i = 0; i < (K >= LONG ? O * C : 0); ++i) {
        float *of_channel = &channel_max[i % C];
        *of_channel = ocs_larger_abs(*of_channel, abs_max(w + i / C * stride + i % C * K, K));
    }
    for (int64_t begin = 0; begin < (K >= LONG ? 0 : C * K); begin += TILE) {
        const int64_t columns = C * K - begin < TILE ? C * K - begin : TILE;
        memset(max, 0, (size_t)columns * sizeof *max);
        for (int64_t o = 0; o < O; ++o) {
            max_into(max, w + o * stride + begin, columns);
        }
        for (int64_t i = 0; i < columns; ++i) {
            float *of_channel = &channel_max[(begin + i) / K];
            *of_channel = ocs_larger_abs(*of_channel, max[i]);
        }
    }
}

/* --- Division by one number --------------------------------------------------------------------- */

/* 1 / d as the sum of two floats. */
typedef struct {
    floats d, high, low;
} divisor;

/* Whether nothing in `quotient` can overflow, nor underflow where it decides an integer. */
INLINE bool has_divisor(float d) {
    return d >= 0x1p-70f && d <= 0x1p60f;
}

INLINE divisor divisor_of(float d) {
    const float high = 1.0f / d;
    const double rest = 1.0 - (double)high * d; /* exact */
    return (divisor){all(d), all(high), all((float)(rest / d))};
}

/* x / d, rounded as a division rounds it, for |x| <= 2^24 d and has_divisor(d), in half its time: 1 / d is correctly
   rounded, the first quotient is less than one unit in the last place away, what it leaves over is exact, and then the
   second quotient is right (Markstein, IBM J. Res. Dev. 34, 1990, theorem 7). |x| < 2^-101 may give another quotient
   below 2^-31. */
INLINE floats quotient(floats x, divisor by) {
    const floats first = plus_product(mul(x, by.low), x, by.high), rest = minus_product(x, first, by.d);
    return plus_product(first, rest, by.high);
}

/* --- Histograms ------------------------------------------------------------------------------- */

/* Bins of so many values are found first, then counted: what was stored a moment ago would have to be waited for. */
enum { COUNTED = 512 };

/* How many of those that are left are next, in whole vectors. */
INLINE int64_t next_values(int64_t left) {
    return left < COUNTED ? left / LANES * LANES : COUNTED;
}

/* Neighbours are counted in different histograms [parts][size], so that an increment need not wait for the one before
   it. */
INLINE void count(uint32_t *restrict counts, const uint32_t *bin, int64_t N, int64_t size, int parts) {
    int64_t i = 0;
    for (; i + 4 <= N; i += 4) {
        for (int j = 0; j < 4; ++j) {
            counts[j % parts * size + bin[i + j]] += 1;
        }
    }
    for (; i < N; ++i) {
        counts[bin[i]] += 1;
    }
}

/* Bins of |x| over [0, limit]; NaN is beyond. */
INLINE ints bins_of(floats magnitudes, divisor by, floats bins, ints last) {
    return int_smaller(truncated(mul(quotient(smaller(magnitudes, by.d), by), bins)), last);
}

LOOP void histogram(uint32_t *restrict counts, const float *x, int64_t N, int64_t bins, float limit) {
    if (!has_divisor(limit)) {
        ocs_histogram_ref(counts, x, N, bins, limit);
        return;
    }
    const divisor by = divisor_of(limit);
    const floats scale = all((float)bins);
    const ints last = int_all((int32_t)bins - 1);
    uint32_t bin[COUNTED];
    for (int64_t n; (n = next_values(N)) > 0; x += n, N -= n) {
        for (int64_t i = 0; i < n; i += LANES) {
            int_store(bin + i, bins_of(magnitude(load(x + i)), by, scale, last));
        }
        count(counts, bin, n, bins, OCS_COUNTS);
    }
    ocs_histogram_ref(counts, x, N, bins, limit);
}

LOOP void signed_histogram(uint32_t *restrict counts, const float *x, int64_t N, int64_t bins, float limit) {
    if (!has_divisor(limit)) {
        ocs_signed_histogram_ref(counts, x, N, bins, limit);
        return;
    }
    const divisor by = divisor_of(limit);
    const floats scale = all((float)bins);
    const ints last = int_all((int32_t)bins - 1), middle = int_all((int32_t)bins), one = int_all(1);
    uint32_t bin[COUNTED];
    for (int64_t n; (n = next_values(N)) > 0; x += n, N -= n) {
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const floats values = load(x + i);
            const ints steps = int_add(bins_of(magnitude(values), by, scale, last), one);
            kept += keep(bin + kept, int_add(middle, signed_as(steps, values)), middle);
        }
        count(counts, bin, kept, 2 * bins + 1, OCS_COUNTS);
        counts[bins] += (uint32_t)(n - kept);
    }
    ocs_signed_histogram_ref(counts, x, N, bins, limit);
}

/* One value of each of N channels. */
LOOP void octave_row(uint32_t *restrict counts, const float *x, int64_t N, int32_t base) {
    int32_t channel[LANES];
    for (int32_t j = 0; j < LANES; ++j) {
        channel[j] = j * OCS_OCTAVE_BINS;
    }
    const ints above = int_all(-base), first = int_all(0), last = int_all(OCS_OCTAVE_BINS - 1);
    uint32_t bin[COUNTED];
    for (int64_t n; (n = next_values(N)) > 0; x += n, N -= n, counts += n * OCS_OCTAVE_BINS) {
        ints of_channel = int_load(channel);
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const ints octaves = int_add(octave_of(abs_bits(load(x + i))), above);
            const ints bins = int_smaller(int_larger(octaves, first), last);
            kept += keep(bin + kept, int_add(bins, of_channel), of_channel);
            of_channel = int_add(of_channel, int_all(LANES * OCS_OCTAVE_BINS));
        }
        for (int64_t i = 0; i < kept; ++i) {
            counts[bin[i]] += 1;
        }
    }
    ocs_octave_histogram_ref(counts, x, N, OCS_OCTAVE_BINS, base);
}

LOOP void octave_histogram(uint32_t *restrict counts, const float *x, int64_t N, int64_t step, int32_t base) {
    if (step > 0) {
        octave_row(counts, x, N, base);
        return;
    }
    const ints above = int_all(-base), first = int_all(0), last = int_all(OCS_OCTAVE_BINS - 1);
    const bool apart = N >= OCS_OCTAVE_BINS;
    uint32_t bin[COUNTED], own[4 * OCS_OCTAVE_BINS];
    memset(own, 0, apart ? sizeof own : 0);
    for (int64_t n; (n = next_values(N)) > 0; x += n, N -= n) {
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += LANES) {
            const ints octaves = int_add(octave_of(abs_bits(load(x + i))), above);
            const ints bins = int_smaller(int_larger(octaves, first), last);
            kept += keep(bin + kept, bins, first);
        }
        if (apart) {
            count(own, bin, kept, OCS_OCTAVE_BINS, 4);
        }
        for (int64_t i = 0; i < (apart ? 0 : kept); ++i) {
            counts[bin[i]] += 1;
        }
        counts[0] += (uint32_t)(n - kept);
    }
    for (int j = 0; j < (apart ? 4 * OCS_OCTAVE_BINS : 0); ++j) {
        counts[j % OCS_OCTAVE_BINS] += own[j];
    }
    ocs_octave_histogram_ref(counts, x, N, step, base);
}

/* --- Weights ---------------------------------------------------------------------------------- */

/* Columns of a split row as integers, not yet clamped: ocs_half_steps, then one addition and one shift. Here it is a
   division: of the smallest weights, too, the sign decides. */
INLINE ints split_columns(floats w, floats scale, const int32_t *addend, const int32_t *shift) {
    const floats u = divide(w, scale);
    const floats halves = smaller(floor_of(add(u, u)), all(OCS_HALF_STEPS_LIMIT));
    const ints sum = int_add(truncated(larger(halves, all(-OCS_HALF_STEPS_LIMIT))), int_load(addend));
    return shift_right(sum, int_load(shift));
}

/* q [N] of columns, each of w where it is, or of w[index] where an index is given; odd may be NULL. */
INLINE void quantize_columns(int8_t *restrict q, const float *w, const int32_t *index, const int32_t *addend,
                             const int32_t *shift, const int32_t *odd, int64_t N, float scale, int32_t qmax) {
    const ints most = int_all(qmax), least = int_all(-qmax);
    ints four[4];
    int64_t m = 0;
    for (; m + 4 * LANES <= N; m += 4 * LANES) {
        for (int j = 0; j < 4; ++j) {
            const int64_t at = m + LANES * j;
            const floats weights = index == NULL ? load(w + at) : gather(w, index + at);
            four[j] = split_columns(weights, all(scale), addend + at, shift + at);
            if (odd != NULL) {
                four[j] = floor_divide(four[j], odd + at);
            }
            four[j] = int_larger(int_smaller(four[j], most), least);
        }
        store_bytes((uint8_t *)q + m, four);
    }
    for (; m < N; ++m) {
        const float one = index == NULL ? w[m] : w[index[m]];
        q[m] = ocs_split_column(ocs_half_steps(one, scale), addend[m], shift[m], odd == NULL ? 1 : odd[m], qmax);
    }
}

LOOP void quantize_row(int8_t *restrict q, const float *w, const ocs_columns *columns, float scale, int32_t qmax) {
    const int64_t N = columns->N, copies = columns->M - N;
    const int32_t *addend = columns->addend, *shift = columns->shift, *odd = columns->odd;
    if (odd == NULL) {
        quantize_columns(q, w, NULL, addend, shift, NULL, N, scale, qmax);
        quantize_columns(q + N, w, columns->index, addend + N, shift + N, NULL, copies, scale, qmax);
    } else {
        quantize_columns(q, w, NULL, addend, shift, odd, N, scale, qmax);
        quantize_columns(q + N, w, columns->index, addend + N, shift + N, odd + N, copies, scale, qmax);
    }
}

/* --- Any array -------------------------------------------------------------------------------- */

/* x between the ends of the grid, so that x / scale, rounded, is on it; NaN stays. To clamp before the division is the
   same, as that never makes a larger number smaller, and qmax * scale gives qmax but for far less than half a step. */
INLINE floats within(floats x, floats least, floats most) {
    return larger(least, smaller(most, x));
}

/* The shift rounds, and makes +0 of -0. */
INLINE floats on_grid(floats q, floats scale) {
    return mul(sub(add(q, all(OCS_SHIFT)), all(OCS_SHIFT)), scale);
}

/* Every other vector is divided, which keeps units busy that products do not need. */
LOOP void fake_quantize(float *restrict x_hat, const float *x, int64_t N, float scale, float qmin, float qmax) {
    if (!has_divisor(scale)) {
        ocs_fake_quantize_ref(x_hat, x, N, scale, qmin, qmax);
        return;
    }
    const divisor by = divisor_of(scale);
    const floats least = all(qmin * scale), most = all(qmax * scale);
    int64_t i = 0;
    for (; i + 2 * LANES <= N; i += 2 * LANES) {
        const floats a = within(load(x + i), least, most), b = within(load(x + i + LANES), least, most);
        fetch_ahead(x + i, x_hat + i);
        store(x_hat + i, on_grid(quotient(a, by), by.d));
        store(x_hat + i + LANES, on_grid(divide(b, by.d), by.d));
    }
    ocs_fake_quantize_ref(x_hat + i, x + i, N - i, scale, qmin, qmax);
}

LOOP void quantize(uint8_t *restrict q, const float *x, int64_t N, float scale, float qmin, float qmax) {
    if (!has_divisor(scale)) {
        ocs_quantize_ref(q, x, N, scale, qmin, qmax);
        return;
    }
    const divisor by = divisor_of(scale);
    const floats least = all(qmin * scale), most = all(qmax * scale);
    ints four[4];
    int64_t i = 0;
    for (; i + 4 * LANES <= N; i += 4 * LANES) {
        for (int j = 0; j < 4; ++j) {
            four[j] = nearest(quotient(within(load(x + i + LANES * j), least, most), by));
        }
        store_bytes(q + i, four);
    }
    ocs_quantize_ref(q + i, x + i, N - i, scale, qmin, qmax);
}

#endif
