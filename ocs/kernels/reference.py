"""The plain numpy twin of every kernel: the definition that the tests compare against, literal rather than fast.

Signatures and dtypes are those of `ocs._C` and `torch.ops.ocs`. Weights are [O, C, ...]; C here counts the input
channels of one group, n the splits of one group.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ocs.kernels.constants import CLIP_METHODS, OCTAVE_BINS, OCTAVES, SQUANT_LIMIT, SQUANT_STEP, grid
from ocs.kernels.reference_release import release_threshold  # noqa: F401 - one twin of each kernel is found here

Floats, Int64s, Int32s = NDArray[np.float32], NDArray[np.int64], NDArray[np.int32]
Ints = NDArray[np.int8]
Plan = tuple[Int64s, Int32s, Int32s, Floats]

# --- Where the outliers are -------------------------------------------------------------------------------------------


def abs_max(x: Floats) -> Floats:
    """Find max|x|, float32 []; 0 for an empty array."""
    return np.abs(x).max(initial=np.float32(0))


def histogram(x: Floats, bins: int, limit: float) -> Int64s:
    """Count |x| over [0, limit] in bins, int64 [bins], what lies beyond in the last one."""
    width = np.float32(limit)
    if width == 0:
        return np.bincount([0] * x.size, minlength=bins)
    position = np.abs(x).ravel() / width * np.float32(bins)
    return np.bincount(np.fmin(position, bins - 1).astype(np.int64), minlength=bins)


def signed_histogram(x: Floats, bins: int, limit: float) -> Int64s:
    """Count x over [-limit, limit], int64 [2 bins + 1]: zeros and subnormal values in the middle."""
    counted = ~(np.abs(x) < np.finfo(np.float32).tiny) & (np.float32(limit) > 0)
    below, above = (histogram(x[counted & (np.signbit(x) == sign)], bins, limit) for sign in (True, False))
    return np.concatenate([below[::-1], [x.size - below.sum() - above.sum()], above])


def octave_histogram(x: Floats, limit: float) -> Int64s:
    """Count |x| of x [N, C, ...] below limit, a power of two, in eight bins to the octave: int64 [C, 128]."""
    fraction, exponent = np.frexp(np.abs(x))  # |x| = fraction * 2^exponent, fraction in [1/2, 1)
    octaves = np.where(np.isfinite(x), exponent + 1 - np.frexp(np.float32(limit))[1], 9)  # 0: the highest
    within = np.floor(np.nan_to_num(fraction, posinf=0.0) * 16) - 8
    bins = np.where(x == 0, 0, 8 * (OCTAVES - 1 + octaves) + within)
    bins = np.clip(bins, 0, OCTAVE_BINS - 1).astype(np.int64)
    flat = bins.swapaxes(0, 1).reshape(x.shape[1], x.size // max(x.shape[1], 1))
    return np.array([np.bincount(row, minlength=OCTAVE_BINS) for row in flat], np.int64).reshape(
        x.shape[1], OCTAVE_BINS
    )


def channel_max(w: Floats, groups: int) -> Floats:
    """Find max|w| of each input channel [groups C]."""
    return np.abs(_grouped(w, groups)).max(axis=(1, 3), initial=np.float32(0)).ravel()


def _grouped(w: NDArray, groups: int) -> NDArray:
    """View w as [groups, O / groups, C, K]."""
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], math.prod(w.shape[2:]))


# --- Which channels to split: section 3 -------------------------------------------------------------------------------


def split_plan(channel_max: Floats, groups: int, splits: int, even: bool) -> Plan:
    """Split the largest channel, `splits` times: (source, parts, offset, split_max), each [groups (C + splits)].

    It is halved; or where even, it gets one part more, all of them equal.
    """
    plan_of_group = _plan_even if even else _plan_halves
    plans = [plan_of_group(list(largest), splits) for largest in channel_max.reshape(groups, -1)]
    for g, (source, *_) in enumerate(plans):
        source[:] = [c + g * (channel_max.size // groups) for c in source]
    source, parts, offset, split_max = (np.concatenate(columns) for columns in zip(*plans, strict=True))
    return source.astype(np.int64), parts.astype(np.int32), offset.astype(np.int32), split_max.astype(np.float32)


def _plan_halves(largest: list[np.float32], splits: int) -> tuple[list, ...]:
    """Halve the largest channel, copies included, into itself and a copy at the end, again and again."""
    source, parts, offset, split_max = list(range(len(largest))), [1] * len(largest), [0] * len(largest), largest
    for _ in range(splits):
        c = int(np.argmax(split_max))
        source.append(source[c])
        halved = split_max[c] > 0  # zeros are copied without counting as halved
        offset.append(offset[c] + halved * parts[c])
        parts[c] *= 1 + int(halved)
        parts.append(parts[c])
        split_max[c] = split_max[c] * np.float32(0.5)
        split_max.append(split_max[c])
    return source, parts, offset, split_max


def _plan_even(largest: list[np.float32], splits: int) -> tuple[list, ...]:
    """Give the channel whose parts are the largest one part more, again and again."""
    source, parts, offset = list(range(len(largest))), [1] * len(largest), [0] * len(largest)
    for _ in range(splits):
        c = int(np.argmax([m / np.float32(n) for m, n in zip(largest, parts, strict=True)]))
        source.append(c)
        offset.append(parts[c])
        parts[c] += 1
    return source, [parts[c] for c in source], offset, [largest[c] / np.float32(parts[c]) for c in source]


def pick_channels(w: NDArray, splits: int) -> list[int]:
    """Pick channels of one group as the paper writes: look at the whole tensor for its largest |w|, halve, repeat.

    Returns the expanded channels that were split, in order; split_channels(w, picks, False) is the split weight.
    """
    picks = []
    for _ in range(splits):
        axes = tuple(i for i in range(w.ndim) if i != 1)
        picks.append(int(np.argmax(np.abs(w).max(axis=axes))))
        w, _ = split_channels(w, picks[-1:], False)
    return picks


def split_channels(w: NDArray, picks: list[int], aware: bool) -> tuple[NDArray, Int64s]:
    """Halve each picked channel into itself and a copy at the end: the weight [O, C + n, ...] and the source [C + n].

    (w - 1/2) / 2 and (w + 1/2) / 2 where aware (w in grid units), w / 2 both where not.
    """
    half = 0.5 if aware else 0.0
    source = np.arange(w.shape[1])
    for c in picks:
        w = np.concatenate([w, (w[:, c : c + 1] + half) / 2], axis=1)
        w[:, c] = (w[:, c] - half) / 2
        source = np.append(source, source[c])
    return w, source


def output_max(w: Floats, source: Int64s, parts: Int32s, groups: int) -> Floats:
    """Find max|w| of each output channel after splitting [O]."""
    return np.abs(divided(w, source, parts, groups)).max(axis=(2, 3), initial=np.float32(0)).ravel()


def divided(w: NDArray, source: Int64s, parts: Int32s, groups: int) -> NDArray:
    """Split the weight into w / parts: [groups, O / groups, C + n, K]."""
    return gather(w, source, groups) / parts.astype(np.float32).reshape(groups, 1, -1, 1)


def gather(w: NDArray, source: Int64s, groups: int) -> NDArray:
    """Gather each expanded channel's original weights: [groups, O / groups, C + n, K]."""
    within = source.reshape(groups, -1) - np.arange(groups)[:, None] * w.shape[1]
    return np.stack([part[:, columns] for part, columns in zip(_grouped(w, groups), within, strict=True)])


# --- Where to clip: sections 2.1 and 4 --------------------------------------------------------------------------------


def split_histogram(w: Floats, source: Int64s, parts: Int32s, groups: int, bins: int, limit: Floats) -> Int64s:
    """Count the |w| after splitting that are not zero: int64 [bins], or [O, bins] where limit is [O]."""
    rows = divided(w, source, parts, groups).reshape(w.shape[0], math.prod(w.shape[2:]) * (source.size // groups))
    if limit.ndim == 0:
        return histogram(rows[rows != 0], bins, limit)
    counts = [histogram(row[row != 0], bins, of_row) for row, of_row in zip(rows, limit, strict=True)]
    return np.array(counts, np.int64).reshape(w.shape[0], bins)


def clip_threshold(counts: Int64s, limit: Floats, bits: int, signed: bool, method: int) -> Floats:
    """Find the threshold, float32 in (0, limit], in each histogram [..., bins] of |x| over [0, limit]."""
    rows = zip(counts.reshape(limit.size, -1), limit.ravel(), strict=True)
    found = [min(_clip_position(row, bits, signed, CLIP_METHODS[method]) * float(of_row) / row.size, float(of_row))
             if row.any() and of_row else of_row for row, of_row in rows]  # fmt: skip
    return np.array(found, np.float32).reshape(limit.shape)


def _clip_position(counts: Int64s, bits: int, signed: bool, method: str) -> float:
    """Find the threshold in bins. Values are taken to be spread evenly within each bin."""
    k = bits if signed else bits + 1  # an unsigned grid is the positive half of one with a bit more
    qmax, centers, total = grid(k, True)[1], np.arange(counts.size) + 0.5, counts.sum()
    mean, rms = counts @ centers / total, math.sqrt(counts @ (centers**2 + 1 / 12) / total)
    if method == "mse":
        return _clip_mse(counts, qmax)
    if method == "aciq":
        laplace = math.log(2 * math.e * mean) < math.log(2 * math.pi * math.e * rms**2) / 2  # the likelier one
        return LAPLACE_OPTIMUM[k - 2] * mean if laplace else GAUSS_OPTIMUM[k - 2] * rms
    if method == "kl":
        return _clip_kl(counts, qmax)
    if method == "percentile":
        below = np.concatenate([[0], np.cumsum(counts)])
        wanted = total * (1 - 10 ** -(2 + bits / 4))
        last = int(np.searchsorted(below, wanted, "right"))
        return last - (below[last] - wanted) / counts[last - 1]
    if method == "std":
        return (k + 1) / 2 * rms
    return SAWB_RMS[k - 2] * max(rms, mean * 2 / math.sqrt(3)) - SAWB_MEAN[k - 2] * mean


# In standard deviations and mean absolute deviations, for k = 2 .. 9; see csrc/clip.c.
GAUSS_OPTIMUM = (1.2240, 1.9523, 2.4739, 2.8987, 3.2699, 3.6075, 3.9205, 4.2146)
LAPLACE_OPTIMUM = (2.0000, 3.4864, 4.8199, 6.0984, 7.3582, 8.6184, 9.8824, 11.1554)
SAWB_RMS = (3.12, 6.942, 11.823, 16.928, 22.181, 27.557, 33.022, 38.568)
SAWB_MEAN = (2.064, 6.304, 11.859, 17.811, 24.003, 30.378, 36.879, 43.490)


def clip_error(counts: Int64s, t: float, qmax: int) -> float:
    """Sum (x - Q(x))^2, x in bins, where the grid of qmax steps ends at t: equation 9.

    Bin edges and rounding boundaries cut the axis into pieces, in each of which density and Q(x) are constant.
    """
    step = t / qmax
    cuts = np.union1d(np.arange(counts.size + 1), (np.arange(1, qmax + 1) - 0.5) * step)
    begin, end = cuts[:-1], cuts[1:]
    middle = (begin + end) / 2
    rounded = step * np.minimum(np.floor(middle / step + 0.5), qmax)
    density = counts[np.minimum(middle.astype(np.int64), counts.size - 1)]
    return float(np.sum(density * ((end - rounded) ** 3 - (begin - rounded) ** 3) / 3))


def _clip_mse(counts: Int64s, qmax: int) -> float:
    """Find the best bin edge, then take finer and finer steps around it."""
    best = min(range(counts.size, 0, -1), key=lambda t: clip_error(counts, t, qmax))
    for step in 0.5 ** np.arange(1, 7):
        near = [t for t in (best, best - step, best + step) if 0 < t <= counts.size]
        best = min(near, key=lambda t: clip_error(counts, t, qmax))
    return float(best)


def _clip_kl(counts: Int64s, qmax: int) -> float:
    """Find the edge, beyond qmax bins, where the rounded distribution diverges least from the clipped one."""
    return float(min(range(counts.size, qmax, -1), key=lambda t: divergence(counts, t, qmax), default=counts.size))


def divergence(counts: Int64s, t: int, qmax: int) -> float:
    """Compute the Kullback-Leibler divergence, not normalized, after rounding to a grid that ends at edge t."""
    inside = counts[:t].astype(np.float64)
    if not inside.any():
        return math.inf
    clipped = inside.copy()
    clipped[-1] += counts[t:].sum()
    cell = ((2 * np.arange(t) + 1) * qmax + t) // (2 * t)  # bin centers, in steps of t / qmax, rounded
    totals, occupied = np.bincount(cell, inside), np.bincount(cell, inside > 0)
    rounded = np.where(inside > 0, (totals / np.maximum(occupied, 1))[cell], 0.0)
    if clipped[-1] > 0 and rounded[-1] == 0:
        rounded[-1] = 1e-4  # MXNet's smoothing
    held = clipped > 0
    p, q = clipped[held], rounded[held]
    return float(np.sum(p * np.log(p / q)) - p.sum() + q.sum())


# --- Weights to integers and back -------------------------------------------------------------------------------------


def round_half_up(x: NDArray) -> NDArray:
    """Round ties up: the paper's Q(x) = floor(x + 1/2)."""
    return np.floor(x + 0.5)


def _grid_units(w: Floats, scale: Floats) -> Floats:
    """Compute w / scale in float32, one scale or one for each output channel."""
    return (w / np.broadcast_to(scale, w.shape[:1]).reshape(-1, *[1] * (w.ndim - 1))).astype(np.float32)


def quantize_weight(
    w: Floats, scale: Floats, source: Int64s, parts: Int32s, offset: Int32s, groups: int, bits: int, aware: bool
) -> Ints:
    """Quantize the split weight to int8 [O, C + n, ...], in double.

    Part i of n is v = (u + 1/2 + i) / n - 1/2 where aware, else u / n, and rounds to floor(v + 1/2). That 1/2 is added
    before the division: the quotient is rounded, but neither to an integer nor beyond one.
    """
    qmax = grid(bits, True)[1]
    u = gather(_grid_units(w, scale), source, groups).astype(np.float64)
    parts, offset = (part.reshape(groups, 1, -1, 1) for part in (parts, offset))
    added = 0.5 + offset if aware else parts / 2
    ints = np.clip(np.floor((u + added) / parts), -qmax, qmax).astype(np.int8)
    return ints.reshape(w.shape[0], source.size // groups, *w.shape[2:])


def squant_weight(
    w: Floats, scale: Floats, source: Int64s, parts: Int32s, offset: Int32s, groups: int, bits: int
) -> Ints:
    """Quantize to int8 [O, C + n, ...] and move integers so that rounding errors cancel (csrc/ocs.h).

    What moves is T, the sum of a channel's integers and its copies'; part i of n of it is floor((T + i) / n).
    """
    qmax = grid(bits, True)[1]
    nearest = quantize_weight(w, scale, source, parts, offset, groups, bits, True)
    ints = _grouped(nearest, groups).astype(np.int64)
    u = _grouped(_grid_units(w, scale), groups)
    within = source.reshape(groups, -1) - np.arange(groups)[:, None] * w.shape[1]
    parts, offset = (part.reshape(groups, -1).astype(np.int64) for part in (parts, offset))
    for g in range(groups):
        own = [(within[g] == c).nonzero()[0] for c in range(w.shape[1])]
        lowest, highest = -qmax * parts[g] - offset[g], (qmax + 1) * parts[g] - 1 - offset[g]
        low, high = [lowest[each].max() for each in own], [highest[each].min() for each in own]
        for row, of_row in zip(ints[g], u[g], strict=True):
            before = np.array([row[each].sum(0) for each in own]).reshape(of_row.shape)
            after = _squant_row(before.copy(), of_row, low, high)
            for c, k in np.argwhere(after != before):
                row[own[c], k] = (after[c, k] + offset[g][own[c]]) // parts[g][own[c]]
    return ints.astype(np.int8).reshape(nearest.shape)


def _squant_row(total: Int64s, u: Floats, low: list[int], high: list[int]) -> Int64s:
    """Move the sums [C, K] of one output channel; low and high: the range of each channel's sum."""
    error = np.clip((total.astype(np.float32) - u) * np.float32(SQUANT_STEP), -SQUANT_LIMIT, SQUANT_LIMIT).astype(
        np.int64
    )

    def candidates(c: int, sign: int) -> list[int]:
        """List what in filter c may move a step against this sign, the largest error first, then the lowest index."""
        own = [k for k in range(u.shape[1]) if error[c, k] * sign > 0 and low[c] <= total[c, k] - sign <= high[c]]
        return sorted(own, key=lambda k: -abs(error[c, k]))

    def move(c: int, k: int, sign: int) -> None:
        """Move one sum a step against this sign."""
        total[c, k] -= sign
        error[c, k] -= sign * SQUANT_STEP

    for c in range(u.shape[0] if u.shape[1] > 1 else 0):
        e = error[c].sum()
        for k in candidates(c, np.sign(e))[: _steps(e)]:
            move(c, k, np.sign(e))
    of_filter = error.sum(1)
    E = of_filter.sum()
    filters = [c for c in range(u.shape[0]) if of_filter[c] * np.sign(E) > 0 and candidates(c, np.sign(E))]
    for c in sorted(filters, key=lambda c: -abs(of_filter[c]))[: _steps(E)]:
        move(c, candidates(c, np.sign(E))[0], np.sign(E))
    return total


def _steps(error: np.int64) -> int:
    """Compute floor(|error| + 1/2) in grid steps."""
    return int(abs(error) + SQUANT_STEP // 2) // SQUANT_STEP


def gptq_weight(
    w: Floats,
    scale: Floats,
    source: Int64s,
    parts: Int32s,
    offset: Int32s,
    groups: int,
    bits: int,
    second: NDArray[np.float64],
) -> Ints:
    """Quantize to int8 [O, C + n, ...] by Frantar et al.'s equations 2 and 3, second [groups, C K, C K].

    H's diagonal is damped by 0.03 of its mean. The column with the largest diagonal comes first; each one's error is
    compensated by the inverse of H in those that are left, and then goes out of the inverse. What is rounded is M; part
    i of n of it is floor((M + i) / n).
    """
    qmax, C, K = grid(bits, True)[1], w.shape[1], math.prod(w.shape[2:])
    u = _grouped(_grid_units(w, scale), groups).astype(np.float64)
    ints = np.zeros((groups, u.shape[1], source.size // groups, K), np.int8)
    within = source.reshape(groups, -1) - np.arange(groups)[:, None] * C
    parts, offset = (part.reshape(groups, -1).astype(np.int64) for part in (parts, offset))
    for g in range(groups):
        diagonal = np.diag(second[g])
        left = [int(i) for i in np.argsort(-diagonal, kind="stable")]
        inverse = np.linalg.inv((second[g] + np.eye(C * K) * (0.03 * diagonal.mean() or 1))[np.ix_(left, left)])
        v = u[g].reshape(-1, C * K).copy()
        while left:
            c, k = divmod(left[0], K)
            own = (within[g] == c).nonzero()[0]
            split = (round_half_up(v[:, left[0], None]).astype(np.int64) + offset[g][own]) // parts[g][own]
            ints[g, :, own, k] = np.clip(split, -qmax, qmax).T
            error = v[:, left[0]] - ints[g, :, own, k].sum(0, dtype=np.int64)
            v[:, left] -= np.outer(error, inverse[0]) / inverse[0, 0]
            inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
            left.pop(0)
    return ints.reshape(w.shape[0], -1, *w.shape[2:])


def fold(ints: Ints, scale: Floats, source: Int64s, groups: int, channels: int) -> Floats:
    """Sum each channel's integers and its copies', times scale: float32 [O, channels, ...]."""
    flat = ints.reshape(*ints.shape[:2], math.prod(ints.shape[2:])).astype(np.int64)
    total = np.zeros((ints.shape[0], channels, flat.shape[2]), np.int64)
    rows = np.arange(ints.shape[0]).reshape(groups, -1)
    for g, columns in enumerate(source.reshape(groups, -1) - np.arange(groups)[:, None] * channels):
        for j, c in enumerate(columns):
            total[rows[g], c] += flat[rows[g], j]
    scales = np.broadcast_to(scale, ints.shape[:1]).reshape(-1, 1, 1)
    return (total.astype(np.float32) * scales).reshape(ints.shape[0], channels, *ints.shape[2:])


def weight_error(w: Floats, ints: Ints, scale: Floats, source: Int64s, groups: int) -> NDArray[np.float64]:
    """Sum w^2 and (w - w_hat)^2, float64 [2]: per row in eight interleaved partial sums, all in order."""
    difference = w - fold(ints, scale, source, groups, w.shape[1])
    return np.array([_sum_of_squares(w), _sum_of_squares(difference)])


def output_error(w: Floats, ints: Ints, scale: Floats, source: Int64s, groups: int, gain: float) -> NDArray[np.float64]:
    """Sum rows d = w_hat - w in the quadratic form H, and gain times what their gain errors are in it: float64 [O].

    H = (I + 1 1^T of each filter + 1 1^T) / 3; see functional.output_error.
    """
    C, K = w.shape[1], math.prod(w.shape[2:])
    H = (np.eye(C * K) + np.kron(np.eye(C), np.ones((K, K))) + np.ones((C * K, C * K))) / 3
    w_hat = fold(ints, scale, source, groups, C)
    error = np.zeros(w.shape[0])
    for o in range(w.shape[0]):
        row = w[o].ravel().astype(np.float64)
        d = w_hat[o].ravel().astype(np.float64) - row
        change = d @ row / (row @ row) if row.any() else 0.0
        error[o] = d @ H @ d + gain * change**2 * (row @ H @ row)
    return error


def _sum_of_squares(x: Floats) -> np.float64:
    """Sum x^2 in the order of the kernels."""
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:])).astype(np.float64)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
    total = np.float64(0)
    for row in padded:
        lanes, of_row = np.zeros(8), np.float64(0)
        for eight in row.reshape(-1, 8):
            lanes += eight * eight
        for lane in lanes:
            of_row += lane
        total += of_row
    return total


# --- Any array to the grid and back -----------------------------------------------------------------------------------


def quantize(x: Floats, scale: float, bits: int, signed: bool) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Compute clamp(round_half_even(x / scale)) as int8 or uint8; NaN gives 0."""
    on_grid = np.clip(np.rint(x / np.float32(scale)), *grid(bits, signed))
    return np.nan_to_num(on_grid, nan=0.0).astype(np.int8 if signed else np.uint8)


def dequantize(q: NDArray, scale: Floats) -> Floats:
    """Compute q * scale, with one scale or one per entry of the first axis."""
    scale = np.asarray(scale, np.float32)
    return q.astype(np.float32) * scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))


def fake_quantize(x: Floats, scale: float, bits: int, signed: bool) -> Floats:
    """Compute scale * clamp(round_half_even(x / scale)); NaN stays, zero comes out as +0."""
    return (np.clip(np.rint(x / np.float32(scale)), *grid(bits, signed)) + np.float32(0)) * np.float32(scale)


# --- k bits -----------------------------------------------------------------------------------------------------------


def pack(ints: Ints, bits: int) -> NDArray[np.uint8]:
    """Write the codes q + qmax bit after bit, low bits first, as bytes [ceil(N bits / 8)]."""
    codes = (ints.ravel().astype(np.int64) + grid(bits, True)[1]).astype(np.uint8)
    stream = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")


def unpack(packed: NDArray[np.uint8], numel: int, bits: int) -> Ints:
    """Read the integers int8 [numel] that pack wrote."""
    stream = np.unpackbits(packed, count=numel * bits, bitorder="little").reshape(numel, bits)
    codes = np.packbits(stream, axis=1, bitorder="little").ravel()
    return (codes.astype(np.int64) - grid(bits, True)[1]).astype(np.int8)
