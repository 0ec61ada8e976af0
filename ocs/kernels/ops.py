"""The kernels, whatever the array: which implementation serves it, and what torch must know about each operator.

`ocs._C` (numpy arrays) and `torch.ops.ocs` (tensors) have the same functions with the same arguments; `kernels(x)`
picks. CPU tensors run the C kernels, other devices `ocs.composite`; torch.compile and torch.export see the shapes
below.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocs import _C
from ocs.kernels import composite
from ocs.kernels.constants import OCTAVE_BINS

isa = _C.isa
set_isa = _C.set_isa


def kernels(x: np.ndarray | Tensor) -> ModuleType | Any:
    """The namespace of kernels for this kind of array."""
    return torch.ops.ocs if isinstance(x, Tensor) else _C


_other_devices = torch.library.Library("ocs", "IMPL", "CompositeExplicitAutograd")
for _name in composite.KERNELS:
    _other_devices.impl(_name, getattr(composite, _name))


def _meta_together(*tensors: Tensor) -> None:
    """A shape without values is no input of a call that has values."""
    torch._check(len({t.is_meta for t in tensors}) == 1, lambda: "ocs: meta tensors cannot be mixed with others")


# --- Shapes and dtypes, for torch.compile, torch.export and meta tensors ----------------------------------------------


@torch.library.register_fake("ocs::abs_max")
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@torch.library.register_fake("ocs::histogram")
def _(x: Tensor, bins: int, limit: float) -> Tensor:
    return x.new_empty(bins, dtype=torch.int64)


@torch.library.register_fake("ocs::octave_histogram")
def _(x: Tensor, limit: float) -> Tensor:
    return x.new_empty((x.shape[1], OCTAVE_BINS), dtype=torch.int64)


@torch.library.register_fake("ocs::channel_max")
def _(w: Tensor, groups: int) -> Tensor:
    return w.new_empty(groups * w.shape[1], dtype=torch.float32)


@torch.library.register_fake("ocs::split_plan")
def _(channel_max: Tensor, groups: int, splits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = channel_max.numel() + groups * splits
    dtypes = (torch.int64, torch.int32, torch.int32, torch.float32)
    return tuple(channel_max.new_empty(size, dtype=dtype) for dtype in dtypes)


@torch.library.register_fake("ocs::output_max")
def _(w: Tensor, source: Tensor, depth: Tensor, groups: int) -> Tensor:
    _meta_together(w, source, depth)
    return w.new_empty(w.shape[0], dtype=torch.float32)


@torch.library.register_fake("ocs::split_histogram")
def _(w: Tensor, source: Tensor, depth: Tensor, groups: int, bins: int, limit: Tensor) -> Tensor:
    _meta_together(w, source, depth, limit)
    return limit.new_empty((*limit.shape, bins), dtype=torch.int64)


@torch.library.register_fake("ocs::clip_threshold")
def _(counts: Tensor, limit: Tensor, bits: int, signed: bool, method: int) -> Tensor:
    _meta_together(counts, limit)
    return limit.new_empty(limit.shape, dtype=torch.float32)


@torch.library.register_fake("ocs::quantize_weight")
def _(
    w: Tensor,
    scale: Tensor,
    source: Tensor,
    depth: Tensor,
    offset: Tensor,
    groups: int,
    bits: int,
    quantization_aware: bool,
) -> Tensor:
    _meta_together(w, scale, source, depth, offset)
    return w.new_empty((w.shape[0], source.numel() // groups, *w.shape[2:]), dtype=torch.int8)


@torch.library.register_fake("ocs::squant_weight")
def _(w: Tensor, scale: Tensor, source: Tensor, depth: Tensor, offset: Tensor, groups: int, bits: int) -> Tensor:
    _meta_together(w, scale, source, depth, offset)
    return w.new_empty((w.shape[0], source.numel() // groups, *w.shape[2:]), dtype=torch.int8)


@torch.library.register_fake("ocs::fold")
def _(ints: Tensor, scale: Tensor, source: Tensor, groups: int, channels: int) -> Tensor:
    _meta_together(ints, scale, source)
    return ints.new_empty((ints.shape[0], channels, *ints.shape[2:]), dtype=torch.float32)


@torch.library.register_fake("ocs::weight_error")
def _(w: Tensor, ints: Tensor, scale: Tensor, source: Tensor, groups: int) -> Tensor:
    _meta_together(w, ints, scale, source)
    return w.new_empty(2, dtype=torch.float64)


@torch.library.register_fake("ocs::output_error")
def _(w: Tensor, ints: Tensor, scale: Tensor, source: Tensor, groups: int, gain: float) -> Tensor:
    _meta_together(w, ints, scale, source)
    return w.new_empty(w.shape[0], dtype=torch.float64)


@torch.library.register_fake("ocs::quantize")
def _(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    _meta_together(x, scale)
    return x.new_empty(x.shape, dtype=torch.int8 if signed else torch.uint8)


@torch.library.register_fake("ocs::dequantize")
def _(q: Tensor, scale: Tensor) -> Tensor:
    _meta_together(q, scale)
    return q.new_empty(q.shape, dtype=torch.float32)


@torch.library.register_fake("ocs::fake_quantize")
def _(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    _meta_together(x, scale)
    return torch.empty_like(x)


@torch.library.register_fake("ocs::pack")
def _(ints: Tensor, bits: int) -> Tensor:
    return ints.new_empty((ints.numel() * bits + 7) // 8, dtype=torch.uint8)


@torch.library.register_fake("ocs::unpack")
def _(packed: Tensor, numel: int, bits: int) -> Tensor:
    return packed.new_empty(numel, dtype=torch.int8)


# --- Gradient ---------------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """fake_quantize whose gradient is 1 where x rounds to the grid and 0 where it is clipped.

    A Function beside the operator, not registered on it: that would cost every call without a gradient 8 us.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
        """x_hat, in x's shape and dtype."""
        return torch.ops.ocs.fake_quantize(x, scale, bits, signed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remembers where nothing was clipped."""
        x, scale, bits, signed = inputs
        qmin, qmax = composite.grid(bits, signed)
        q = torch.round(x.float() / scale)
        ctx.save_for_backward((q >= qmin) & (q <= qmax))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient where nothing was clipped."""
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """The operator, with that gradient where one is asked for. Nothing is checked."""
    if torch.is_grad_enabled() and x.requires_grad:
        return StraightThrough.apply(x, scale, bits, signed)
    return torch.ops.ocs.fake_quantize(x, scale, bits, signed)
