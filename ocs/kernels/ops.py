"""The kernels, whatever the array: which implementation serves it, and the gradient.

`ocs._C` (numpy arrays) and `torch.ops.ocs` (tensors) have the same functions with the same arguments; `kernels(x)`
picks. CPU tensors run the C kernels, other devices `ocs.kernels.composite`, which says the shapes of results as well.
"""

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ocs import _C
from ocs.kernels import composite, composite_product  # noqa: F401 - both register kernels

isa = _C.isa
isas = _C.isas
set_isa = _C.set_isa


def kernels(x: np.ndarray | Tensor) -> ModuleType | Any:
    """The namespace of kernels for this kind of array."""
    return torch.ops.ocs if isinstance(x, Tensor) else _C


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
        ctx.save_for_backward(_inside(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient where nothing was clipped."""
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class LearnedStep(torch.autograd.Function):
    """fake_quantize whose scale is learned, too, by LSQ's gradient (Esser et al., ICLR 2020, equations 3 and 5).

    Of x it is 1 within the thresholds and 0 beyond; of the scale round(x / s) - x / s within and the largest or
    smallest integer beyond.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
        """x_hat, in x's shape and dtype."""
        return torch.ops.ocs.fake_quantize(x, scale, bits, signed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remembers what both gradients need."""
        x, scale, bits, signed = inputs
        ctx.save_for_backward(x, output, scale)
        ctx.grid = composite.grid(bits, signed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Both gradients."""
        (x, x_hat, scale), (qmin, qmax) = ctx.saved_tensors, ctx.grid
        u = x.float() / scale
        inside = (u >= qmin) & (u <= qmax)
        of_scale = (grad.float() * (x_hat.float() / scale - u * inside)).sum()
        return grad * inside, of_scale.view_as(scale), None, None


def _inside(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """Whether x rounds to the grid and is not clipped."""
    qmin, qmax = composite.grid(bits, signed)
    q = torch.round(x.float() / scale)
    return (q >= qmin) & (q <= qmax)


def _straight_through(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """fake_quantize with that gradient in torch's own operations, which derive forwards, too, and can be traced."""
    through = torch.where(_inside(x, scale, bits, signed), x, 0)
    return torch.ops.ocs.fake_quantize(x.detach(), scale, bits, signed) + (through - through.detach())


def fake_quantize(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """The operator, with that gradient where one is asked for. Nothing is checked."""
    if forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return _straight_through(x, scale, bits, signed)
    if torch.is_grad_enabled() and scale.requires_grad:
        return LearnedStep.apply(x, scale, bits, signed)
    if torch.is_grad_enabled() and x.requires_grad:
        return StraightThrough.apply(x, scale, bits, signed)
    return torch.ops.ocs.fake_quantize.default(x, scale, bits, signed)  # to look for the overload takes a microsecond
