"""The quantized weight of a layer that is trained: the integers' own values forwards, straight through backwards.

Forwards, a weight w is what the quantized layer computes with: split, rounded with scale s, folded (the same kernels,
so equal bit for bit). Backwards, rounding counts as the identity within the grid and as a constant beyond it: a part
that is one of n of a channel is w / n, and passes 1 / n of the gradient where |w| / n is within the threshold. With a
the sum of what passes (1 inside, 0 outside where nothing is split),

    d w_hat / d w = a,    d w_hat / d s = (w_hat - a w) / s,

which without splits is LSQ's: round(w/s) - w/s within, -qmax or qmax beyond (Esser et al., ICLR 2020, equation 3).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocs.kernels.constants import SMALLEST, qmax
from ocs.nn.input_parts import largest_part, parts_of
from ocs.weight.types import Rounding, Split


class TrainedGrid(NamedTuple):
    """How a weight that is trained is rounded."""

    bits: int
    split: Split
    rounding: Rounding  # "nearest" or "squant"
    groups: int
    learned: bool  # whether its scale is; then the threshold ends what passes, else what still rounds to the grid does

    @property
    def edge(self) -> float:
        """The largest |w| / n, in steps, through which gradients pass."""
        return qmax(self.bits) + (0.0 if self.learned else 0.5)


def split_integers(w: Tensor, scale: Tensor, source: Tensor, grid: TrainedGrid) -> Tensor:
    """Quantize a float32 weight [O, C, ...] with the splits that `source` [G (C + n)] says: int8 [O, C + n, ...]."""
    parts, offset = parts_of(source, grid.groups * w.shape[1], grid.split)
    args = (w, scale, source, parts.int(), offset.int(), grid.groups, grid.bits)
    if grid.rounding == "squant":
        return torch.ops.ocs.squant_weight(*args)
    return torch.ops.ocs.quantize_weight(*args, grid.split != "naive")


def passed(w: Tensor, scale: Tensor, source: Tensor, grid: TrainedGrid) -> Tensor:
    """Compute which share of its gradient each weight gets, shaped as w [O, C, ...]: 0 to 1."""
    rows = (-1, *[1] * (w.dim() - 1))
    u = w.abs() / scale.view(rows if scale.dim() else ())
    if source.numel() == grid.groups * w.shape[1]:
        return (u <= grid.edge).to(w.dtype)
    splits = torch.bincount(source, minlength=grid.groups * w.shape[1]) - 1
    n = largest_part(splits, grid.split)
    smaller = torch.zeros_like(n) if grid.split == "even" else 2 * (splits + 1 - n)  # parts of 2 n, the others of n
    shape = (grid.groups, 1, -1, *[1] * (w.dim() - 2))
    n, larger, smaller = (each.view(shape).to(w.dtype) for each in (n, splits + 1 - smaller, smaller))
    u = u.unflatten(0, (grid.groups, -1))
    share = larger / n * (u <= grid.edge * n) + smaller / (2 * n) * (u <= 2 * grid.edge * n)
    return share.flatten(0, 1)


class _FoldedWeight(torch.autograd.Function):
    """See trained_weight()."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, scale: Tensor, source: Tensor, grid: TrainedGrid) -> Tensor:
        """Quantize and fold: float32 [O, C, ...]."""
        ints = split_integers(w, scale, source, grid)
        w_hat = torch.ops.ocs.fold(ints, scale, source, grid.groups, w.shape[1])
        return w_hat.add_(w, alpha=0)  # what is no number stays none: integers would hide that training diverged

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what both gradients need; the second only where a scale is learned."""
        w, scale, source, grid = inputs
        share = passed(w, scale, source, grid)
        rest = torch.addcmul(output, share, w, value=-1) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(share, rest, scale)
        ctx.qmax = qmax(grid.bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Give the gradients of w, and of its scale times 1 / sqrt(N qmax), N the weights that share it."""
        share, rest, scale = ctx.saved_tensors
        if rest is None:
            return grad * share, None, None, None
        of_scale = (grad * rest).flatten(1).sum(1)
        of_scale = (of_scale if scale.dim() else of_scale.sum()) / scale
        shared = grad.numel() // max(scale.numel(), 1)
        return grad * share, of_scale * gradient_scale(shared, ctx.qmax), None, None


def trained_weight(w: Tensor, scale: Tensor, source: Tensor, grid: TrainedGrid) -> Tensor:
    """Compute the folded quantized weight, float32 [O, C, ...], of a weight that gradients shall reach.

    scale: float32 [] or [O], positive; its gradient is LSQ's. source: int64 [G (C + n)], as in QuantizedWeight.
    """
    w = w.float()
    if torch.is_grad_enabled() and (w.requires_grad or scale.requires_grad):
        return _FoldedWeight.apply(w, scale, source, grid)
    return _FoldedWeight.forward(w, scale, source, grid)


def gradient_scale(count: int, largest: int) -> float:
    """Compute LSQ's scale of the gradient of a step size, 1 / sqrt(N qmax) (section 2.2 there)."""
    return 1 / math.sqrt(max(count, 1) * largest)


def positive(scale: Tensor) -> Tensor:
    """Make a scale that was learned one that a grid can have: its size, float32."""
    return scale.float().abs().clamp(min=SMALLEST)


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        """Give x itself."""
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the number."""
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return grad * ctx.factor, None
