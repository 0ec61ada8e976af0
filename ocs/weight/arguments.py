"""Checks of arguments: kinds of arrays, choices and ranges, and the errors for all else."""

import math
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ocs.kernels.constants import CLIP_METHODS, MAX_BITS, MIN_BITS
from ocs.weight.arrays import as_tensor, dtype_name, kind_of
from ocs.weight.blocks import GROUP_STEP
from ocs.weight.types import ARRAYS, Array, Granularity, Rounding, Scheme, Select, Split

FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_array(name: str, x: Any, min_rank: int = 0, *, detach: bool = True) -> Array:
    """Check that x is a float array, and return it as the kernels take it."""
    if not isinstance(x, ARRAYS) or dtype_name(x) not in FLOATS:
        hint = ": give its weight, layer.weight" if isinstance(x, nn.Module) else ""
        raise TypeError(f"{name} must be a numpy array or torch tensor of {', '.join(FLOATS)}, not {kind_of(x)}{hint}")
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {x.layout}: call .to_dense() first")
    if x.ndim < min_rank:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: at least {min_rank} dimensions are needed, [O, C, ...]")
    if isinstance(x, Tensor):
        return x.detach() if detach else x
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def check_values(name: str, x: Array) -> Array:
    """Check that the array holds values, and is more than a shape."""
    if isinstance(x, Tensor) and x.is_meta:
        raise ValueError(f"{name} is a meta tensor, which holds no values: give it values first")
    return x


def check_bits(name: str, bits: Any) -> int:
    """Check that bits is an integer from 2 to 8."""
    if not isinstance(bits, Integral) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name}={bits!r}: use an integer from {MIN_BITS} to {MAX_BITS}")
    return int(bits)


def check_ratio(name: str, r: Any) -> float:
    """Check that r is a number in [0, 1]."""
    if not isinstance(r, Real) or isinstance(r, bool) or not 0 <= r <= 1:
        raise ValueError(f"{name}={r!r}: use a number from 0 (no splits) to 1 (as many splits as channels)")
    return float(r)


def check_groups(groups: Any, outputs: int) -> None:
    """Check that groups divides the output channels."""
    whole = isinstance(groups, Integral) and not isinstance(groups, bool)
    if not whole or groups < 1 or groups > max(outputs, 1) or outputs % groups:
        raise ValueError(f"groups={groups!r}: use a positive integer that divides the {outputs} output channels")


def check_group(name: str, group: Any) -> int:
    """Check that group is a multiple of 32, as products with packed weights cut them."""
    if not isinstance(group, Integral) or isinstance(group, bool) or group <= 0 or group % GROUP_STEP:
        raise ValueError(f"{name}={group!r}: use a multiple of {GROUP_STEP}, the input channels that share a scale")
    return int(group)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Check that a value is one of these strings."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use {' or '.join(map(repr, choices))}")
    return value


def check_flag(name: str, value: Any, meaning: str = "True or False") -> bool:
    """Check that a value is True or False; meaning: what these are, for the error."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: use {meaning}")
    return value


def check_select(name: str, select: Any) -> Select:
    """Check that select is the name of a rule that chooses channels, or such a rule itself."""
    if not callable(select) and select not in ("max", "error"):
        raise ValueError(f"{name}={select!r}: use 'max', 'error', or a callable (w, n) that returns n channels")
    return select


def check_rounding(rounding: Any, split: Any, choices: tuple[str, ...] = get_args(Rounding)) -> None:
    """Check rounding and split, which must go together."""
    check_choice("split", split, get_args(Split))
    check_choice("rounding", rounding, choices)
    if rounding != "nearest" and split == "naive":
        raise ValueError(
            f"rounding={rounding!r} with split='naive': naive halves do not add up to a moved integer;"
            " use split='qa' or 'even'"
        )


def check_clip(name: str, clip: Any, *, auto: bool = False) -> str | float:
    """Check that clip is a method's name or a fraction of the largest magnitude; or "auto", where that is a choice."""
    names = ("none", "auto", *CLIP_METHODS) if auto else ("none", *CLIP_METHODS)
    fraction = isinstance(clip, Real) and not isinstance(clip, bool) and 0 < clip <= 1
    if not fraction and not (isinstance(clip, str) and clip in names):
        shown = ", ".join(f'"{each}"' for each in names)
        raise ValueError(
            f"{name}={clip!r}: use {shown}, or a number in (0, 1], the fraction of the largest |x| to keep"
        )
    return clip if isinstance(clip, str) else float(clip)


def check_scheme(w: Array, scheme: Scheme) -> tuple[Array, Scheme]:
    """Check a weight and how it is to be quantized, and return both as the steps take them."""
    w = check_values("w", check_array("w", w, min_rank=2))
    check_rounding(scheme.rounding, scheme.split)
    check_choice("granularity", scheme.granularity, get_args(Granularity))
    check_groups(scheme.groups, w.shape[0])
    check_clip("clip", scheme.clip, auto=True)
    return w, scheme._replace(bits=check_bits("bits", scheme.bits), group=check_group("group", scheme.group))


def check_second_moments(moments: Any, rounding: str, w: Array, groups: int) -> Tensor | None:
    """Check the second moments of what w meets, and return them as [G, C K, C K]; None where none are needed."""
    if moments is None:
        if rounding == "gptq":
            raise ValueError("rounding='gptq' needs moments=: the sum of x x^T over the inputs that w meets")
        return None
    if rounding != "gptq":
        raise ValueError(f"moments= with rounding={rounding!r} has no effect: use rounding='gptq'")
    second = as_tensor(check_values("moments", check_array("moments", moments)))
    N = math.prod(w.shape[1:])
    without_groups = groups == 1 and tuple(second.shape) == (N, N)
    if tuple(second.shape) != (groups, N, N) and not without_groups:
        raise ValueError(f"moments has shape {tuple(second.shape)}: use {(groups, N, N)}, C K = {N} for each group")
    if not second.isfinite().all():
        raise ValueError("moments holds NaN or Inf")
    return second.reshape(groups, N, N)
