"""Tensor-level API: split, clip and quantize one weight, fake-quantize one activation.

Every function takes numpy arrays or torch tensors of float32, float64, float16 or bfloat16, any layout and device,
computes in float32 and returns the same kind. k bits are the integers -qmax .. qmax, qmax = 2^(k - 1) - 1. "The paper"
is Zhao et al., ICML 2019, arXiv 1901.09504.
"""

from importlib import import_module
from typing import Any

from ocs.kernels.constants import CLIP_METHODS
from ocs.weight.apply_plan import quantize_plan
from ocs.weight.entry import plan_splits, quantize_weight
from ocs.weight.error import output_error, remaining_error, sqnr_db, weight_error
from ocs.weight.grid import dequantize, fake_quantize, quantize
from ocs.weight.integers import fold
from ocs.weight.plan import plan_channels
from ocs.weight.threshold import METHODS, Clip, clip_threshold, histogram
from ocs.weight.types import Array, QuantizedWeight, Scheme, SplitPlan

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
    "quantize",
    "quantize_plan",
    "quantize_weight",
    "remaining_error",
    "sqnr_db",
    "weight_error",
]

How = Scheme  # its name before

_ONCE_HERE = {  # names that users may have imported from here, by the module that they are in now
    "ocs.kernels.constants": "SMALLEST TINY qmax",
    "ocs.weight.types": "GAIN Granularity Quantization Rounding Select Split",
    "ocs.weight.arguments": "check_array check_bits check_choice check_clip check_groups check_moments check_ratio"
    " check_rounding check_select check_values",
    "ocs.weight.plan": "splits_for",
    "ocs.weight.selection": "choose_splits",
    "ocs.weight.threshold": "CHANNEL_BINS scale_for split_thresholds zeros",
    "ocs.weight.integers": "quantize_split",
    "ocs.weight.apply_plan": "AUTO",
    "ocs.weight.error": "output_power signal_and_noise",
}
_RENAMED = {"check_moments": "check_second_moments", "zeros": "count_zeros"}


def __getattr__(name: str) -> Any:
    """Find a name that was once here in the module that it is in now."""
    for home, names in _ONCE_HERE.items():
        if name in names.split():
            return getattr(import_module(home), _RENAMED.get(name, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def search_threshold(counts: Array, limit: Array, bits: int, method: str, signed: bool) -> Array:
    """Find the threshold by one of CLIP_METHODS in histograms [..., bins] of |x| over [0, limit], shaped like limit."""
    return Clip(method, bits, signed).threshold(limit, counts)
