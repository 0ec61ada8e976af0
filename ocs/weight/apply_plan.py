"""Steps 2 and 3 of quantizing a weight: clip threshold and integers, once its splits are planned."""

import math

import numpy as np
from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.kernels.ops import kernels
from ocs.weight.arrays import array_like, as_numpy
from ocs.weight.error import measured_outputs, output_error, weight_error
from ocs.weight.grouped import quantize_in_blocks
from ocs.weight.integers import fold, quantize_split
from ocs.weight.threshold import scale_for, split_thresholds
from ocs.weight.types import Array, Quantization, QuantizedWeight, Scheme, SplitPlan

AUTO = ("none", "mse", *(i / 20 for i in range(4, 20)))  # what clip="auto" chooses from
RISING = (*AUTO[2:], AUTO[0])  # with gptq, which takes long, or where only errors are compared,
FEW = (2, 6, 11, 16)  # and what gptq tries of these: 0.3, 0.5, 0.75, none
EVERY_FOURTH = (0, 4, 8, 12, 16)  # and what is tried otherwise


def quantize_plan(w: Array, plan: SplitPlan, scheme: Scheme) -> Quantization:
    """Take steps 2 and 3 for a weight [O, C, ...]: find its threshold, and its integers."""
    if scheme.granularity == "group":
        clip, quantized = quantize_in_blocks(w, plan, scheme, quantize_plan)
    elif scheme.clip == "auto":
        clip, quantized = _least_output_error(w, plan, scheme)
    else:
        (threshold,) = _thresholds(w, plan, scheme, (scheme.clip,))
        clip, quantized = scheme.clip, _quantized(w, plan, scheme, threshold)
    error = weight_error(w, quantized, scheme.groups, scheme.group)
    if not math.isfinite(sum(error)):
        largest = float(kernels(plan.channel_max).abs_max(plan.channel_max))
        raise ValueError(
            f"w reaches {largest:.3g}, and rounded to {scheme.bits} bits it leaves what float32 holds: scale it down"
        )
    return Quantization(quantized, clip, error)


def _thresholds(w: Array, plan: SplitPlan, scheme: Scheme, clips: tuple[str | float, ...]) -> list[Array]:
    """Find the threshold by each of these clip methods."""
    return split_thresholds(w, plan, scheme.bits, clips, scheme.granularity, scheme.groups)


def _quantized(w: Array, plan: SplitPlan, scheme: Scheme, threshold: Array) -> QuantizedWeight:
    """Take step 3."""
    if scheme.rounding == "gptq":
        return _compensated(w, plan, scheme, threshold)[0]
    return quantize_split(w, plan, threshold, scheme.bits, scheme.split, scheme.rounding, scheme.groups)


def _compensated(w: Array, plan: SplitPlan, scheme: Scheme, threshold: Array) -> tuple[QuantizedWeight, Array]:
    """Take step 3 by GPTQ, and say what outputs are off by then, float64 [O]."""
    scale, factored = scale_for(threshold, qmax(scheme.bits)), scheme.hessian.factored(scheme.groups)
    columns, factor = (each.to(w.device) if isinstance(w, Tensor) else each.numpy() for each in factored)
    of_plan = (plan.source, plan.parts, plan.offset)
    ints, error = kernels(w).gptq_weight(w, scale, *of_plan, scheme.bits, columns, factor)
    return QuantizedWeight(ints, scale, plan.source, threshold), error


def _with_error(w: Array, plan: SplitPlan, scheme: Scheme, threshold: np.ndarray) -> tuple[QuantizedWeight, np.ndarray]:
    """Take step 3, and say what outputs are off by then: float64 [O], or their sum where one scale serves all."""
    threshold = array_like(threshold, w)
    if scheme.rounding == "gptq":
        quantized, error = _compensated(w, plan, scheme, threshold)
        w_hat = fold(quantized, w.shape[1], scheme.groups)
        error = error + measured_outputs(w, scheme).error_of_gain(w_hat, scheme.gain)
    else:
        quantized = _quantized(w, plan, scheme, threshold)
        error = output_error(w, quantized, scheme.groups, scheme.gain)
    return quantized, as_numpy(error) if scheme.granularity == "channel" else np.asarray(as_numpy(error).sum())


def _least_output_error(w: Array, plan: SplitPlan, scheme: Scheme) -> tuple[str | float, QuantizedWeight]:
    """Choose from AUTO what leaves the least output error, the first where several do; "auto" where channels differ."""
    few = scheme.few or scheme.rounding == "gptq"
    clips, search = (RISING, _least_of_few) if few else (AUTO, _least_of_all)
    thresholds = np.stack([as_numpy(each) for each in _thresholds(w, plan, scheme, clips)])
    chosen, quantized = search(w, plan, scheme, thresholds)
    names = {clips[i] for i in chosen.ravel()}
    return names.pop() if len(names) == 1 else "auto", quantized


def _least_of_all(
    w: Array, plan: SplitPlan, scheme: Scheme, thresholds: np.ndarray
) -> tuple[np.ndarray, QuantizedWeight]:
    """Try all of the thresholds [A] or [A, O]; which one is the best for each scale, and the integers."""
    errors = [_with_error(w, plan, scheme, np.asarray(threshold))[1] for threshold in thresholds]
    chosen = np.stack(errors).argmin(0)
    return np.asarray(chosen), _quantized(w, plan, scheme, array_like(_picked(thresholds, chosen), w))


def _least_of_few(
    w: Array, plan: SplitPlan, scheme: Scheme, thresholds: np.ndarray
) -> tuple[np.ndarray, QuantizedWeight]:
    """Try few of the thresholds [A] or [A, O], and for each scale the one between the best and its better neighbour."""
    tried, ints, errors, few = [], [], [], FEW if scheme.rounding == "gptq" else EVERY_FOURTH

    def attempt(at: np.ndarray) -> None:
        quantized, error = _with_error(w, plan, scheme, _picked(thresholds, at))
        tried.append(at)
        ints.append(as_numpy(quantized.ints))
        errors.append(error)

    for i in few:
        attempt(np.full(thresholds.shape[1:], i))
    best = np.stack(errors).argmin(0)
    walls = np.pad(np.stack(errors), [(1, 1)] + [(0, 0)] * best.ndim, constant_values=np.inf)  # none beyond the ends
    neighbour = np.where(_picked(walls, best) < _picked(walls, best + 2), best - 1, best + 1)
    attempt((np.array(few)[best] + np.array(few)[neighbour]) // 2)
    best = np.stack(errors).argmin(0)
    at = _picked(np.stack(tried), best)
    of_rows = np.stack(ints)[np.broadcast_to(best, len(w)), np.arange(len(w))]
    threshold = array_like(_picked(thresholds, at), w)
    quantized = QuantizedWeight(array_like(of_rows, w), scale_for(threshold, qmax(scheme.bits)), plan.source, threshold)
    return at, quantized


def _picked(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Pick values[index[o], o] of [A, O], or values[index] of [A]."""
    return np.asarray(np.take_along_axis(values, np.asarray(index)[None], 0)[0])
