"""Tensor-level API: split, clip and quantize one weight, fake-quantize one activation.

Every function takes numpy arrays or torch tensors of float32, float64, float16 or bfloat16, any layout and device,
computes in float32 and returns the same kind. k bits are the integers -qmax .. qmax, qmax = 2^(k - 1) - 1. "The paper"
is Zhao et al., ICML 2019, arXiv 1901.09504.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import repeat
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ocs import ops
from ocs.gptq import Compensation, as_tensor
from ocs.ops import kernels

Array = np.ndarray | Tensor
Granularity = Literal["tensor", "channel"]
Split = Literal["qa", "naive"]
Rounding = Literal["nearest", "squant", "gptq"]
CLIP_METHODS = ("mse", "aciq", "aciq-release", "kl", "percentile", "std", "sawb")  # numbered as in csrc/ocs.h
AUTO = ("none", "mse", "aciq", "kl", "percentile", "std", "sawb")  # what clip="auto" chooses from
AUTO_SQUANT = (*AUTO, *(i / 20 for i in range(4, 20)))  # and where rounding="squant" or "gptq"
GAIN = 10  # what errors of gain weigh in output_error: about the layers that they multiply through
BINS, CHANNEL_BINS = 2048, 512  # of the histogram that a threshold is searched in: of a tensor, of an output channel
TINY = 2.0**-100  # values below are not clipped: float32 hardly tells them apart
SMALLEST = np.float32(1e-45).item()  # a positive threshold never gives a scale of zero
FLOATS = ("float16", "bfloat16", "float32", "float64")


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


# --- Weights ----------------------------------------------------------------------------------------------------------


def quantize_weight(
    w: Array,
    bits: int,
    r: float = 0.0,
    clip: str | float = "none",
    granularity: Granularity = "tensor",
    split: Split = "qa",
    rounding: Rounding = "nearest",
    groups: int = 1,
    moments: Array | None = None,
) -> QuantizedWeight:
    """Split the outlier channels of a weight and quantize it (section 3 of the paper).

    Args:
        w: [O, C, ...], C the input channels (of one group).
        bits: 2 to 8.
        r: expand ratio in [0, 1]; each group's C channels get n = ceil(r C) splits (depthwise weights none).
        clip: where the split weights saturate, see clip_threshold; or "auto", the method that leaves the least squared
            error of the weight. Where rounding="squant", "auto" tries fractions of the largest |w|, too, and takes what
            leaves the least output_error; for each output channel of its own where granularity="channel". Where
            rounding="gptq", likewise by gptq.output_error, after rounding.
        granularity: one scale per "tensor", or per output "channel".
        split: "qa" (quantization-aware: exact) or "naive" (halves).
        rounding: "nearest": floor(w / scale + 1/2). Or "squant", for split="qa": from there, some integers move a step
            so that rounding errors cancel (Guo et al., ICLR 2022), those with the largest errors first. In each filter
            whose errors sum to e, floor(|e| + 1/2) move; then in each output channel, whose errors sum to E,
            floor(|E| + 1/2) filters with e of its sign move one more each. None leaves the grid, saturated ones stay.
            Or "gptq", for split="qa": column by column, what rounding one does to the outputs is compensated in those
            not yet rounded, as far as its inputs go together with theirs (Frantar et al., ICLR 2023; see ocs.gptq).
        groups: of a grouped convolution; divides O.
        moments: for rounding="gptq", the sum or mean of x x^T over the vectors x [C K] that the weight meets, as w has
            them (the K values of a filter side by side): [C K, C K], or for G groups [G, C K, C K], of any float dtype.

    Raises:
        TypeError: w or moments is no float array or tensor.
        ValueError: w has fewer than two dimensions or holds NaN or Inf, an option is out of range, or moments are
            missing where rounding="gptq" needs them, given where not, of another shape, not finite or none.
    """
    w = check_values("w", check_array("w", w, min_rank=2))
    bits, r = check_bits("bits", bits), check_ratio("r", r)
    check_rounding(rounding, split)
    _check_groups(groups, w.shape[0])
    check_clip("clip", clip, auto=True)
    plan, second = plan_splits(w, r, groups), _check_moments(moments, rounding, w, groups)
    return quantize_plan(w, plan, bits, clip, granularity, split, rounding, groups, second).quantized


def plan_splits(w: Array, r: float, groups: int = 1) -> SplitPlan:
    """Step 1: which channels to split; see quantize_weight for w [O, C, ...], r and groups."""
    channel_max = kernels(w).channel_max(w, groups)
    infinite = (~np.isfinite(_numpy(channel_max))).nonzero()[0]
    if infinite.size:
        raise ValueError(f"w holds NaN or Inf as float32 (in input channel {infinite[0]}): repair the weights first")
    plan = kernels(w).split_plan(channel_max, groups, splits_for(r, w.shape[1], groups))
    return SplitPlan(*plan, channel_max)


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


def quantize_plan(
    w: Array,
    plan: SplitPlan,
    bits: int,
    clip: str | float,
    granularity: Granularity,
    split: Split,
    rounding: Rounding = "nearest",
    groups: int = 1,
    second: Tensor | None = None,
) -> Quantization:
    """Steps 2 and 3: threshold and integers; of clip="auto", the method with the least error, see quantize_weight.

    second: for rounding="gptq", the second moments of its inputs [G, C K, C K].
    """
    compensation = Compensation(w, *plan[:3], bits, second) if rounding == "gptq" else None
    if clip == "auto" and rounding != "nearest":
        clip, threshold = _least_output_error(w, plan, bits, granularity, rounding, groups, compensation)
        (quantized,) = _quantize_each(w, plan, [threshold], bits, split, rounding, groups, compensation)
        return Quantization(quantized, clip, weight_error(w, quantized, groups))
    methods, best = AUTO if clip == "auto" else (clip,), None
    thresholds = split_thresholds(w, plan, bits, methods, granularity, groups)
    each = _quantize_each(w, plan, thresholds, bits, split, rounding, groups, compensation)
    for method, quantized in zip(methods, each, strict=True):
        found = Quantization(quantized, method, weight_error(w, quantized, groups))
        if best is None or found.error[1] < best.error[1]:
            best = found
    return best


def _quantize_each(
    w: Array,
    plan: SplitPlan,
    thresholds: list[Array],
    bits: int,
    split: Split,
    rounding: Rounding,
    groups: int,
    compensation: Compensation | None,
) -> Iterator[QuantizedWeight]:
    """Step 3 for each threshold; GPTQ's integers are nearest rounding of a weight on the grid."""
    weights = repeat(w)
    if compensation is not None:
        rounding, weights = "nearest", compensation.on_grids([scale_for(each, qmax(bits)) for each in thresholds])
    for weight, threshold in zip(weights, thresholds, strict=False):
        yield quantize_split(weight, plan, threshold, bits, split, rounding, groups)


def _least_output_error(
    w: Array,
    plan: SplitPlan,
    bits: int,
    granularity: Granularity,
    rounding: Rounding,
    groups: int,
    compensation: Compensation | None,
) -> tuple[str | float, Array]:
    """Of AUTO_SQUANT, the first with the least output error, and its threshold; "auto" where channels differ."""
    thresholds = split_thresholds(w, plan, bits, AUTO_SQUANT, granularity, groups)
    errors, error_of = [], compensation.error if compensation else _output_error_of(w)
    for quantized in _quantize_each(w, plan, thresholds, bits, "qa", rounding, groups, compensation):
        error = _numpy(error_of(fold(quantized, w.shape[1], groups)))
        errors.append(error if granularity == "channel" else error.sum())
    chosen = np.stack(errors).argmin(0)
    threshold = np.take_along_axis(np.stack([_numpy(each) for each in thresholds]), chosen[None], 0)[0]
    names = {AUTO_SQUANT[i] for i in chosen.ravel()}
    threshold = torch.from_numpy(np.asarray(threshold)).to(w.device) if isinstance(w, Tensor) else np.asarray(threshold)
    return names.pop() if len(names) == 1 else "auto", threshold


def output_error(w: Array, w_hat: Array) -> Array:
    """How far the outputs of a layer are off with w_hat instead of w: float64 [O], an estimate without inputs.

    For rows d = w_hat - w and w of [C, K] it is q(d) + 10 q(w) (sum d w / sum w^2)^2, where

        q(v) = (sum_ck v^2 + sum_c (sum_k v)^2 + (sum_ck v)^2) / 3

    is v^T E[x x^T] v for inputs of E[x^2] = 1 whose squared mean is 1/3 (1/pi after the ReLU of a normal), half of the
    rest common to the K inputs that a filter sees of a channel: SQuant's three terms (section 3). The second part is
    the output's change of gain. Saturation shrinks all outputs of all layers; these errors do not average out as others
    do but multiply, so that over L layers they weigh L times as much. L = 10 is in between: the bundled ResNet-20 does
    as well from 10 to 100, worse below; the LSTM of two layers best at 2 (at 2 bits, a perplexity up to 3 % lower).
    """
    return _output_error_of(w)(w_hat)


def _output_error_of(w: Array) -> Callable[[Array], Array]:
    """output_error for one w and many w_hat."""
    v = _rows_in_double(w)
    power, of_gain = (v * v).sum((1, 2)), GAIN * _output_power(v)
    power = power + (power == 0)

    def error(w_hat: Array) -> Array:
        d = _rows_in_double(w_hat) - v
        return _output_power(d) + of_gain * ((d * v).sum((1, 2)) / power) ** 2

    return error


def _output_power(v: Array) -> Array:
    of_filter = v.sum(2)
    return ((v * v).sum((1, 2)) + (of_filter * of_filter).sum(1) + of_filter.sum(1) ** 2) / 3


def _rows_in_double(w: Array) -> Array:
    """float64 [O, C, K], by way of float32, which is what the kernels compute in."""
    w = w.reshape(*w.shape[:2], math.prod(w.shape[2:]))
    return w.float().double() if isinstance(w, Tensor) else w.astype(np.float32).astype(np.float64)


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
    threshold = largest * _like(largest, clip)
    return threshold if isinstance(threshold, Tensor) else np.asarray(threshold)


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
    scale = threshold / _like(threshold, largest_integer)
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
    _check_groups(groups, ints.shape[0])
    if not 0 <= channels <= ints.shape[1]:
        raise ValueError(f"channels={channels!r}: use the original channels, at most the {ints.shape[1]} expanded ones")
    return kernels(ints).fold(ints, scale, source, groups, channels)


def weight_error(w: Array, quantized: QuantizedWeight, groups: int = 1) -> tuple[float, float]:
    """Signal and noise of a quantized weight: the sums of w^2 and of (w - w_hat)^2."""
    w = check_array("w", w, min_rank=2)
    _check_groups(groups, w.shape[0])
    signal, noise = kernels(w).weight_error(w, quantized.ints, quantized.scale, quantized.source, groups).tolist()
    return signal, noise


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB; inf where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


# --- Clipping ---------------------------------------------------------------------------------------------------------


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


def search_threshold(counts: Array, limit: Array, bits: int, method: str, signed: bool) -> Array:
    """The threshold by one of CLIP_METHODS in histograms [..., bins] of |x| over [0, limit], shaped like limit."""
    return kernels(counts).clip_threshold(counts, limit, bits, signed, CLIP_METHODS.index(method))


def zeros(x: Array) -> int:
    """How many values are zero, or too small for a normal float32. Some times faster than count_nonzero."""
    return int(kernels(x).histogram(x, 2, 2 * float(np.finfo(np.float32).tiny))[0])


def check_clip(name: str, clip: Any, *, auto: bool = False) -> None:
    """A clip method's name, or a fraction of the largest magnitude; or "auto", where that is a choice."""
    names = ("none", *["auto"] * auto, *CLIP_METHODS)
    fraction = isinstance(clip, Real) and not isinstance(clip, bool) and 0 < clip <= 1
    if not fraction and not (isinstance(clip, str) and clip in names):
        shown = ", ".join(f'"{each}"' for each in names)
        raise ValueError(
            f"{name}={clip!r}: use {shown}, or a number in (0, 1], the fraction of the largest |x| to keep"
        )


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


# --- Activations ------------------------------------------------------------------------------------------------------


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
    if not isinstance(q, Array) or _dtype_name(q) not in ("int8", "uint8"):
        raise TypeError(f"q must be an int8 or uint8 array or tensor, not {_kind(q)}")
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


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_array(name: str, x: Any, min_rank: int = 0, *, detach: bool = True) -> Array:
    """The array as the kernels take it, or a TypeError or ValueError that says what it is instead."""
    if not isinstance(x, Array) or _dtype_name(x) not in FLOATS:
        raise TypeError(f"{name} must be a numpy array or torch tensor of {', '.join(FLOATS)}, not {_kind(x)}")
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {x.layout}: call .to_dense() first")
    if x.ndim < min_rank:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: at least {min_rank} dimensions are needed, [O, C, ...]")
    if isinstance(x, Tensor):
        return x.detach() if detach else x
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def check_values(name: str, x: Array) -> Array:
    """The array, which is more than a shape."""
    if isinstance(x, Tensor) and x.is_meta:
        raise ValueError(f"{name} is a meta tensor, which holds no values: give it values first")
    return x


def check_bits(name: str, bits: Any) -> int:
    """An integer from 2 to 8."""
    if not isinstance(bits, Integral) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"{name}={bits!r}: use an integer from 2 to 8")
    return int(bits)


def check_ratio(name: str, r: Any) -> float:
    """A number in [0, 1]."""
    if not isinstance(r, Real) or isinstance(r, bool) or not 0 <= r <= 1:
        raise ValueError(f"{name}={r!r}: use a number from 0 (no splits) to 1 (as many splits as channels)")
    return float(r)


def _check_groups(groups: Any, outputs: int) -> None:
    whole = isinstance(groups, Integral) and not isinstance(groups, bool)
    if not whole or groups < 1 or groups > max(outputs, 1) or outputs % groups:
        raise ValueError(f"groups={groups!r}: use a positive integer that divides the {outputs} output channels")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of the strings."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use {' or '.join(map(repr, choices))}")


def check_rounding(rounding: Any, split: Any) -> None:
    """Both are choices, and go together."""
    check_choice("split", split, get_args(Split))
    check_choice("rounding", rounding, get_args(Rounding))
    if rounding != "nearest" and split == "naive":
        raise ValueError(
            f"rounding={rounding!r} with split='naive': naive halves do not add up to a moved integer; use split='qa'"
        )


def _check_moments(moments: Any, rounding: str, w: Array, groups: int) -> Tensor | None:
    """Second moments as [G, C K, C K] where the rounding needs them."""
    if moments is None:
        if rounding == "gptq":
            raise ValueError("rounding='gptq' needs moments=: the sum of x x^T over the inputs that w meets")
        return None
    if rounding != "gptq":
        raise ValueError(f"moments= with rounding={rounding!r} has no effect: use rounding='gptq'")
    second = as_tensor(check_values("moments", check_array("moments", moments)))
    N = math.prod(w.shape[1:])
    if tuple(second.shape) not in ((groups, N, N), (N, N))[: 1 + (groups == 1)]:
        raise ValueError(f"moments has shape {tuple(second.shape)}: use {(groups, N, N)}, C K = {N} for each group")
    if not second.isfinite().all():
        raise ValueError("moments holds NaN or Inf")
    return second.reshape(groups, N, N)


def _dtype_name(x: Array) -> str:
    return str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else x.dtype.name


def _kind(x: Any) -> str:
    return f"{type(x).__name__} of {x.dtype}" if isinstance(x, Array) else type(x).__name__


def _numpy(x: Array) -> np.ndarray:
    return x.cpu().numpy() if isinstance(x, Tensor) else x


def _like(x: Array, value: float) -> Array:
    """The number as an array of x's kind and shape; see ocs.composite on why divisors are arrays."""
    return torch.full_like(x, value) if isinstance(x, Tensor) else np.full_like(x, value)
