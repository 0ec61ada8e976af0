"""A weight, step by step: which channels to split, where to clip, the integers, and the error that is left.

The steps of functional.quantize_weight, which checks arguments first.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ocs.kernels.ops import kernels
from ocs.weight import selection
from ocs.weight.arguments import (
    CLIP_METHODS,
    Array,
    Choice,
    Granularity,
    Rounding,
    Select,
    Split,
    as_numpy,
    check_array,
    check_choice,
    check_groups,
    check_select,
    check_values,
    filled_like,
)
from ocs.weight.gptq import Compensation, Hessian, OutputErrors

METHODS = ("none", "mse", "aciq", "kl", "percentile", "std", "sawb")  # what people compare
AUTO = ("none", "mse", *(i / 20 for i in range(4, 20)))  # what clip="auto" chooses from
GAIN = 10.0  # what changes of gain weigh in output_error where the model is not known
BINS, CHANNEL_BINS = 2048, 512  # of the histogram that a threshold is searched in: of a tensor, of an output channel
SMALLEST = np.float32(1e-45).item()  # a positive threshold never gives a scale of zero


class SplitPlan(NamedTuple):
    """Which channels to split (section 3 of the paper), over C + n expanded channels, group by group."""

    source: Array  # int64: the original channel
    depth: Array  # int32: how often this copy was halved
    offset: Array  # int32: which of the 2^depth parts it is in quantization-aware splitting
    split_max: Array  # float32: max|w| after splitting
    channel_max: Array  # float32 [C]: max|w| of the original channels


class QuantizedWeight(NamedTuple):
    """A weight as k-bit integers: w is about scale * ints, a channel's integers and its copies' added up."""

    ints: Array  # int8 [O, C + n, ...]
    scale: Array  # float32 [], or [O] per output channel; always positive
    source: Array  # int64 [C + n]: the original channel of each expanded one, 0 .. C - 1 first (per group)
    threshold: Array  # float32, shaped like scale: the largest magnitude on the grid


class How(NamedTuple):
    """How a weight is quantized once its splits are chosen; see functional.quantize_weight."""

    bits: int
    clip: str | float = "none"
    granularity: Granularity = "tensor"
    split: Split = "qa"
    rounding: Rounding = "nearest"
    groups: int = 1
    hessian: Hessian | None = None  # of what it meets, for rounding="gptq"
    gain: float = GAIN  # see output_error


def choose_splits(w: Array, splits: int, select: Select, how: How) -> SplitPlan:
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


def _better_plan(w: Array, plan: SplitPlan, splits: int, how: How) -> SplitPlan:
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


class Quantization(NamedTuple):
    """A quantized weight, the clip method that gave its threshold, and the sums of w^2 and of (w - w_hat)^2."""

    quantized: QuantizedWeight
    clip: str | float
    error: tuple[float, float]


def quantize_plan(w: Array, plan: SplitPlan, how: How) -> Quantization:
    """Steps 2 and 3: threshold and integers."""
    compensation = Compensation(w, *plan[:3], how.bits, how.hessian) if how.rounding == "gptq" else None
    if how.clip == "auto":
        clip, threshold = _least_output_error(w, plan, how, compensation)
    else:
        clip, (threshold,) = how.clip, split_thresholds(w, plan, how.bits, (how.clip,), how.granularity, how.groups)
    (quantized,) = _quantize_each(w, plan, [threshold], how, compensation)
    return Quantization(quantized, clip, weight_error(w, quantized, how.groups))


def _quantize_each(
    w: Array, plan: SplitPlan, thresholds: list[Array], how: How, compensation: Compensation | None
) -> Iterator[QuantizedWeight]:
    """Step 3 for each threshold; GPTQ's integers are nearest rounding of a weight on the grid."""
    rounding, weights = how.rounding, repeat(w, len(thresholds))
    if compensation is not None:
        rounding, weights = "nearest", compensation.on_grids([scale_for(each, qmax(how.bits)) for each in thresholds])
    for weight, threshold in zip(weights, thresholds, strict=True):
        yield quantize_split(weight, plan, threshold, how.bits, how.split, rounding, how.groups)


def _least_output_error(
    w: Array, plan: SplitPlan, how: How, compensation: Compensation | None
) -> tuple[str | float, Array]:
    """Of AUTO, the first with the least output error, and its threshold; "auto" where channels differ."""
    errors, thresholds = [], split_thresholds(w, plan, how.bits, AUTO, how.granularity, how.groups)
    for quantized in _quantize_each(w, plan, thresholds, how, compensation):
        if compensation:
            error = as_numpy(compensation.error(fold(quantized, w.shape[1], how.groups), how.gain))
        else:
            error = as_numpy(output_error(w, quantized, how.groups, how.gain))
        errors.append(error if how.granularity == "channel" else error.sum())
    chosen = np.stack(errors).argmin(0)
    threshold = np.take_along_axis(np.stack([as_numpy(each) for each in thresholds]), chosen[None], 0)[0]
    names = {AUTO[i] for i in chosen.ravel()}
    threshold = torch.from_numpy(np.asarray(threshold)).to(w.device) if isinstance(w, Tensor) else np.asarray(threshold)
    return names.pop() if len(names) == 1 else "auto", threshold


def split_thresholds(
    w: Array,
    plan: SplitPlan,
    bits: int,
    clips: tuple[str | float, ...],
    granularity: Granularity,
    groups: int = 1,
    signed: bool = True,
) -> list[Array]:
    """Step 2: the clip threshold float32 [] or [O] of the split w by each method ("OCS + clip" in the paper).

    w: a weight [O, C, ...], or a batch of activations [N, C, ...]. One histogram serves all methods.
    """
    check_choice("granularity", granularity, get_args(Granularity))
    by_channel = granularity == "channel"
    if by_channel:
        largest = kernels(w).output_max(w, plan.source, plan.depth, groups)
    else:
        largest = kernels(plan.split_max).abs_max(plan.split_max)
    counts = None
    if any(clip in CLIP_METHODS for clip in clips):
        bins = CHANNEL_BINS if by_channel else BINS
        counts = kernels(w).split_histogram(w, plan.source, plan.depth, groups, bins, largest)
    return [_threshold(counts, largest, bits, clip, signed) for clip in clips]


def _threshold(counts: Array | None, largest: Array, bits: int, clip: str | float, signed: bool) -> Array:
    if clip in CLIP_METHODS:
        return search_threshold(counts, largest, bits, clip, signed)
    if clip == "none":
        return largest
    threshold = largest * filled_like(largest, clip)
    return threshold if isinstance(threshold, Tensor) else np.asarray(threshold)


def search_threshold(counts: Array, limit: Array, bits: int, method: str, signed: bool) -> Array:
    """The threshold by one of CLIP_METHODS in histograms [..., bins] of |x| over [0, limit], shaped like limit."""
    return kernels(counts).clip_threshold(counts, limit, bits, signed, CLIP_METHODS.index(method))


def quantize_split(
    w: Array,
    plan: SplitPlan,
    threshold: Array,
    bits: int,
    split: Split = "qa",
    rounding: Rounding = "nearest",
    groups: int = 1,
) -> QuantizedWeight:
    """Step 3: the integers of the split weight, scale = threshold / qmax (1 where the threshold is 0)."""
    scale = scale_for(threshold, qmax(bits))
    args = (w, scale, plan.source, plan.depth, plan.offset, groups, bits)
    squant = rounding == "squant"
    ints = kernels(w).squant_weight(*args) if squant else kernels(w).quantize_weight(*args, split == "qa")
    return QuantizedWeight(ints, scale, plan.source, threshold)


def scale_for(threshold: Array, largest_integer: int) -> Array:
    """threshold / largest_integer, float32 and positive; 1 where the threshold is 0."""
    scale = threshold / filled_like(threshold, largest_integer)
    if isinstance(scale, Tensor):
        return scale.clamp(min=SMALLEST).masked_fill(threshold == 0, 1.0)
    return np.where(threshold > 0, np.maximum(scale, SMALLEST), np.float32(1))


def qmax(bits: int) -> int:
    """The largest integer of k signed bits, 2^(k - 1) - 1."""
    return 2 ** (bits - 1) - 1


def fold(quantized: QuantizedWeight, channels: int, groups: int = 1) -> Array:
    """float32 [O, C, ...]: the copies' dequantized weights added back onto their source channel.

    channels: C, the original input channels (of one group). The folded weight computes what the expanded one does.
    """
    ints, scale, source, _ = quantized
    check_groups(groups, ints.shape[0])
    if not 0 <= channels <= ints.shape[1]:
        raise ValueError(f"channels={channels!r}: use the original channels, at most the {ints.shape[1]} expanded ones")
    return kernels(ints).fold(ints, scale, source, groups, channels)


def weight_error(w: Array, quantized: QuantizedWeight, groups: int = 1) -> tuple[float, float]:
    """Signal and noise of a quantized weight: the sums of w^2 and of (w - w_hat)^2."""
    w = check_array("w", w, min_rank=2)
    check_groups(groups, w.shape[0])
    signal, noise = kernels(w).weight_error(w, quantized.ints, quantized.scale, quantized.source, groups).tolist()
    return signal, noise


def output_error(w: Array, quantized: QuantizedWeight, groups: int = 1, gain: float = GAIN) -> Array:
    """How far each output of a layer is off with the quantized weight: float64 [O], an estimate without inputs.

    For rows d = w_hat - w and w of [C, K] it is q(d) + gain q(w) (sum d w / sum w^2)^2, where

        q(v) = (sum_ck v^2 + sum_c (sum_k v)^2 + (sum_ck v)^2) / 3

    is v^T E[x x^T] v for inputs of E[x^2] = 1 whose squared mean is 1/3 (1/pi after the ReLU of a normal), half of the
    rest common to the K inputs that a filter sees of a channel: SQuant's three terms (section 3). The second part is
    the output's change of gain. Saturation shrinks all outputs of all layers; these errors do not average out as others
    do but multiply, so that over L layers they weigh L times as much. A norm of single inputs (LayerNorm, say) takes
    them away: gain is how many layers there are, on average, to each such norm, all layers where there is none.
    """
    w = check_array("w", w, min_rank=2)
    check_groups(groups, w.shape[0])
    return kernels(w).output_error(w, quantized.ints, quantized.scale, quantized.source, groups, gain)


def output_power(w: Array) -> Array:
    """q(w) of output_error, float64 [O]: what the outputs are off where every integer is 0."""
    w = check_array("w", w, min_rank=2)
    if isinstance(w, Tensor):
        zeros, one = w.new_zeros(w.shape, dtype=torch.int8), w.new_ones((), dtype=torch.float32)
        return kernels(w).output_error(w, zeros, one, torch.arange(w.shape[1], device=w.device), 1, 0.0)
    return kernels(w).output_error(
        w, np.zeros(w.shape, np.int8), np.ones((), np.float32), np.arange(w.shape[1]), 1, 0.0
    )


def signal_and_noise(w: Array, quantized: QuantizedWeight, how: How) -> tuple[float, float]:
    """Of a layer's outputs: their power and what they are off by; by the inputs' second moments where how has them."""
    if how.hessian is None:
        power, error = output_power(w), output_error(w, quantized, how.groups, how.gain)
    else:
        measured = OutputErrors(w, how.hessian)
        power, error = measured.power, measured.error(fold(quantized, w.shape[1], how.groups), how.gain)
    return float(power.sum()), float(error.sum())


def remaining_error(w: Array, step: Quantization, how: How) -> float:
    """Noise to signal of a quantized weight: e / (1 - e), where the share e of its power is error.

    The error is that of the weight, sum (w - w_hat)^2 / sum w^2; where clip="auto" or rounding is not to nearest, that
    of the layer's outputs over what they would be off without the layer. 1 - e is what w_hat still has of the signal:
    nothing as e nears 1, which no other layer makes up for. At most some 1000.
    """
    of_weight = how.rounding == "nearest" and how.clip != "auto"
    signal, noise = step.error if of_weight else signal_and_noise(w, step.quantized, how)
    return noise / max(signal - noise, 1e-3 * signal) if signal else 0.0


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB; inf where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
