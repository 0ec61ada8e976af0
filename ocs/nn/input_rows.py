"""Round each row of an input with a scale of its own, which is measured as the input arrives.

A row is the vector over the channels, the last axis of x [..., C]: a token, a time step, a hidden state. Its scale is
d = max|row| / qmax, so that nothing is clipped and nothing need be calibrated: x_hat = d round_half_even(x / d), with
integers -qmax .. qmax. A row of zeros has scale 1 and stays zeros; one with NaN or Inf has no finite scale and is NaN.
Where channels are split (ocs.nn.input_parts), the largest part of a row decides: d = max|x * factor| / qmax.
"""

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad

from ocs.kernels.constants import SMALLEST, qmax


def refuse_nested(x: Tensor) -> None:
    """Refuse a nested tensor, whose shape no rounding knows."""
    if x.is_nested:
        raise RuntimeError("a quantized layer input cannot be a nested tensor: pad it, torch.nested.to_padded_tensor")


def row_scales(x: Tensor, bits: int, factor: Tensor | None = None) -> Tensor:
    """Compute the scale of each row of x [..., C], as functional.scale_for does: float32 [..., 1].

    factor: float32 [C], the size of each channel's largest part, where channels are split.
    """
    parts = x if factor is None else x * factor
    largest = parts.abs().amax(-1, keepdim=True).float()
    scale = largest / torch.full_like(largest, qmax(bits))  # a number would make it a product with 1 / qmax
    return scale.clamp(min=SMALLEST).masked_fill(largest == 0, 1.0)


def rows_on_grid(x: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    """Round x [..., C] to its rows' grids, in the dtype of x: the definition, which torch.fx traces through.

    scale: float32 [..., 1], where x is no whole row, but parts of one.
    """
    scale, most = row_scales(x, bits) if scale is None else scale, qmax(bits)
    q = torch.round(x.float() / scale).clamp(-most, most) + 0.0  # zero comes out as +0
    return (q * scale).to(x.dtype)


def round_rows(x: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    """Round each row of x [..., C] to `bits` bits with its own scale, in the dtype of x; the gradient is 1."""
    return _round_rows(x, bits, scale)  # torch.fx looks wrapped functions up in this module


@torch.fx.wrap  # as a whole: tracing knows no gradients
def _round_rows(x: Tensor, bits: int, scale: Tensor | None) -> Tensor:
    refuse_nested(x)
    if not x.shape[-1]:
        return x
    derived = torch.is_grad_enabled() and x.requires_grad
    if derived or forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return rows_on_grid(x.detach(), bits, scale) + (x - x.detach())
    return rows_on_grid(x, bits, scale)
