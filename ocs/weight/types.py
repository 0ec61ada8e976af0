"""Values that the steps of quantizing a weight hand on: choices, split plans, quantized weights."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from ocs.weight.hessian import Hessian

Array = np.ndarray | Tensor
ARRAYS = (np.ndarray, Tensor)  # for isinstance: Dynamo of torch 2.10 takes no union
Granularity = Literal["tensor", "channel", "group"]
Split = Literal["qa", "naive", "even"]
Rounding = Literal["nearest", "squant", "gptq"]
Choice = Callable[[Array, int], Iterable[int]]  # w float32 [O, C, ...] of one group, n -> n of its input channels
Select = Literal["max", "error"] | Choice
GROUP = 64  # input channels that share a scale where granularity="group" says no more
GAIN = 10.0  # what changes of gain weigh in output_error where the model is not known


class SplitPlan(NamedTuple):
    """Splits of a weight's channels (section 3 of the paper), over C + n expanded channels, group by group."""

    source: Array  # int64: the original channel
    depth: Array  # int32: how often this copy was halved; floor(log2 parts)
    offset: Array  # int32: which of the parts it is in quantization-aware splitting
    split_max: Array  # float32: max|w| after splitting
    channel_max: Array  # float32 [C]: max|w| of the original channels
    parts: Array  # int32: how many like this one make up the channel, 2^depth where it was halved


class QuantizedWeight(NamedTuple):
    """A weight as k-bit integers: w is about scale * ints, a channel's integers and its copies' added up."""

    ints: Array  # int8 [O, C + n, ...]
    scale: Array  # float32 [], or [O] per output channel, or [O, B] per block of input channels too; always positive
    source: Array  # int64 [C + n]: the original channel of each expanded one, 0 .. C - 1 first (per group)
    threshold: Array  # float32, shaped like scale: the largest magnitude on the grid


class Scheme(NamedTuple):
    """The choices by which a weight is quantized, see functional.quantize_weight; but for its splits."""

    bits: int
    clip: str | float = "none"
    granularity: Granularity = "tensor"
    split: Split = "qa"
    rounding: Rounding = "nearest"
    groups: int = 1
    hessian: Hessian | None = None  # of what it meets, for rounding="gptq"
    gain: float = GAIN  # see output_error
    group: int = GROUP  # with granularity="group": input channels that share a scale
    few: bool = False  # whether clip="auto" tries but a few thresholds: to compare errors, not for integers to keep


class Quantization(NamedTuple):
    """A quantized weight, the clip method that gave its threshold, and the sums of w^2 and of (w - w_hat)^2."""

    quantized: QuantizedWeight
    clip: str | float
    error: tuple[float, float]
