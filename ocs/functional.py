"""Tensor-level API: split, clip and quantize one weight, fake-quantize one activation.

Every function takes numpy arrays or torch tensors of float32, float64, float16 or bfloat16, any layout and device,
computes in float32 and returns the same kind. k bits are the integers -qmax .. qmax, qmax = 2^(k - 1) - 1. "The paper"
is Zhao et al., ICML 2019, arXiv 1901.09504.
"""

from ocs.kernels.constants import CLIP_METHODS, qmax
from ocs.weight.error import output_error, sqnr_db, weight_error
from ocs.weight.grid import dequantize, fake_quantize, quantize
from ocs.weight.integers import fold, quantize_split
from ocs.weight.plan import plan_channels, plan_splits, quantize_weight, splits_for
from ocs.weight.quantize_plan import quantize_plan
from ocs.weight.threshold import METHODS, clip_threshold, histogram
from ocs.weight.types import QuantizedWeight, Scheme, SplitPlan

How = Scheme  # the name that it had before

__all__ = [
    "CLIP_METHODS",
    "METHODS",
    "QuantizedWeight",
    "Scheme",
    "SplitPlan",
    "clip_threshold",
    "dequantize",
    "fake_quantize",
    "fold",
    "histogram",
    "output_error",
    "plan_channels",
    "plan_splits",
    "qmax",
    "quantize",
    "quantize_plan",
    "quantize_split",
    "quantize_weight",
    "splits_for",
    "sqnr_db",
    "weight_error",
]
