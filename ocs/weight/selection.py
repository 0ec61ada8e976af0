"""Which channels to split: the paper's largest value, a user's rule, or what lowers the remaining error most."""

import heapq
import math
import operator
import reprlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ocs.weight.apply_plan import quantize_plan
from ocs.weight.arguments import check_select
from ocs.weight.arrays import as_numpy
from ocs.weight.error import remaining_error
from ocs.weight.plan import largest_first, plan_channels
from ocs.weight.types import Array, Choice, Scheme, Select, Split, SplitPlan

Floats = NDArray[np.float64]


def choose_splits(w: Array, splits: int, select: Select, scheme: Scheme) -> SplitPlan:
    """Plan so many splits, 0 .. C, in each group of w [O, C, ...]; see functional.plan_splits for `select`."""
    check_select("select", select)
    groups = scheme.groups
    plan = largest_first(w, splits, groups, scheme.split)
    exact = scheme.clip == "none" and scheme.granularity == "tensor"  # the largest value is all that counts
    if select == "max" or not splits or (select == "error" and exact):
        return plan
    if callable(select):
        rows, C = w.shape[0] // groups, w.shape[1]
        return _plan_of(w, (_chosen(select, w[g * rows : (g + 1) * rows], C, splits) for g in range(groups)), scheme)
    return _better_plan(w, plan, splits, scheme)


def _better_plan(w: Array, plan: SplitPlan, splits: int, scheme: Scheme) -> SplitPlan:
    """Plan the splits that lower the remaining error, or keep the paper's plan where that leaves less."""
    theirs, groups = quantize_plan(w, plan, scheme), scheme.groups
    magnitudes = np.abs(as_numpy(w.float() if isinstance(w, Tensor) else w).astype(np.float64))
    magnitudes = magnitudes.reshape(groups, w.shape[0] // groups, w.shape[1], math.prod(w.shape[2:]))
    if scheme.granularity == "group":
        chosen = [lowering_blocks(each.max(2, initial=0.0), splits, scheme.group) for each in magnitudes]
    elif scheme.clip == "none":
        chosen = [lowering_thresholds(each.max(2, initial=0.0), splits, scheme.split) for each in magnitudes]
    else:
        thresholds = np.broadcast_to(as_numpy(theirs.quantized.threshold).astype(np.float64), w.shape[:1])
        of_groups = zip(magnitudes, thresholds.reshape(groups, -1), strict=True)
        chosen = [lowering_saturation(each, t, splits, scheme.split) for each, t in of_groups]
    other = _plan_of(w, chosen, scheme)
    ours = quantize_plan(w, other, scheme)
    return other if remaining_error(w, ours, scheme) < remaining_error(w, theirs, scheme) else plan


def _plan_of(w: Array, chosen: Iterable[list[int]], scheme: Scheme) -> SplitPlan:
    """Plan to split the channels that were chosen in each group, 0 .. C - 1."""
    channels = [g * w.shape[1] + c for g, of_group in enumerate(chosen) for c in of_group]
    return plan_channels(w, channels, scheme.groups, scheme.split)


def _chosen(select: Choice, w: Array, channels: int, splits: int) -> list[int]:
    """Ask a user's rule for the channels of one group, and check what it returned."""
    w = w.float().clone() if isinstance(w, Tensor) else w.astype(np.float32)
    name, chosen = getattr(select, "__name__", repr(select)), select(w, splits)
    try:
        chosen = [operator.index(c) for c in chosen]
    except TypeError:
        raise TypeError(
            f"select={name} returned {reprlib.repr(chosen)}: return {splits} channels as integers"
        ) from None
    if len(chosen) != splits or not all(0 <= c < channels for c in chosen):
        raise ValueError(
            f"select={name} returned {reprlib.repr(chosen)}: return {splits} channels from 0 to {channels - 1}"
        )
    return chosen


# --- By the error that is left: sum over output channels of what rounding and saturation leave ------------------------
# In numpy on the CPU, in double: no choice depends on the device that a weight is on.


def lowering_thresholds(largest: Floats, splits: int, split: Split = "qa") -> list[int]:
    """Choose channels whose splits lower sum_o t_o^2 most, t_o = max_c |w_oc| after splitting, as rounding's error is.

    largest: [O, C], max|w| of each filter. To halve a channel's largest value takes one split, then two, four ...; with
    equal parts, one split takes it from 1 / n to 1 / (n + 1). The channel is taken whose next such step lowers the sum
    most per split; where none does, that with the largest |w|.
    """
    whole, largest, splits_of = largest, largest.copy(), np.zeros(largest.shape[1], np.int64)
    parts, even = np.ones(largest.shape[1], np.int64), split == "even"  # parts: that the largest value is divided by
    picks: list[int] = []
    first, top, second = _two_largest(largest)
    while len(picks) < splits:
        next_parts = parts + 1 if even else 2 * parts
        needed = next_parts - 1 - splits_of
        lower = np.maximum(second, whole[np.arange(len(whole)), first] / next_parts[first])
        gain = np.bincount(first, top * top - lower * lower, largest.shape[1]) / needed
        gain[needed > splits - len(picks)] = 0
        c = int(gain.argmax())
        count = int(needed[c])
        if not gain[c] > 0:
            c, count = int(largest.max(0).argmax()), 1
        picks += [c] * count
        splits_of[c] += count
        if count == needed[c]:
            parts[c] = next_parts[c]
            changed = largest[:, c] >= second
            largest[:, c] = whole[:, c] / parts[c]
            first[changed], top[changed], second[changed] = _two_largest(largest[changed])
    return picks


def lowering_blocks(largest: Floats, splits: int, group: int) -> list[int]:
    """Choose channels whose halves lower sum t_ob^2 most, each once: t_ob the largest |w| of a filter in a block.

    largest: [O, C], max|w| of each filter.
    """
    outputs, C = largest.shape
    blocks = -(-C // group)
    padded = np.zeros((outputs, blocks * group))
    padded[:, :C] = largest
    first, top, second = _two_largest(padded.reshape(-1, group))
    first += np.tile(np.arange(blocks) * group, outputs)
    lower = np.maximum(second, top / 2)
    gain = np.bincount(first, top * top - lower * lower, blocks * group)[:C]
    return np.lexsort((-largest.max(0, initial=0.0), -gain))[:splits].tolist()


def _two_largest(x: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Find where the largest value of each row is, that value, and the next one."""
    first, row = x.argmax(1), np.arange(len(x))
    top = x[row, first]
    rest = x.copy()
    rest[row, first] = 0
    return first, top, rest.max(1)


def lowering_saturation(magnitudes: Floats, thresholds: Floats, splits: int, split: Split = "qa") -> list[int]:
    """Choose channels whose splits lower the squared error of saturation most, at fixed thresholds.

    magnitudes: |w| [O, C, K]; thresholds: [] or [O]. Copies that are one of n parts saturate by |w| / n - t_o each;
    what they lose together is squared. Where no value saturates any more, the largest |w| is split.
    """
    w = magnitudes.transpose(1, 0, 2)
    t = np.broadcast_to(thresholds, len(magnitudes))[:, None]
    errors = [_saturation(w, t, k, split) for k in (0, 1)]
    heap = [(-gain, c, 0, rest) for c, (gain, rest) in enumerate(zip(errors[0] - errors[1], errors[1], strict=True))]
    heapq.heapify(heap)
    picks: list[int] = []
    while len(picks) < splits and heap[0][0] < 0:
        _, c, k, error = heap[0]
        picks.append(c)
        rest = float(_saturation(w[c : c + 1], t, k + 2, split)[0])
        heapq.heapreplace(heap, (rest - error, c, k + 1, rest))
    counts = np.bincount(np.array(picks, np.int64), minlength=len(w))
    return picks + _largest(w.max((1, 2), initial=0.0), counts, splits - len(picks), split)


def _saturation(w: Floats, t: Floats, splits: int, split: Split) -> Floats:
    """Sum the squared error [C] of channels [C, O, K] that are split so often."""
    n = _largest_part(splits, split)
    smaller = 2 * (splits + 1 - n)  # copies that are one of 2 n parts, the others one of n; none where all are equal
    lost = (splits + 1 - smaller) * np.maximum(w / n - t, 0)
    if smaller:
        lost += smaller * np.maximum(w / (2 * n) - t, 0)
    return np.einsum("cok,cok->c", lost, lost)


def _largest_part(splits: int, split: Split) -> int:
    """Compute how many of the largest part of a channel that is split so often would make it up."""
    return splits + 1 if split == "even" else 2 ** ((splits + 1).bit_length() - 1)


def _largest(channel_max: Floats, counts: NDArray[np.int64], splits: int, split: Split) -> list[int]:
    """Choose by the paper's rule, the channel with the largest |w|, from channels that were split so often before."""
    counts, picks = counts.tolist(), []
    heap = [(-w / _largest_part(k, split), c) for c, (w, k) in enumerate(zip(channel_max, counts, strict=True))]
    heapq.heapify(heap)
    for _ in range(splits):
        c = heap[0][1]
        picks.append(c)
        counts[c] += 1
        heapq.heapreplace(heap, (-channel_max[c] / _largest_part(counts[c], split), c))
    return picks
