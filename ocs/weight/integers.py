"""The integers of a split weight, and the weight that they stand for."""

from ocs.kernels.constants import qmax
from ocs.kernels.ops import kernels
from ocs.weight.arguments import check_groups
from ocs.weight.threshold import scale_for
from ocs.weight.types import Array, QuantizedWeight, Rounding, Split, SplitPlan


def quantize_split(
    w: Array,
    plan: SplitPlan,
    threshold: Array,
    bits: int,
    split: Split = "qa",
    rounding: Rounding = "nearest",
    groups: int = 1,
) -> QuantizedWeight:
    """Compute the integers of the split weight, step 3: scale = threshold / qmax (1 where the threshold is 0)."""
    scale = scale_for(threshold, qmax(bits))
    args = (w, scale, plan.source, plan.parts, plan.offset, groups, bits)
    squant = rounding == "squant"
    ints = kernels(w).squant_weight(*args) if squant else kernels(w).quantize_weight(*args, split != "naive")
    return QuantizedWeight(ints, scale, plan.source, threshold)


def fold(quantized: QuantizedWeight, channels: int, groups: int = 1) -> Array:
    """Add the copies' dequantized weights back onto their source channel: float32 [O, C, ...].

    channels: C, the original input channels (of one group). The folded weight computes what the expanded one does.
    """
    ints, scale, source, _ = quantized
    check_groups(groups, ints.shape[0])
    if not 0 <= channels <= ints.shape[1]:
        raise ValueError(f"channels={channels!r}: use the original channels, at most the {ints.shape[1]} expanded ones")
    return kernels(ints).fold(ints, scale, source, groups, channels)
