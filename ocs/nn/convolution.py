"""Convolutions with quantized weights, transposed ones too."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.nn.product import QuantProduct
from ocs.nn.registry import register

CONVOLUTIONS: tuple[type[nn.Module], ...]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.fx.wrap
def _add_pointwise(y: Tensor, copied: Tensor, x: Tensor) -> Tensor:
    """Add copied [O, n] x [..., n, *spatial] to y [..., O, *spatial], in one pass over y."""
    rank = copied.dim() - 2
    w, x = copied.flatten(1).to(y.dtype), x.flatten(-rank).to(y.dtype)
    in_rows = y.view(*y.shape[:-rank], math.prod(y.shape[-rank:]))
    if y.dim() == rank + 1:
        in_rows.addmm_(w, x)
    else:
        in_rows.baddbmm_(w.expand(y.shape[0], -1, -1), x)
    return y


def _widens(x: Tensor, copied: Tensor) -> bool:
    """Tell whether the copies cost less beside the channels of x than added to the outputs: these are many, x is small.

    So it is with channels last, where both lie side by side. The weight, put together anew, is to be smaller still.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.dim() != 4 or not x.is_cpu:
        return False
    channels, last = x.shape[1], x.stride(1) == 1 and not x.is_contiguous()
    return last and copied.shape[0] >= 2 * channels and x.numel() >= 8 * channels * channels


@torch.fx.wrap  # as a whole: tracing knows no shapes
def _pointwise_2d(x: Tensor, original: Tensor, copied_input: Tensor, copied: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve the original channels and the copies, with filters [.., 1, 1]."""
    if not _widens(x, copied):
        return _add_pointwise(F.conv2d(x, original, bias), copied, copied_input)
    filler = -(original.shape[1] + copied.shape[1]) % 8  # torch is slow at other numbers of channels
    parts = [x, copied_input, x.new_zeros(x.shape[0], filler, *x.shape[2:])]
    rows = torch.cat([part.permute(0, 2, 3, 1) for part in parts], -1)
    weight = torch.cat([original, copied, original.new_zeros(original.shape[0], filler, 1, 1)], 1)
    return F.conv2d(rows.permute(0, 3, 1, 2), weight, bias)


class _QuantConvolution(QuantProduct):
    """A convolution of either direction."""

    kept_attributes = ("_reversed_padding_repeated_twice",)
    convolve: ClassVar[Callable[..., Tensor]]

    @property
    def input_axis(self) -> int:
        """The axis of the channels, before the spatial ones."""
        return -1 - len(self.kernel_size)

    def sum_parts(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """Add product(x, weight, bias) over the original channels and over the copies."""
        x, copied_input, copied = self.operands(x)
        y = product(x, self.original, self.bias)
        return y if copied is None else y.add_(product(copied_input, copied, None))


class QuantConv(_QuantConvolution):
    """nn.Conv1d/2d/3d with a quantized weight, batched or not; every padding mode and groups."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve x [N, in_channels, ...] or [in_channels, ...] -> [..., out_channels, ...]."""
        x, padding = input, self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if self._is_pointwise():  # which is mostly memory
            x, copied_input, copied = self.operands(x)
            if copied is not None and copied.dim() == 4:
                return _pointwise_2d(x, self.original, copied_input, copied, self.bias)
            y = self.convolve(x, self.original, self.bias)
            return y if copied is None else _add_pointwise(y, copied, copied_input)
        return self.sum_parts(
            x, lambda x, w, b: self.convolve(x, w, b, self.stride, padding, self.dilation, self.groups)
        )

    def _is_pointwise(self) -> bool:
        plain = self.groups == 1 and (self.padding in ("valid", "same") or not any(self.padding))
        return plain and set(self.kernel_size) == set(self.stride) == {1}


@register
class QuantConv1d(QuantConv):
    """nn.Conv1d with a quantized weight: x [N, C, L]."""

    float_kind = nn.Conv1d
    convolve = staticmethod(F.conv1d)


@register
class QuantConv2d(QuantConv):
    """nn.Conv2d with a quantized weight: x [N, C, H, W]."""

    float_kind = nn.Conv2d
    convolve = staticmethod(F.conv2d)


@register
class QuantConv3d(QuantConv):
    """nn.Conv3d with a quantized weight: x [N, C, D, H, W]."""

    float_kind = nn.Conv3d
    convolve = staticmethod(F.conv3d)


class _QuantConvTranspose(_QuantConvolution):
    """nn.ConvTranspose1d/2d/3d with a quantized weight; its integers are [O, C + n, ...] like those of any layer."""

    @staticmethod
    def layout(weight: Tensor, groups: int) -> Tensor:
        """Permute a weight [groups C, O / groups, ...] to [O, C, ...], or one [O, C, ...] to the former."""
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve x [N, in_channels, ...] or [in_channels, ...] -> [..., out_channels, ...]; see torch's layer."""
        output_padding = self.float_kind._output_padding(
            self, input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return self.sum_parts(
            input,
            lambda x, w, b: self.convolve(
                x, w, b, self.stride, self.padding, output_padding, self.groups, self.dilation
            ),
        )


@register
class QuantConvTranspose1d(_QuantConvTranspose):
    """nn.ConvTranspose1d with a quantized weight: x [N, C, L]."""

    float_kind = nn.ConvTranspose1d
    convolve = staticmethod(F.conv_transpose1d)


@register
class QuantConvTranspose2d(_QuantConvTranspose):
    """nn.ConvTranspose2d with a quantized weight: x [N, C, H, W]."""

    float_kind = nn.ConvTranspose2d
    convolve = staticmethod(F.conv_transpose2d)


@register
class QuantConvTranspose3d(_QuantConvTranspose):
    """nn.ConvTranspose3d with a quantized weight: x [N, C, D, H, W]."""

    float_kind = nn.ConvTranspose3d
    convolve = staticmethod(F.conv_transpose3d)
