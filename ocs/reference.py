"""The plain numpy twin of every kernel: the definition that the tests compare against, literal rather than fast.

Signatures and dtypes are those of `ocs._C` and `torch.ops.ocs`. Weights are [O, C, ...]; C here counts the input
channels of one group, n the splits of one group.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int8]
Plan = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], Floats]

# --- Where the outliers are -------------------------------------------------------------------------------------------


def abs_max(x: Floats) -> Floats:
    """max|x| as float32 [], 0 for an empty array."""
    return np.abs(x).max(initial=np.float32(0))


def histogram(x: Floats, bins: int, limit: float) -> NDArray[np.int64]:
    """Counts int64 [bins] of |x| over [0, limit], what lies beyond in the last bin."""
    width = np.float32(limit)
    if width == 0:
        return np.bincount([0] * x.size, minlength=bins)
    position = np.abs(x).ravel() / width * np.float32(bins)
    return np.bincount(np.fmin(position, bins - 1).astype(np.int64), minlength=bins)


def channel_max(w: Floats, groups: int) -> Floats:
    """max|w| of each input channel [groups C]."""
    return np.abs(_grouped(w, groups)).max(axis=(1, 3), initial=np.float32(0)).ravel()


def _grouped(w: NDArray, groups: int) -> NDArray:
    """View of w as [groups, O / groups, C, K]."""
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], math.prod(w.shape[2:]))


# --- Which channels to split: section 3 -------------------------------------------------------------------------------


def split_plan(channel_max: Floats, groups: int, splits: int) -> Plan:
    """(source, depth, offset, split_max), each [groups (C + splits)]: halve the largest channel, `splits` times."""
    parts = []
    for g, largest in enumerate(channel_max.reshape(groups, -1)):
        source = list(range(g * largest.size, (g + 1) * largest.size))
        depth, offset, split_max = [0] * largest.size, [0] * largest.size, list(largest)
        for _ in range(splits):
            c = int(np.argmax(split_max))
            source.append(source[c])
            halved = split_max[c] > 0  # zeros are copied without counting as halved
            offset.append(offset[c] + halved * 2 ** depth[c])
            depth[c] += halved
            depth.append(depth[c])
            split_max[c] = split_max[c] * np.float32(0.5)
            split_max.append(split_max[c])
        parts.append((source, depth, offset, split_max))
    source, depth, offset, split_max = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return source.astype(np.int64), depth.astype(np.int32), offset.astype(np.int32), split_max.astype(np.float32)


def pick_channels(w: NDArray, splits: int) -> list[int]:
    """The paper's procedure as written, on one group: look at the whole tensor for its largest |w|, halve, repeat.

    Returns the expanded channels that were split, in order; split_channels(w, picks, False) is the split weight.
    """
    picks = []
    for _ in range(splits):
        axes = tuple(i for i in range(w.ndim) if i != 1)
        picks.append(int(np.argmax(np.abs(w).max(axis=axes))))
        w, _ = split_channels(w, picks[-1:], False)
    return picks


def split_channels(w: NDArray, picks: list[int], quantization_aware: bool) -> tuple[NDArray, NDArray[np.int64]]:
    """The weight [O, C + n, ...], each picked channel halved into itself and a copy at the end, and the source [C + n].

    (w - 1/2) / 2 and (w + 1/2) / 2 where quantization_aware (w in grid units), w / 2 both where not.
    """
    half = 0.5 if quantization_aware else 0.0
    source = np.arange(w.shape[1])
    for c in picks:
        w = np.concatenate([w, (w[:, c : c + 1] + half) / 2], axis=1)
        w[:, c] = (w[:, c] - half) / 2
        source = np.append(source, source[c])
    return w, source


def output_max(w: Floats, source: NDArray[np.int64], depth: NDArray[np.int32], groups: int) -> Floats:
    """max|w| of each output channel after splitting [O]."""
    expanded = gather(w, source, groups)
    halved = np.ldexp(np.float32(1), -depth).astype(np.float32).reshape(groups, 1, -1, 1)
    return np.abs(expanded * halved).max(axis=(2, 3), initial=np.float32(0)).ravel()


def gather(w: NDArray, source: NDArray[np.int64], groups: int) -> NDArray:
    """[groups, O / groups, C + n, K]: each expanded channel's original weights."""
    within = source.reshape(groups, -1) - np.arange(groups)[:, None] * w.shape[1]
    return np.stack([part[:, columns] for part, columns in zip(_grouped(w, groups), within, strict=True)])


# --- Weights to integers and back -------------------------------------------------------------------------------------


def round_half_up(x: NDArray) -> NDArray:
    """The paper's Q(x) = floor(x + 1/2)."""
    return np.floor(x + 0.5)


def quantize_weight(
    w: Floats,
    scale: Floats,
    source: NDArray[np.int64],
    depth: NDArray[np.int32],
    offset: NDArray[np.int32],
    groups: int,
    bits: int,
    quantization_aware: bool,
) -> Ints:
    """Integers int8 [O, C + n, ...] of the split weight: the halvings in grid units one by one, in double."""
    qmax = 2 ** (bits - 1) - 1
    scales = np.broadcast_to(scale, w.shape[:1]).reshape(-1, *[1] * (w.ndim - 1))
    u = gather((w / scales).astype(np.float32), source, groups).astype(np.float64)
    depth, offset = (part.reshape(groups, 1, -1, 1) for part in (depth, offset))
    for level in range(int(depth.max(initial=0))):
        half = np.where((offset >> level) & 1, 0.5, -0.5) if quantization_aware else 0.0
        u = np.where(level < depth, (u + half) / 2, u)
    ints = np.clip(round_half_up(u), -qmax, qmax).astype(np.int8)
    return ints.reshape(w.shape[0], source.size // groups, *w.shape[2:])


def fold(ints: Ints, scale: Floats, source: NDArray[np.int64], groups: int, channels: int) -> Floats:
    """float32 [O, channels, ...]: scale times the sum of each channel's integers and its copies'."""
    flat = ints.reshape(*ints.shape[:2], math.prod(ints.shape[2:])).astype(np.int64)
    total = np.zeros((ints.shape[0], channels, flat.shape[2]), np.int64)
    rows = np.arange(ints.shape[0]).reshape(groups, -1)
    for g, columns in enumerate(source.reshape(groups, -1) - np.arange(groups)[:, None] * channels):
        for j, c in enumerate(columns):
            total[rows[g], c] += flat[rows[g], j]
    scales = np.broadcast_to(scale, ints.shape[:1]).reshape(-1, 1, 1)
    return (total.astype(np.float32) * scales).reshape(ints.shape[0], channels, *ints.shape[2:])


def weight_error(w: Floats, ints: Ints, scale: Floats, source: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """Sums float64 [2] of w^2 and of (w - w_hat)^2: per row in eight interleaved partial sums, all in order."""
    difference = w - fold(ints, scale, source, groups, w.shape[1])
    return np.array([_sum_of_squares(w), _sum_of_squares(difference)])


def _sum_of_squares(x: Floats) -> np.float64:
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


def grid(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and largest integer of k bits: -qmax .. qmax, or 0 .. 2^k - 1."""
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def quantize(x: Floats, scale: float, bits: int, signed: bool) -> NDArray[np.int8] | NDArray[np.uint8]:
    """clamp(round_half_even(x / scale)) as int8 or uint8; NaN gives 0."""
    on_grid = np.clip(np.rint(x / np.float32(scale)), *grid(bits, signed))
    return np.nan_to_num(on_grid, nan=0.0).astype(np.int8 if signed else np.uint8)


def dequantize(q: NDArray, scale: Floats) -> Floats:
    """Q * scale, with one scale or one per entry of the first axis."""
    scale = np.asarray(scale, np.float32)
    return q.astype(np.float32) * scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))


def fake_quantize(x: Floats, scale: float, bits: int, signed: bool) -> Floats:
    """Scale * clamp(round_half_even(x / scale)); NaN stays, zero comes out as +0."""
    return (np.clip(np.rint(x / np.float32(scale)), *grid(bits, signed)) + np.float32(0)) * np.float32(scale)


# --- k bits -----------------------------------------------------------------------------------------------------------


def pack(ints: Ints, bits: int) -> NDArray[np.uint8]:
    """The codes q + qmax bit after bit, low bits first, as bytes [ceil(N bits / 8)]."""
    codes = (ints.ravel().astype(np.int64) + grid(bits, True)[1]).astype(np.uint8)
    stream = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")


def unpack(packed: NDArray[np.uint8], numel: int, bits: int) -> Ints:
    """And back: int8 [numel]."""
    stream = np.unpackbits(packed, count=numel * bits, bitorder="little").reshape(numel, bits)
    codes = np.packbits(stream, axis=1, bitorder="little").ravel()
    return (codes.astype(np.int64) - grid(bits, True)[1]).astype(np.int8)
