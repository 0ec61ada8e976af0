"""Tensor-level API: split, clip and quantize one weight, fake-quantize one activation.

Every function takes numpy arrays or torch tensors of float32, float64, float16 or bfloat16, any layout and device,
computes in float32 and returns the same kind. k bits are the integers -qmax .. qmax, qmax = 2^(k - 1) - 1. "The paper"
is Zhao et al., ICML 2019, arXiv 1901.09504.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ocs.kernels import ops
from ocs.kernels.ops import kernels
from ocs.weight.arguments import (
    CLIP_METHODS,
    Array,
    Granularity,
    Rounding,
    Select,
    Split,
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
    dtype_name,
    kind_of,
)
from ocs.weight.gptq import Hessian
from ocs.weight.integers import (
    AUTO,
    BINS,
    CHANNEL_BINS,
    GAIN,
    METHODS,
    SMALLEST,
    How,
    Quantization,
    QuantizedWeight,
    SplitPlan,
    choose_splits,
    fold,
    output_error,
    output_power,
    plan_channels,
    qmax,
    quantize_plan,
    quantize_split,
    remaining_error,
    scale_for,
    search_threshold,
    signal_and_noise,
    split_thresholds,
    splits_for,
    sqnr_db,
    weight_error,
)

__all__ = [
    "AUTO",
    "CHANNEL_BINS",
    "CLIP_METHODS",
    "GAIN",
    "METHODS",
    "SMALLEST",
    "TINY",
    "Array",
    "Granularity",
    "How",
    "Quantization",
    "QuantizedWeight",
    "Rounding",
    "Select",
    "Split",
    "SplitPlan",
    "check_array",
    "check_bits",
    "check_choice",
    "check_clip",
    "check_groups",
    "check_moments",
    "check_ratio",
    "check_rounding",
    "check_select",
    "check_values",
    "choose_splits",
    "clip_threshold",
    "dequantize",
    "fake_quantize",
    "fold",
    "histogram",
    "output_error",
    "output_power",
    "plan_channels",
    "plan_splits",
    "qmax",
    "quantize",
    "quantize_plan",
    "quantize_split",
    "quantize_weight",
    "remaining_error",
    "scale_for",
    "search_threshold",
    "signal_and_noise",
    "split_thresholds",
    "splits_for",
    "sqnr_db",
    "weight_error",
    "zeros",
]

TINY = 2.0**-100  # values below are not clipped: float32 hardly tells them apart


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
    w, how = _checked(w, How(bits, clip, granularity, split, rounding, groups))
    second = check_moments(moments, rounding, w, groups)
    how = how._replace(hessian=None if second is None else Hessian(second))
    splits = splits_for(check_ratio("r", r), w.shape[1], groups)
    return quantize_plan(w, choose_splits(w, splits, select, how), how).quantized


def _checked(w: Array, how: How) -> tuple[Array, How]:
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
    w, how = _checked(w, How(bits, clip, granularity, split, rounding, groups))
    return choose_splits(w, splits_for(check_ratio("r", r), w.shape[1], groups), select, how)


def clip_threshold(x: Array, bits: int, method: str | float, signed: bool = True) -> float:
    """The clip threshold t of x: values beyond +-t saturate (sections 2.1 and 4 of the paper). At most max|x|.

    It is searched in a histogram of |x| without the zeros, which are on every grid.

    Args:
        x: any values; weights should be split before.
        bits: 2 to 8.
        method: "none" (max|x|), or a number in (0, 1], that fraction of max|x|, or
            "mse": the least squared error after rounding (equation 9);
            "aciq": the optimum for a Gaussian or a Laplace distribution, the likelier one, by its root mean square or
            mean |x|; "aciq-release": as the paper's own release computes it, with the optima for about one bit less;
            "kl": the least Kullback-Leibler divergence of the rounded from the clipped histogram, as in MXNet;
            "percentile": 99.99 % of the values are below at 8 bits, 99.9 % at 4, 1 - 10^-(2 + bits / 4) at any;
            "std": (bits + 1) / 2 root mean squares, half of one more where not signed;
            "sawb": c1 times the root mean square minus c2 times the mean |x| (Choi et al., SysML 2019), good up to 5
            bits: a line then fits uniform and heavy-tailed values no longer both.
        signed: the grid is -qmax .. qmax, else 0 .. 2^k - 1.
    """
    check_bits("bits", bits)
    check_clip("method", method)
    x = check_values("x", check_array("x", x))
    largest = _finite_max(x)
    if method not in CLIP_METHODS:
        return float(largest) * (1.0 if method == "none" else method)
    if largest < TINY:
        return float(largest)
    counts = kernels(x).histogram(x, BINS, float(largest))
    counts[0] -= zeros(x)
    return float(search_threshold(counts, largest, bits, method, signed))


def zeros(x: Array) -> int:
    """How many values are zero, or too small for a normal float32. Some times faster than count_nonzero."""
    return int(kernels(x).histogram(x, 2, 2 * float(np.finfo(np.float32).tiny))[0])


def histogram(x: Array, bins: int) -> tuple[Array, float]:
    """Counts int64 [bins] of |x| over [0, limit], and limit = max|x|.

    Bin i counts floor(|x| / limit * bins) = i in float32; max|x| itself is in the last bin. bins: 1 to 2^24.
    """
    x = check_values("x", check_array("x", x))
    if not isinstance(bins, int) or not 1 <= bins <= 2**24:
        raise ValueError(f"bins={bins!r}: use an integer from 1 to {2**24}")
    limit = float(_finite_max(x))
    return kernels(x).histogram(x, bins, limit), limit


def _finite_max(x: Array) -> Array:
    largest = kernels(x).abs_max(x)
    if not math.isfinite(largest):
        raise ValueError("x holds NaN or Inf as float32")
    return largest


def fake_quantize(x: Array, scale: float | Array, bits: int, signed: bool = True) -> Array:
    """scale * clamp(round_half_even(x / scale)), shaped like x and of its dtype.

    scale: one positive finite number (a float or a 0-d float32 array). signed: integers -qmax .. qmax, else
    0 .. 2^k - 1. Inf saturates, NaN stays NaN. The gradient is 1 where x rounds to the grid, 0 where it is clipped.
    """
    args = (check_array("x", x, detach=False), *_grid(x, scale, bits), signed)
    if not isinstance(x, Tensor):
        return kernels(x).fake_quantize(*args).astype(x.dtype, copy=False)
    return ops.fake_quantize(*args)


def quantize(x: Array, scale: float | Array, bits: int, signed: bool = True) -> Array:
    """clamp(round_half_even(x / scale)) as int8, or uint8 where not signed; see fake_quantize. NaN is refused."""
    x = check_values("x", check_array("x", x))
    if math.isnan(kernels(x).abs_max(x)):
        raise ValueError("x holds NaN, which no integer stands for")
    return kernels(x).quantize(x, *_grid(x, scale, bits), signed)


def dequantize(q: Array, scale: float | Array) -> Array:
    """Float32 q * scale, shaped like q (int8 or uint8); one scale, or one per entry of the first axis."""
    if not isinstance(q, Array) or dtype_name(q) not in ("int8", "uint8"):
        raise TypeError(f"q must be an int8 or uint8 array or tensor, not {kind_of(q)}")
    scale = _as_scale(q, scale)
    if scale.ndim > 0 and (q.ndim == 0 or tuple(scale.shape) != (q.shape[0],)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}: use one number, or one per entry of q's first axis")
    return kernels(q).dequantize(q, scale)


def _grid(x: Array, scale: float | Array, bits: int) -> tuple[Array, int]:
    scale = _as_scale(x, scale)
    if math.prod(scale.shape) != 1:
        raise ValueError(f"scale has shape {tuple(scale.shape)}: use one number")
    return scale, check_bits("bits", bits)


def _as_scale(x: Array, scale: float | Array) -> Array:
    """Scale as the kind of array that x is, checked where its values can be read without waiting for a device."""
    if isinstance(x, Tensor) and isinstance(scale, Real):
        _check_positive(math.isfinite(scale) and scale >= SMALLEST, scale)
        return torch.tensor(scale, dtype=torch.float32, device=x.device)
    if isinstance(x, Tensor) and isinstance(scale, Tensor):
        _check_positive(scale.is_floating_point(), scale)
        if scale.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_positive(bool((scale.float() > 0).all() and scale.float().isfinite().all()), scale)
        return scale
    value = np.asarray(scale.detach().cpu() if isinstance(scale, Tensor) else scale)
    _check_positive(value.dtype.kind in "fiu", scale)
    with np.errstate(over="ignore", under="ignore"):
        value = value.astype(np.float32)
    _check_positive(bool((np.isfinite(value) & (value > 0)).all()), scale)
    return torch.from_numpy(value).to(x.device) if isinstance(x, Tensor) else value


def _check_positive(valid: bool, scale: float | Array) -> None:
    if not valid:
        raise ValueError(f"scale={scale!r}: use a positive finite number (in float32)")
