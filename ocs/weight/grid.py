"""Any array to the k-bit grid and back, one scale for all of it."""

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from ocs.kernels import ops
from ocs.kernels.constants import SMALLEST
from ocs.kernels.ops import kernels
from ocs.weight.arguments import check_array, check_bits, check_values
from ocs.weight.arrays import array_like, dtype_name, kind_of
from ocs.weight.types import ARRAYS, Array


def fake_quantize(x: Array, scale: float | Array, bits: int, signed: bool = True) -> Array:
    """Compute scale * clamp(round_half_even(x / scale)), shaped like x and of its dtype.

    scale: one positive finite number (a float or a 0-d float32 array). signed: integers -qmax .. qmax, else
    0 .. 2^k - 1. Inf saturates, NaN stays NaN. The gradient is 1 where x rounds to the grid, 0 where it is clipped.
    """
    args = (check_array("x", x, detach=False), *_grid(x, scale, bits), signed)
    if not isinstance(x, Tensor):
        return kernels(x).fake_quantize(*args).astype(x.dtype, copy=False)
    return ops.fake_quantize(*args)


def quantize(x: Array, scale: float | Array, bits: int, signed: bool = True) -> Array:
    """Compute clamp(round_half_even(x / scale)) as int8, or uint8 where not signed, see fake_quantize; refuse NaN."""
    x = check_values("x", check_array("x", x))
    if math.isnan(kernels(x).abs_max(x)):
        raise ValueError("x holds NaN, which no integer stands for")
    return kernels(x).quantize(x, *_grid(x, scale, bits), signed)


def dequantize(q: Array, scale: float | Array) -> Array:
    """Compute q * scale, float32 shaped like q (int8 or uint8); one scale, or one per entry of the first axis."""
    if not isinstance(q, ARRAYS) or dtype_name(q) not in ("int8", "uint8"):
        raise TypeError(f"q must be an int8 or uint8 array or tensor, not {kind_of(q)}")
    scale = _as_scale(q, scale)
    if scale.ndim > 0 and (q.ndim == 0 or tuple(scale.shape) != (q.shape[0],)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}: use one number, or one per entry of q's first axis")
    return kernels(q).dequantize(q, scale)


def _grid(x: Array, scale: float | Array, bits: int) -> tuple[Array, int]:
    """Check the one scale and the bits of a grid for x."""
    scale = _as_scale(x, scale)
    if math.prod(scale.shape) != 1:
        raise ValueError(f"scale has shape {tuple(scale.shape)}: use one number")
    return scale, check_bits("bits", bits)


def _as_scale(x: Array, scale: float | Array) -> Array:
    """Convert scale to the kind of array that x is, checked where it can be read without waiting for a device."""
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
    return array_like(value, x)


def _check_positive(valid: bool, scale: float | Array) -> None:
    """Raise the error of a scale that is not valid."""
    if not valid:
        raise ValueError(f"scale={scale!r}: use a positive finite number (in float32)")
