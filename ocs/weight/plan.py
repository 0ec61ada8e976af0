"""Step 1 of quantizing a weight: the plan of its splits, whichever channels they are (section 3 of the paper).

A plan is only how often each channel is split. In equal parts (split="even") a channel split k times is k + 1 of them,
numbered as they came. Else always the largest of its copies, the lowest where they tie, is halved, so that the copies,
numbered as they came, are known: copy j halves copy j - 2^m, m = floor(log2 j), and is part j of the channel.
2^M <= k + 1 < 2^(M + 1): each copy is one of 2^M parts or of 2^(M + 1).
"""

import math
import operator
from collections.abc import Iterable
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocs.kernels.constants import MAX_DEPTH, MAX_PARTS
from ocs.kernels.ops import kernels
from ocs.weight.arguments import check_array, check_choice, check_groups, check_values
from ocs.weight.arrays import array_like, as_numpy
from ocs.weight.types import Array, Split, SplitPlan


def splits_for(r: float, channels: int, groups: int) -> int:
    """Count the splits of each group, ceil(r C) with C its channels; none where each group is one channel of several.

    The product is taken a little short, so that 0.07 * 100 = 7.000000000000001 gives 7.
    """
    depthwise = groups > 1 and channels == 1
    return 0 if depthwise else math.ceil(r * channels * (1 - 1e-12))


def largest_first(w: Array, splits: int, groups: int, split: Split = "qa") -> SplitPlan:
    """Plan by the paper's rule: split the channel with the largest |w| of each group, so many times.

    Its largest |w| is that of its copies after the splits so far.
    """
    channel_max = _channel_max(w, groups)
    return split_plan_of(*kernels(w).split_plan(channel_max, groups, splits, split == "even"), channel_max)


def split_plan_of(source: Array, parts: Array, offset: Array, split_max: Array, channel_max: Array) -> SplitPlan:
    """Make a plan from what the kernel split_plan returns."""
    depth = torch.frexp(parts.float())[1] - 1 if isinstance(parts, Tensor) else np.frexp(np.float32(parts))[1] - 1
    return SplitPlan(source, depth, offset, split_max, channel_max, parts)


def plan_channels(w: Array, channels: Iterable[int], groups: int = 1, split: Split = "qa") -> SplitPlan:
    """Plan to split the channels of your choice, each time the largest of their copies, or where "even" all of them.

    Args:
        w: [O, C, ...], C the input channels (of one group).
        channels: n for each group, n <= C, group by group, in order; a channel is split as often as it is named. They
            are numbered over all groups, 0 .. groups C - 1.
        groups: of a grouped convolution; divides O.
        split: "even" for equal parts; "qa" and "naive" both halve.

    quantize_plan takes it from there, with a Scheme of the same split.
    """
    w = check_values("w", check_array("w", w, min_rank=2))
    check_choice("split", split, get_args(Split))
    check_groups(groups, w.shape[0])
    C, channels = w.shape[1], np.array([operator.index(c) for c in channels], np.int64)
    n = channels.size // groups
    of_group = np.repeat(np.arange(groups), n)
    if n > C or channels.size % groups or not np.array_equal(channels // max(C, 1), of_group):
        raise ValueError(
            f"channels={channels.tolist()}: name at most {C} channels for each of {groups} groups, the same number,"
            f" group by group, from 0 to {groups * C - 1}"
        )
    channel_max = _channel_max(w, groups)
    own = np.arange(groups * C).reshape(groups, C)
    source = np.concatenate([own, channels.reshape(groups, n)], 1).ravel()
    plan = (even_parts if split == "even" else halves)(as_numpy(channel_max), source)
    return split_plan_of(array_like(source, w), *(array_like(part, w) for part in plan), channel_max)


Parts = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]  # parts, offset, split_max of each copy


def even_parts(channel_max: NDArray[np.float32], source: NDArray[np.int64]) -> Parts:
    """Plan equal parts of channels, a part for each time that one is named; as ocs_split_plan does of its choices.

    channel_max: [groups C]; source: [groups (C + n)], numbered 0 .. groups C - 1.
    """
    parts = np.bincount(source, minlength=channel_max.size)[source]
    if parts.max(initial=1) > MAX_PARTS:
        raise ValueError(f"a channel is split into more than {MAX_PARTS} parts: choose it less often")
    copy = occurrences(torch.from_numpy(source)).numpy()
    return parts.astype(np.int32), copy.astype(np.int32), channel_max[source] / np.float32(parts)


def halves(channel_max: NDArray[np.float32], source: NDArray[np.int64]) -> Parts:
    """Plan halves of channels, and halves of these; as ocs_split_plan does of its choices.

    channel_max: [groups C]; source: [groups (C + n)], numbered 0 .. groups C - 1. Zeros are copied, but not halved.
    """
    copy, last = occurrences(torch.from_numpy(source)).numpy(), np.bincount(source, minlength=channel_max.size) - 1
    maxima = [channel_max]
    while len(maxima) <= MAX_DEPTH + 1 and 2 ** (len(maxima) - 1) <= last.max(initial=0):
        maxima.append(maxima[-1] * np.float32(0.5))
    halvings = np.sum(np.stack(maxima) > 0, 0)[source]  # until it is 0
    last = np.minimum(last[source], 2**halvings - 1)  # copies that come later are of zeros
    level = floor_log2(last + 1)
    split = (copy % 2**level) + 2**level <= last
    halved = copy <= last
    depth = np.where(halved, level + split, halvings).astype(np.int32)
    if depth.max(initial=0) > MAX_DEPTH:
        raise ValueError(f"a channel is split more than {MAX_DEPTH} deep: choose it less often")
    parts, offset = np.left_shift(1, depth, dtype=np.int32), np.where(halved, copy, 0).astype(np.int32)
    return parts, offset, np.stack(maxima)[depth, source]


def occurrences(x: Tensor) -> Tensor:
    """Count how often each of these integers [N] came before, int64 [N]."""
    order = x.argsort(stable=True)
    ordered, places = x[order], torch.arange(x.numel(), device=x.device)
    return torch.empty_like(x).scatter(0, order, places - torch.searchsorted(ordered, ordered))


def floor_log2(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Compute floor(log2 x) of positive integers below 2^53."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1


def _channel_max(w: Array, groups: int) -> Array:
    """Find max|w| of each channel, float32 [groups C]; a ValueError where it is not finite."""
    channel_max = kernels(w).channel_max(w, groups)
    infinite = (~np.isfinite(as_numpy(channel_max))).nonzero()[0]
    if infinite.size:
        raise ValueError(f"w holds NaN or Inf as float32 (in input channel {infinite[0]}): repair the weights first")
    return channel_max
