"""The integers of a split weight, and the weight that they stand for."""

from torch import Tensor

from ocs.kernels.constants import qmax
from ocs.kernels.ops import kernels
from ocs.weight.arguments import check_group, check_groups
from ocs.weight.arrays import as_tensor
from ocs.weight.blocks import count_blocks, fold_weight
from ocs.weight.threshold import scale_for
from ocs.weight.types import GROUP, Array, QuantizedWeight, Rounding, Split, SplitPlan


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


def fold(quantized: QuantizedWeight, channels: int, groups: int = 1, group: int = GROUP) -> Array:
    """Add the copies' dequantized weights back onto their source channel: float32 [O, C, ...].

    channels: C, the original input channels (of one group). group: of these that share a scale, where the scale is
    [O, B]. The folded weight computes what the expanded one does.
    """
    ints, scale, source, _ = quantized
    check_groups(groups, ints.shape[0])
    if not 0 <= channels <= ints.shape[1]:
        raise ValueError(f"channels={channels!r}: use the original channels, at most the {ints.shape[1]} expanded ones")
    if scale.ndim < 2:
        return kernels(ints).fold(ints, scale, source, groups, channels)
    if tuple(scale.shape) != (len(ints), count_blocks(channels, ints.shape[1] - channels, check_group("group", group))):
        raise ValueError(f"group={group!r} gives no scale of shape {list(scale.shape)}: use what it was quantized with")
    folded = fold_weight(*map(as_tensor, (ints, scale, source)), groups, channels, group)
    return folded if isinstance(ints, Tensor) else folded.numpy()
