"""Steps 2 and 3 of quantizing a weight: clip threshold and integers, once its splits are planned."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.weight.arguments import as_numpy
from ocs.weight.error import output_error, weight_error
from ocs.weight.gptq import Compensation
from ocs.weight.integers import fold, quantize_split
from ocs.weight.threshold import scale_for, split_thresholds
from ocs.weight.types import Array, Quantization, QuantizedWeight, Scheme, SplitPlan

AUTO = ("none", "mse", *(i / 20 for i in range(4, 20)))  # what clip="auto" chooses from


def quantize_plan(w: Array, plan: SplitPlan, how: Scheme) -> Quantization:
    """Steps 2 and 3: threshold and integers."""
    compensation = Compensation(w, *plan[:3], how.bits, how.hessian) if how.rounding == "gptq" else None
    if how.clip == "auto":
        clip, threshold = _least_output_error(w, plan, how, compensation)
    else:
        clip, (threshold,) = how.clip, split_thresholds(w, plan, how.bits, (how.clip,), how.granularity, how.groups)
    (quantized,) = _quantize_each(w, plan, [threshold], how, compensation)
    return Quantization(quantized, clip, weight_error(w, quantized, how.groups))


def _quantize_each(
    w: Array, plan: SplitPlan, thresholds: list[Array], how: Scheme, compensation: Compensation | None
) -> Iterator[QuantizedWeight]:
    """Step 3 for each threshold; GPTQ's integers are nearest rounding of a weight on the grid."""
    rounding, weights = how.rounding, repeat(w, len(thresholds))
    if compensation is not None:
        rounding, weights = "nearest", compensation.on_grids([scale_for(each, qmax(how.bits)) for each in thresholds])
    for weight, threshold in zip(weights, thresholds, strict=True):
        yield quantize_split(weight, plan, threshold, how.bits, how.split, rounding, how.groups)


def _least_output_error(
    w: Array, plan: SplitPlan, how: Scheme, compensation: Compensation | None
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
