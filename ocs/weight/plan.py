"""Step 1 of quantizing a weight: which channels to split, as a plan (section 3 of the paper)."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ocs.kernels.ops import kernels
from ocs.weight import selection
from ocs.weight.arguments import (
    as_numpy,
    check_array,
    check_bits,
    check_choice,
    check_clip,
    check_groups,
    check_moments,
    check_ratio,
    check_rounding,
    check_select,
    check_values,
)
from ocs.weight.error import remaining_error
from ocs.weight.gptq import Hessian
from ocs.weight.quantize_plan import quantize_plan
from ocs.weight.types import Array, Choice, Granularity, QuantizedWeight, Rounding, Scheme, Select, Split, SplitPlan


def choose_splits(w: Array, splits: int, select: Select, how: Scheme) -> SplitPlan:
    """Step 1: functional.plan_splits with the number of splits in each group, 0 .. C."""
    check_select(select)
    channel_max, groups = _channel_max(w, how.groups), how.groups
    plan = SplitPlan(*kernels(w).split_plan(channel_max, groups, splits), channel_max)
    exact = how.clip == "none" and how.granularity == "tensor"  # the largest value is all that counts
    if select == "max" or not splits or (select == "error" and exact):
        return plan
    if callable(select):
        rows, C = w.shape[0] // groups, w.shape[1]
        chosen = (_chosen(select, w[g * rows : (g + 1) * rows], C, splits) for g in range(groups))
        return plan_channels(w, [g * C + c for g, of_group in enumerate(chosen) for c in of_group], groups)
    return _better_plan(w, plan, splits, how)


def _better_plan(w: Array, plan: SplitPlan, splits: int, how: Scheme) -> SplitPlan:
    """The one of ocs.select, or the paper's where that leaves less error."""
    theirs, C, groups = quantize_plan(w, plan, how), w.shape[1], how.groups
    magnitudes = np.abs(as_numpy(w.float() if isinstance(w, Tensor) else w).astype(np.float64))
    magnitudes = magnitudes.reshape(groups, w.shape[0] // groups, C, math.prod(w.shape[2:]))
    thresholds = np.broadcast_to(as_numpy(theirs.quantized.threshold).astype(np.float64), w.shape[:1])
    channels = []
    for g, (of_group, t) in enumerate(zip(magnitudes, thresholds.reshape(groups, -1), strict=True)):
        if how.clip == "none":
            chosen = selection.lowering_thresholds(of_group.max(2, initial=0.0), splits)
        else:
            chosen = selection.lowering_saturation(of_group, t, splits)
        channels += [g * C + c for c in chosen]
    other = plan_channels(w, channels, groups)
    ours = quantize_plan(w, other, how)
    return other if remaining_error(w, ours, how) < remaining_error(w, theirs, how) else plan


def _chosen(select: Choice, w: Array, channels: int, splits: int) -> list[int]:
    """What a user's choice returned for one group, checked."""
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


def plan_channels(w: Array, channels: Iterable[int], groups: int = 1) -> SplitPlan:
    """The plan that splits the channels of your choice, each time the largest of their copies.

    Args:
        w: [O, C, ...], C the input channels (of one group).
        channels: n for each group, n <= C, group by group, in order; a channel is split as often as it is named. They
            are numbered over all groups, 0 .. groups C - 1.
        groups: of a grouped convolution; divides O.

    quantize_plan takes it from there.
    """
    w = check_values("w", check_array("w", w, min_rank=2))
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
    plan = selection.plan_of(as_numpy(channel_max), channels.reshape(groups, n), groups)
    if isinstance(w, Tensor):
        plan = (torch.from_numpy(each).to(w.device) for each in plan)
    return SplitPlan(*plan, channel_max)


def _channel_max(w: Array, groups: int) -> Array:
    channel_max = kernels(w).channel_max(w, groups)
    infinite = (~np.isfinite(as_numpy(channel_max))).nonzero()[0]
    if infinite.size:
        raise ValueError(f"w holds NaN or Inf as float32 (in input channel {infinite[0]}): repair the weights first")
    return channel_max


def splits_for(r: float, channels: int, groups: int) -> int:
    """Splits in each group, ceil(r C) with C the channels of a group; none where each group is one channel of several.

    The product is taken a little short, so that 0.07 * 100 = 7.000000000000001 gives 7.
    """
    depthwise = groups > 1 and channels == 1
    return 0 if depthwise else math.ceil(r * channels * (1 - 1e-12))


def quantize_weight(
    w: Array,
    bits: int,
    r: float = 0.0,
    clip: str | float = "none",
    granularity: Granularity = "tensor",
    split: Split = "qa",
    rounding: Rounding = "nearest",
    groups: int = 1,
    select: Select = "max",
    moments: Array | None = None,
) -> QuantizedWeight:
    """Split the outlier channels of a weight and quantize it (section 3 of the paper).

    Args:
        w: [O, C, ...], C the input channels (of one group).
        bits: 2 to 8.
        r: expand ratio in [0, 1]; each group's C channels get n = ceil(r C) splits (depthwise weights none).
        clip: where the split weights saturate, see clip_threshold; or "auto": of none, mse and fractions of the largest
            |w| what leaves the least output_error, measured by `moments` where these are given; for each output channel
            of its own where granularity="channel".
        granularity: one scale per "tensor", or per output "channel".
        split: "qa" (quantization-aware: exact) or "naive" (halves).
        rounding: "nearest": floor(w / scale + 1/2). Or "squant", for split="qa": from there, some integers move a step
            so that rounding errors cancel (Guo et al., ICLR 2022), those with the largest errors first. In each filter
            whose errors sum to e, floor(|e| + 1/2) move; then in each output channel, whose errors sum to E,
            floor(|E| + 1/2) filters with e of its sign move one more each. None leaves the grid, saturated ones stay.
            Or "gptq", for split="qa": column by column, what rounding one does to the outputs is compensated in those
            not yet rounded, as far as its inputs go together with theirs (Frantar et al., ICLR 2023; see ocs.gptq).
        groups: of a grouped convolution; divides O.
        select: which channels to split, see plan_splits.
        moments: for rounding="gptq", the sum or mean of x x^T over the vectors x [C K] that the weight meets, as w has
            them (the K values of a filter side by side): [C K, C K], or for G groups [G, C K, C K], of any float dtype.

    Raises:
        TypeError: w or moments is no float array or tensor.
        ValueError: w has fewer than two dimensions or holds NaN or Inf, an option is out of range, or moments are
            missing where rounding="gptq" needs them, given where not, of another shape, not finite or none.
    """
    w, how = _checked(w, Scheme(bits, clip, granularity, split, rounding, groups))
    second = check_moments(moments, rounding, w, groups)
    how = how._replace(hessian=None if second is None else Hessian(second))
    splits = splits_for(check_ratio("r", r), w.shape[1], groups)
    return quantize_plan(w, choose_splits(w, splits, select, how), how).quantized


def _checked(w: Array, how: Scheme) -> tuple[Array, Scheme]:
    """What a user gave, or what is wrong with it."""
    w = check_values("w", check_array("w", w, min_rank=2))
    check_rounding(how.rounding, how.split)
    check_choice("granularity", how.granularity, get_args(Granularity))
    check_groups(how.groups, w.shape[0])
    check_clip("clip", how.clip, auto=True)
    return w, how._replace(bits=check_bits("bits", how.bits))


def plan_splits(
    w: Array,
    r: float,
    groups: int = 1,
    select: Select = "max",
    bits: int = 8,
    clip: str | float = "none",
    granularity: Granularity = "tensor",
    split: Split = "qa",
    rounding: Literal["nearest", "squant"] = "nearest",
) -> SplitPlan:
    """Step 1: which channels to split; see quantize_weight for w [O, C, ...], r, groups, and how it will be quantized.

    select: "max" is the paper's rule: the largest |w|, again and again, whatever follows. "error": the channel whose
        split lowers the remaining error most: the sum over output channels of threshold^2, where each has its own and
        nothing is clipped; else the squared error of saturation at the threshold that the paper's picks lead to. The
        paper's picks stay where they leave less. Or a callable (w, n) that is given one group's weight, float32
        [O, C, ...], and returns the n channels to split, 0 .. C - 1, in order and repeated as often as they are split.

    Errors are those of quantize_weight.
    """
    check_choice("rounding", rounding, get_args(Rounding)[:2])  # gptq's splits are quantize_weight's to choose
    w, how = _checked(w, Scheme(bits, clip, granularity, split, rounding, groups))
    return choose_splits(w, splits_for(check_ratio("r", r), w.shape[1], groups), select, how)
