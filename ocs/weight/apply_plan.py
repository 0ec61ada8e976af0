"""Steps 2 and 3 of quantizing a weight: clip threshold and integers, once its splits are planned."""

import numpy as np
from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.kernels.ops import kernels
from ocs.weight.arrays import array_like, as_numpy
from ocs.weight.error import errors_of_outputs, weight_error
from ocs.weight.integers import quantize_split
from ocs.weight.threshold import scale_for, split_thresholds
from ocs.weight.types import Array, Quantization, QuantizedWeight, Scheme, SplitPlan

AUTO = ("none", "mse", *(i / 20 for i in range(4, 20)))  # what clip="auto" chooses from


def quantize_plan(w: Array, plan: SplitPlan, scheme: Scheme) -> Quantization:
    """Take steps 2 and 3 for a weight [O, C, ...]: find its threshold, and its integers."""
    if scheme.clip == "auto":
        clip, quantized = _least_output_error(w, plan, scheme)
    else:
        (threshold,) = _thresholds(w, plan, scheme, (scheme.clip,))
        clip, quantized = scheme.clip, _quantized(w, plan, scheme, threshold)
    return Quantization(quantized, clip, weight_error(w, quantized, scheme.groups))


def _thresholds(w: Array, plan: SplitPlan, scheme: Scheme, clips: tuple[str | float, ...]) -> list[Array]:
    """Find the threshold by each of these clip methods."""
    return split_thresholds(w, plan, scheme.bits, clips, scheme.granularity, scheme.groups)


def _quantized(w: Array, plan: SplitPlan, scheme: Scheme, threshold: Array) -> QuantizedWeight:
    """Take step 3."""
    if scheme.rounding != "gptq":
        return quantize_split(w, plan, threshold, scheme.bits, scheme.split, scheme.rounding, scheme.groups)
    scale = scale_for(threshold, qmax(scheme.bits))
    columns, factor = (
        each.to(w.device) if isinstance(w, Tensor) else each.numpy() for each in scheme.hessian.factored(scheme.groups)
    )
    ints = kernels(w).gptq_weight(w, scale, *plan[:3], scheme.bits, columns, factor)
    return QuantizedWeight(ints, scale, plan.source, threshold)


def _least_output_error(w: Array, plan: SplitPlan, scheme: Scheme) -> tuple[str | float, QuantizedWeight]:
    """Choose the first of AUTO with the least output error; "auto" where channels differ."""
    error_of, thresholds, errors = errors_of_outputs(w, scheme), _thresholds(w, plan, scheme, AUTO), []
    for threshold in thresholds:
        error = as_numpy(error_of(_quantized(w, plan, scheme, threshold)))
        errors.append(error if scheme.granularity == "channel" else error.sum())
    chosen = np.stack(errors).argmin(0)
    threshold = np.take_along_axis(np.stack([as_numpy(each) for each in thresholds]), chosen[None], 0)[0]
    names = {AUTO[i] for i in chosen.ravel()}
    quantized = _quantized(w, plan, scheme, array_like(np.asarray(threshold), w))
    return names.pop() if len(names) == 1 else "auto", quantized
