"""What arguments may be: kinds of arrays, choices and ranges, and the errors for all else."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ocs.weight.types import CLIP_METHODS, Array, Rounding, Split

FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_array(name: str, x: Any, min_rank: int = 0, *, detach: bool = True) -> Array:
    """The array as the kernels take it, or a TypeError or ValueError that says what it is instead."""
    if not isinstance(x, Array) or dtype_name(x) not in FLOATS:
        raise TypeError(f"{name} must be a numpy array or torch tensor of {', '.join(FLOATS)}, not {kind_of(x)}")
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


def check_groups(groups: Any, outputs: int) -> None:
    """A divisor of the output channels."""
    whole = isinstance(groups, Integral) and not isinstance(groups, bool)
    if not whole or groups < 1 or groups > max(outputs, 1) or outputs % groups:
        raise ValueError(f"groups={groups!r}: use a positive integer that divides the {outputs} output channels")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of the strings."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use {' or '.join(map(repr, choices))}")


def check_select(select: Any) -> None:
    """A rule's name, or a rule."""
    if not callable(select) and select not in ("max", "error"):
        raise ValueError(f"select={select!r}: use 'max', 'error', or a callable (w, n) that returns n channels")


def check_rounding(rounding: Any, split: Any) -> None:
    """Both are choices, and go together."""
    check_choice("split", split, get_args(Split))
    check_choice("rounding", rounding, get_args(Rounding))
    if rounding != "nearest" and split == "naive":
        raise ValueError(
            f"rounding={rounding!r} with split='naive': naive halves do not add up to a moved integer; use split='qa'"
        )


def check_clip(name: str, clip: Any, *, auto: bool = False) -> None:
    """A clip method's name, or a fraction of the largest magnitude; or "auto", where that is a choice."""
    names = ("none", *["auto"] * auto, *CLIP_METHODS)
    fraction = isinstance(clip, Real) and not isinstance(clip, bool) and 0 < clip <= 1
    if not fraction and not (isinstance(clip, str) and clip in names):
        shown = ", ".join(f'"{each}"' for each in names)
        raise ValueError(
            f"{name}={clip!r}: use {shown}, or a number in (0, 1], the fraction of the largest |x| to keep"
        )


def check_moments(moments: Any, rounding: str, w: Array, groups: int) -> Tensor | None:
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


def dtype_name(x: Array) -> str:
    """As numpy has it."""
    return str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else x.dtype.name


def kind_of(x: Any) -> str:
    """What something is, for an error."""
    return f"{type(x).__name__} of {x.dtype}" if isinstance(x, Array) else type(x).__name__


def as_numpy(x: Array) -> np.ndarray:
    """On the CPU."""
    return x.cpu().numpy() if isinstance(x, Tensor) else x


def as_tensor(x: Array) -> Tensor:
    """A tensor of the same values; of an array a copy, as it may be read-only or laid out backwards."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, order="C"))


def filled_like(x: Array, value: float) -> Array:
    """The number as an array of x's kind and shape; see ocs.composite on why divisors are arrays."""
    return torch.full_like(x, value) if isinstance(x, Tensor) else np.full_like(x, value)
