"""Quantized layers: linear, convolutions, attention; recurrent ones are in ocs.recurrent.

A linear layer or convolution runs expanded as a sum, L(x[source]; W) = L(x; W[:, :C]) + L(x[copies]; W[:, C:]): the
original channels need not be moved, and the few copies cost little. See ocs.layer for what all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.layer import QuantizedLayer
from ocs.recurrent import QuantGRU, QuantGRUCell, QuantLSTM, QuantLSTMCell, QuantRNN, QuantRNNCell

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantRNN",
    "QuantRNNCell",
    "QuantizedLayer",
]


class _QuantProduct(QuantizedLayer):
    """A layer that is linear in its weight. What runs: the original channels' part, and where expanded the copies'."""

    original: Tensor
    copied: Tensor | None
    bias: nn.Parameter | None
    more_running = ("copied",)

    @property
    def weight(self) -> Tensor:
        """The float layer's weight as this one computes it, in its shape: [O, C, ...], copies added up.

        For whoever reads a layer's weight instead of calling it; made anew each time where the layer runs expanded.
        """
        if self.copied is None:
            return self.original
        return self.layout(self.folded("weight"), self.groups).to(self.original.dtype)

    def running(self, name: str) -> str:
        """The original channels' part stands for the whole."""
        return "original"

    def rebuild(self) -> None:
        """Both parts from the integers, each in one pass."""
        ints, scale, _ = self.held("weight")
        C, like, copied = self.channels["weight"], self.original, None
        if self.expand and ints.shape[1] > C:
            original = torch.ops.ocs.dequantize(ints[:, :C], scale)
            copied = self.layout(torch.ops.ocs.dequantize(ints[:, C:], scale), self.groups)
        else:
            original = self.folded("weight")
        self.set_running("original", self.layout(original, self.groups), like)
        self.set_running("copied", copied, like)


class QuantLinear(_QuantProduct):
    """nn.Linear with a quantized weight: x [..., in_features] -> [..., out_features]. Its channels are in_features."""

    float_kind = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """input W^T + bias."""
        if self.copied is None:
            return F.linear(input, self.original, self.bias)
        return _expanded_linear(input, self.original, self.copied, self.copies(), self.bias)


@torch.fx.wrap  # as a whole: tracing knows no shapes
def _expanded_linear(input: Tensor, original: Tensor, copied: Tensor, copies: Tensor, bias: Tensor | None) -> Tensor:
    if input.is_nested:
        return F.linear(input, original, bias) + F.linear(input, _scattered(copied, copies, original))
    if input.shape[-1:] != original.shape[1:]:
        raise RuntimeError(f"QuantLinear: expected {original.shape[1]} input channels, not {list(input.shape)}")
    x = input.reshape(-1, original.shape[1])
    y = F.linear(x, original, bias)
    y.addmm_(x[:, copies].to(y.dtype), copied.t().to(y.dtype))
    return y.view(*input.shape[:-1], original.shape[0])


def _scattered(copied: Tensor, copies: Tensor, original: Tensor) -> Tensor:
    """The copies' weights on their source channels [O, C]."""
    return torch.zeros_like(original).index_add(1, copies, copied)


@torch.fx.wrap
def _add_pointwise(y: Tensor, copied: Tensor, x: Tensor) -> Tensor:
    """y [..., O, *spatial] + copied [O, n] x [..., n, *spatial], in one pass over y."""
    rank = copied.dim() - 2
    w, x = copied.flatten(1).to(y.dtype), x.flatten(-rank).to(y.dtype)
    in_rows = y.view(*y.shape[:-rank], math.prod(y.shape[-rank:]))
    if y.dim() == rank + 1:
        in_rows.addmm_(w, x)
    else:
        in_rows.baddbmm_(w.expand(y.shape[0], -1, -1), x)
    return y


class _QuantConvolution(_QuantProduct):
    """What convolutions of either direction share."""

    kept = ("_reversed_padding_repeated_twice",)

    def gather(self, x: Tensor) -> Tensor:
        """The copies' input. Indexing, not index_select, which is slow on channels-last inputs."""
        return x[(..., self.copies(), *[slice(None)] * len(self.kernel_size))]

    def sum_parts(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """product(x, weight, bias) over the original channels plus that over the copies."""
        y = product(x, self.original, self.bias)
        if self.copied is None:
            return y
        return y.add_(product(self.gather(x), self.copied, None))


class _QuantConv(_QuantConvolution):
    """nn.Conv1d/2d/3d with a quantized weight, batched or not; every padding mode and groups."""

    convolve: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor) -> Tensor:
        """x [N, in_channels, ...] or [in_channels, ...] -> [..., out_channels, ...]."""
        x, padding = input, self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if self.copied is not None and self._is_pointwise():  # which is mostly memory
            return _add_pointwise(self.convolve(x, self.original, self.bias), self.copied, self.gather(x))
        return self.sum_parts(
            x, lambda x, w, b: self.convolve(x, w, b, self.stride, padding, self.dilation, self.groups)
        )

    def _is_pointwise(self) -> bool:
        plain = self.groups == 1 and (self.padding in ("valid", "same") or not any(self.padding))
        return plain and set(self.kernel_size) == set(self.stride) == {1}


class QuantConv1d(_QuantConv):
    """nn.Conv1d with a quantized weight: x [N, C, L]."""

    float_kind = nn.Conv1d
    convolve = staticmethod(F.conv1d)


class QuantConv2d(_QuantConv):
    """nn.Conv2d with a quantized weight: x [N, C, H, W]."""

    float_kind = nn.Conv2d
    convolve = staticmethod(F.conv2d)


class QuantConv3d(_QuantConv):
    """nn.Conv3d with a quantized weight: x [N, C, D, H, W]."""

    float_kind = nn.Conv3d
    convolve = staticmethod(F.conv3d)


class _QuantConvTranspose(_QuantConvolution):
    """nn.ConvTranspose1d/2d/3d with a quantized weight; its integers are [O, C + n, ...] like those of any layer."""

    convolve: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def layout(weight: Tensor, groups: int) -> Tensor:
        """[groups C, O / groups, ...] as [O, C, ...], and back."""
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x [N, in_channels, ...] or [in_channels, ...] -> [..., out_channels, ...], of `output_size` where given."""
        output_padding = self.float_kind._output_padding(
            self, input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        return self.sum_parts(
            input,
            lambda x, w, b: self.convolve(
                x, w, b, self.stride, self.padding, output_padding, self.groups, self.dilation
            ),
        )


class QuantConvTranspose1d(_QuantConvTranspose):
    """nn.ConvTranspose1d with a quantized weight: x [N, C, L]."""

    float_kind = nn.ConvTranspose1d
    convolve = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose):
    """nn.ConvTranspose2d with a quantized weight: x [N, C, H, W]."""

    float_kind = nn.ConvTranspose2d
    convolve = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose):
    """nn.ConvTranspose3d with a quantized weight: x [N, C, D, H, W]."""

    float_kind = nn.ConvTranspose3d
    convolve = staticmethod(F.conv_transpose3d)


class QuantMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with quantized input projections; its forward is torch's own, with every mask and option.

    That forward reads in_proj_weight (or q_, k_ and v_proj_weight) and out_proj.weight itself, so they run folded. The
    output projection is a QuantLinear.
    """

    float_kind = nn.MultiheadAttention
    kept = ("_qkv_same_embed_dim",)
    kept_children = ("out_proj",)
    only_folded = "its forward reads its weights itself"

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """One weight for all three projections, or one each where their inputs differ in size."""
        if float_layer._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    @staticmethod
    def other_names(float_layer: nn.Module) -> tuple[str, ...]:
        """The bias, the weights that it does without (None), and the additional key and value."""
        names = (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "in_proj_bias",
            "bias_k",
            "bias_v",
        )
        return tuple(name for name in names if name not in QuantMultiheadAttention.weight_names(float_layer))


#: The float layers that can be quantized, and what replaces them.
REPLACEMENTS: dict[type[nn.Module], type[QuantizedLayer]] = {
    kind.float_kind: kind
    for kind in (
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
        QuantLinear,
        QuantLSTM,
        QuantGRU,
        QuantRNN,
        QuantLSTMCell,
        QuantGRUCell,
        QuantRNNCell,
        QuantMultiheadAttention,
    )
}
CONVOLUTIONS: tuple[type[nn.Module], ...] = tuple(
    kind.float_kind for kind in REPLACEMENTS.values() if issubclass(kind, _QuantConvolution)
)
