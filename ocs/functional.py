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
    "CLIP_METHODS", "METHODS", "QuantizedWeight", "Scheme", "SplitPlan", "clip_threshold", "dequantize",
    "fake_quantize", "fold", "histogram", "output_error", "plan_channels", "plan_splits", "quantize",
    "quantize_plan", "quantize_weight", "remaining_error", "sqnr_db", "weight_error",
]  # fmt: skip

How = Scheme  # its name before

_RENAMED = {"check_moments": "check_second_moments", "zeros": "count_zeros"}
_HOMES = "kernels.constants weight.types weight.arguments weight.plan weight.selection weight.threshold weight.integers"
_HOMES = (*_HOMES.split(), "weight.apply_plan", "weight.error")


def __getattr__(name: str) -> Any:
    """Find a name that users may have imported from here in the module that it is in now."""
    for home in () if name.startswith("_") else map(import_module, (f"ocs.{home}" for home in _HOMES)):
        if hasattr(home, _RENAMED.get(name, name)):
            return getattr(home, _RENAMED.get(name, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def search_threshold(counts: Array, limit: Array, bits: int, method: str, signed: bool) -> Array:
    """Find the threshold by one of CLIP_METHODS in histograms [..., bins] of |x| over [0, limit], shaped like limit."""
    return Clip(method, bits, signed).threshold(limit, counts)
