"""Steps 2 and 3 of quantizing a weight: clip threshold and integers, once its splits are planned."""

import math
from collections.abc import Iterator

import numpy as np

from ocs.kernels.constants import qmax
from ocs.kernels.ops import kernels
from ocs.weight.arrays import array_like, as_numpy
from ocs.weight.error import errors_of_outputs, weight_error
from ocs.weight.gptq import Compensation
from ocs.weight.integers import quantize_split
from ocs.weight.threshold import scale_for, split_thresholds
from ocs.weight.types import Array, Quantization, QuantizedWeight, Scheme, SplitPlan

AUTO = ("none", "mse", *(i / 20 for i in range(4, 20)))  # what clip="auto" chooses from


def quantize_plan(w: Array, plan: SplitPlan, scheme: Scheme) -> Quantization:
    """Take steps 2 and 3 for a weight [O, C, ...]: find its threshold, and its integers."""
    compensation = None
    if scheme.rounding == "gptq":
        compensation = Compensation(w, plan.source, plan.depth, plan.offset, scheme.bits, scheme.hessian)
    if scheme.clip == "auto":
        clip, threshold = _least_output_error(w, plan, scheme, compensation)
    else:
        clip, (threshold,) = scheme.clip, _thresholds(w, plan, scheme, (scheme.clip,))
    (quantized,) = _quantize_each(w, plan, scheme, [threshold], compensation)
    error = weight_error(w, quantized, scheme.groups)
    if not math.isfinite(sum(error)):
        largest = float(kernels(plan.channel_max).abs_max(plan.channel_max))
        raise ValueError(
            f"w reaches {largest:.3g}, and rounded to {scheme.bits} bits it leaves what float32 holds: scale it down"
        )
    return Quantization(quantized, clip, error)


def _thresholds(w: Array, plan: SplitPlan, scheme: Scheme, clips: tuple[str | float, ...]) -> list[Array]:
    """Find the threshold by each of these clip methods."""
    return split_thresholds(w, plan, scheme.bits, clips, scheme.granularity, scheme.groups)


def _quantize_each(
    w: Array, plan: SplitPlan, scheme: Scheme, thresholds: list[Array], compensation: Compensation | None
) -> Iterator[QuantizedWeight]:
    """Take step 3 for each threshold."""
    if compensation is None:
        for threshold in thresholds:
            yield quantize_split(w, plan, threshold, scheme.bits, scheme.split, scheme.rounding, scheme.groups)
        return
    scales = [scale_for(threshold, qmax(scheme.bits)) for threshold in thresholds]
    for ints, scale, threshold in zip(compensation.integers(scales), scales, thresholds, strict=True):
        yield QuantizedWeight(ints, scale, plan.source, threshold)


def _least_output_error(
    w: Array, plan: SplitPlan, scheme: Scheme, compensation: Compensation | None
) -> tuple[str | float, Array]:
    """Choose the first of AUTO with the least output error, and its threshold; "auto" where channels differ."""
    error_of, thresholds, errors = errors_of_outputs(w, scheme), _thresholds(w, plan, scheme, AUTO), []
    for quantized in _quantize_each(w, plan, scheme, thresholds, compensation):
        error = as_numpy(error_of(quantized))
        error = np.where(np.isnan(error), np.inf, error)  # of values beyond float32
        errors.append(error if scheme.granularity == "channel" else error.sum())
    chosen = np.stack(errors).argmin(0)
    threshold = np.take_along_axis(np.stack([as_numpy(each) for each in thresholds]), chosen[None], 0)[0]
    names = {AUTO[i] for i in chosen.ravel()}
    return names.pop() if len(names) == 1 else "auto", array_like(np.asarray(threshold), w)
