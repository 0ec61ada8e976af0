"""Which channels to split: beyond the paper's largest value, those whose splits lower the remaining error most.

Whatever chooses, a plan is only how often each channel is split: always the largest of its copies, the lowest where
they tie, is halved. So the copies of a channel split k times, numbered as they came, are known: copy j halves copy
j - 2^m, m = floor(log2 j), and is part j of the channel. 2^M <= k + 1 < 2^(M + 1): copies have depth M or M + 1.

Everything here is numpy on the CPU, in double: no choice depends on the device that a weight is on.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from ocs.kernels.constants import MAX_DEPTH

Floats = NDArray[np.float64]


def plan_of(
    channel_max: NDArray[np.float32], channels: NDArray[np.int64], groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """(source, depth, offset, split_max), each [groups (C + n)]: the plan that splits these channels in this order.

    channel_max: [groups C]; channels: [groups, n], numbered 0 .. groups C - 1. It is what ocs_split_plan makes of its
    own choices, zeros (which are copied without being halved) included.
    """
    own = np.arange(channel_max.size).reshape(groups, -1)
    source = np.concatenate([own, channels.reshape(groups, -1)], 1).ravel()
    copy, last = _occurrences(source), np.bincount(source, minlength=channel_max.size) - 1
    maxima = [channel_max]
    while len(maxima) <= MAX_DEPTH + 1 and 2 ** (len(maxima) - 1) <= last.max(initial=0):
        maxima.append(maxima[-1] * np.float32(0.5))
    halvings = sum((each > 0 for each in maxima), np.zeros(channel_max.size, np.int64))[source]  # until it is 0
    last = np.minimum(last[source], 2**halvings - 1)  # copies that come later are of zeros
    level = _log2(last + 1)
    split = (copy % 2**level) + 2**level <= last
    halved = copy <= last
    depth = np.where(halved, level + split, halvings).astype(np.int32)
    if depth.max(initial=0) > MAX_DEPTH:
        raise ValueError(f"a channel is split more than {MAX_DEPTH} deep: choose it less often")
    return source, depth, np.where(halved, copy, 0).astype(np.int32), np.stack(maxima)[depth, source]


def _occurrences(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each value came before."""
    order = x.argsort(kind="stable")
    ordered = x[order]
    first = np.searchsorted(ordered, ordered)
    count = np.empty_like(x)
    count[order] = np.arange(x.size) - first
    return count


def _log2(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """floor(log2 x) of positive integers below 2^53."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1


# --- By the error that is left: sum over output channels of what rounding and saturation leave ------------------------


def lowering_thresholds(largest: Floats, splits: int) -> list[int]:
    """Channels whose splits lower sum_o t_o^2 most, t_o = max_c |w_oc| after splitting: rounding's error is like t_o^2.

    largest: [O, C], max|w| of each filter. To halve a channel's largest value takes one split, then two, four ...: the
    channel is taken whose next halving lowers the sum most per split; where none does, that with the largest |w|.
    """
    largest, splits_of, level = largest.copy(), np.zeros(largest.shape[1], np.int64), np.zeros(largest.shape[1], int)
    picks: list[int] = []
    first, top, second = _two_largest(largest)
    while len(picks) < splits:
        needed = 2 ** (level + 1) - 1 - splits_of
        halved = np.maximum(second, top / 2)
        gain = np.bincount(first, top * top - halved * halved, largest.shape[1]) / needed
        gain[needed > splits - len(picks)] = 0
        c = int(gain.argmax())
        count = int(needed[c])
        if not gain[c] > 0:
            c, count = int(largest.max(0).argmax()), 1
        picks += [c] * count
        splits_of[c] += count
        if count == needed[c]:
            level[c] += 1
            changed = largest[:, c] >= second
            largest[:, c] /= 2
            first[changed], top[changed], second[changed] = _two_largest(largest[changed])
    return picks


def _two_largest(x: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Of each row: where the largest value is, that value, and the next one."""
    first, row = x.argmax(1), np.arange(len(x))
    top = x[row, first]
    rest = x.copy()
    rest[row, first] = 0
    return first, top, rest.max(1)


def lowering_saturation(magnitudes: Floats, thresholds: Floats, splits: int) -> list[int]:
    """Channels whose splits lower the squared error of saturation most, at fixed thresholds.

    magnitudes: |w| [O, C, K]; thresholds: [] or [O]. Copies of depth m saturate by |w| 2^-m - t_o each; what they lose
    together is squared. Where no value saturates any more, the largest |w| is split.
    """
    w = magnitudes.transpose(1, 0, 2)
    t = np.broadcast_to(thresholds, len(magnitudes))[:, None]
    errors = [_saturation(w, t, k) for k in (0, 1)]
    heap = [(-gain, c, 0, rest) for c, (gain, rest) in enumerate(zip(errors[0] - errors[1], errors[1], strict=True))]
    heapq.heapify(heap)
    picks: list[int] = []
    while len(picks) < splits and heap[0][0] < 0:
        _, c, k, error = heap[0]
        picks.append(c)
        rest = float(_saturation(w[c : c + 1], t, k + 2)[0])
        heapq.heapreplace(heap, (rest - error, c, k + 1, rest))
    counts = np.bincount(np.array(picks, np.int64), minlength=len(w))
    return picks + _largest(w.max((1, 2), initial=0.0), counts, splits - len(picks))


def _saturation(w: Floats, t: Floats, splits: int) -> Floats:
    """[C]: the squared error of channels [C, O, K] split so often."""
    level = (splits + 1).bit_length() - 1
    deeper = 2 * (splits + 1 - 2**level)  # copies at depth level + 1, the others at depth level
    lost = (splits + 1 - deeper) * np.maximum(w / 2**level - t, 0)
    if deeper:
        lost += deeper * np.maximum(w / 2 ** (level + 1) - t, 0)
    return np.einsum("cok,cok->c", lost, lost)


def _largest(channel_max: Floats, counts: NDArray[np.int64], splits: int) -> list[int]:
    """The paper's rule, from channels that were split so often: the channel with the largest |w|."""
    heap = [(-largest / 2 ** _log2(k + 1), c) for c, (largest, k) in enumerate(zip(channel_max, counts, strict=True))]
    heapq.heapify(heap)
    counts, picks = counts.copy(), []
    for _ in range(splits):
        c = heap[0][1]
        picks.append(c)
        counts[c] += 1
        heapq.heapreplace(heap, (-channel_max[c] / 2 ** _log2(counts[c] + 1), c))
    return picks
