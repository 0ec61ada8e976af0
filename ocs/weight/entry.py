"""Quantizing a weight from a user's arguments: what they may be, and the steps one after the other."""

from typing import Literal

from ocs.weight.apply_plan import quantize_plan
from ocs.weight.arguments import check_choice, check_ratio, check_scheme, check_second_moments
from ocs.weight.hessian import Hessian
from ocs.weight.plan import splits_for
from ocs.weight.selection import choose_splits
from ocs.weight.types import GROUP, Array, Granularity, QuantizedWeight, Rounding, Scheme, Select, Split, SplitPlan


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
    group: int = GROUP,
) -> QuantizedWeight:
    """Split the outlier channels of a weight and quantize it (section 3 of the paper).

    Args:
        w: [O, C, ...], C the input channels (of one group).
        bits: 2 to 8.
        r: expand ratio in [0, 1]; each group's C channels get n = ceil(r C) splits (depthwise weights none).
        clip: where the split weights saturate, see clip_threshold; or "auto": of none, mse and fractions of the largest
            |w| what leaves the least output_error, measured by `moments` where these are given (of which few are then
            tried, coarse to fine); for each output channel of its own where granularity="channel".
        granularity: one scale per "tensor", or per output "channel"; or per "group": of each output channel and so many
            input channels, the copies in groups of their own, so that the scale is [O, B]. A copy then rounds what is
            left of its channel, which naive ones do not.
        split: "qa" (quantization-aware: exact) or "naive" (halves); or "even": a channel split n - 1 times becomes n
            equal parts, (u + 1/2 + k) / n - 1/2 for k = 0 .. n - 1 in grid units u, as exact as "qa", which it is where
            none is split more than once; else the grid is narrower: thirds where halving leaves 1/2, 1/4, 1/4.
        rounding: "nearest": floor(w / scale + 1/2). Or "squant", but for split="naive": from there, some integers move
            a step so that rounding errors cancel (Guo et al., ICLR 2022), those with the largest errors first. In each
            filter whose errors sum to e, floor(|e| + 1/2) move; then in each output channel, whose errors sum to E,
            floor(|E| + 1/2) filters with e of its sign move one more each. None leaves the grid, saturated ones stay.
            Or "gptq", but for split="naive": column by column, what rounding one does to the outputs is compensated in
            those not yet rounded, as far as its inputs go together with theirs (Frantar et al., ICLR 2023;
            ocs.weight.gptq).
        groups: of a grouped convolution; divides O.
        select: which channels to split, see plan_splits.
        moments: for rounding="gptq", the sum or mean of x x^T over the vectors x [C K] that the weight meets, as w has
            them (the K values of a filter side by side): [C K, C K], or for G groups [G, C K, C K], of any float dtype.
        group: with granularity="group" the input channels that share a scale, a multiple of 32.

    Raises:
        TypeError: w or moments is no float array or tensor.
        ValueError: w has fewer than two dimensions or holds NaN or Inf, an option is out of range, or moments are
            missing where rounding="gptq" needs them, given where not, of another shape, not finite or none.
    """
    w, scheme = check_scheme(w, Scheme(bits, clip, granularity, split, rounding, groups, group=group))
    second = check_second_moments(moments, rounding, w, groups)
    scheme = scheme._replace(hessian=None if second is None else Hessian(second))
    splits = splits_for(check_ratio("r", r), w.shape[1], groups)
    return quantize_plan(w, choose_splits(w, splits, select, scheme), scheme).quantized


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
    group: int = GROUP,
) -> SplitPlan:
    """Plan which channels to split, step 1; see quantize_weight for w [O, C, ...], r, groups and how it is quantized.

    select: "max" is the paper's rule: the largest |w|, again and again, whatever follows. "error": the channel whose
        split lowers the remaining error most: the sum over output channels of threshold^2, where each has its own and
        nothing is clipped; else the squared error of saturation at the threshold that the paper's picks lead to. The
        paper's picks stay where they leave less. Or a callable (w, n) that is given one group's weight, float32
        [O, C, ...], and returns the n channels to split, 0 .. C - 1, in order and repeated as often as they are split.

    Errors are those of quantize_weight.
    """
    check_choice("rounding", rounding, ("nearest", "squant"))  # gptq's splits are quantize_weight's to choose
    w, scheme = check_scheme(w, Scheme(bits, clip, granularity, split, rounding, groups, group=group))
    return choose_splits(w, splits_for(check_ratio("r", r), w.shape[1], groups), select, scheme)
