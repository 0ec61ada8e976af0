"""Quantized layers: linear, convolutions, attention; recurrent ones are in ocs.recurrent.

A linear layer or convolution runs expanded as a sum, L(x[source]; W) = L(x; W[:, :C]) + L(x[copies]; W[:, C:]): the
original channels need not be moved, and the few copies cost little. See ocs.layer for what all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.activation import (
    CopiedChannels,
    Cuts,
    copied_channels,
    copies_needed,
    folded,
    gather,
    oracle_cuts,
    rounded,
    static_cuts,
)
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


class QuantProduct(QuantizedLayer):
    """A layer that is linear in its weight. What runs: the original channels' part, and where expanded the copies'."""

    original: Tensor
    copied: Tensor | None
    bias: nn.Parameter | None
    more_running = ("copied", "copied_index", "copied_at", "cut_source", "cut_factor", "cut_shift")
    splits_input = True

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
        ints, scale, source = self.held("weight")
        C, like = self.channels["weight"], self.original
        cuts = self._static_cuts()
        self._buffers.update(cut_source=cuts.source, cut_factor=cuts.factor, cut_shift=cuts.shift)
        self._buffers.update(copied=None, copied_index=None, copied_at=None)
        if not self.expand:
            self.set_running("original", self.layout(self.folded("weight"), self.groups), like)
            return
        self.set_running("original", self.layout(torch.ops.ocs.dequantize(ints[:, :C], scale), self.groups), like)
        if cuts.source is not None:
            channels = copied_channels(source, cuts, self.groups, C)
            self._buffers.update(copied_index=channels.index, copied_at=channels.at)
            self.set_running("copied", self._copied_weight(channels), like)
        elif ints.shape[1] > C:
            self._buffers["copied_index"] = self.copies()
            self.set_running("copied", self.layout(torch.ops.ocs.dequantize(ints[:, C:], scale), self.groups), like)

    def expanded_shape(self, name: str) -> tuple[int, ...]:
        """C + the copies of weight and input together; of Oracle OCS the least, as batches may need some more."""
        if self.input_grid is None or not self.input_grid.splits:
            return super().expanded_shape(name)
        shape, channels = list(self.held(name)[0].shape), self.channels[name]
        of_input = self._buffers.get("input_source")
        shape[1] = channels + copies_needed(self.source_of(name), of_input, self.groups, channels)
        if self.input_grid.oracle:
            shape[1] += self.input_grid.splits
        return tuple(self.layout(torch.empty(shape, device="meta"), self.groups).shape)

    def _static_cuts(self) -> Cuts:
        """Of the input, as long as they do not depend on the batch."""
        if self.input_grid is None or self.input_grid.oracle:
            return Cuts(None)
        return static_cuts(self.input_grid, self.input_scale, self._buffers.get("input_source"), self.groups)

    def _copied_weight(self, channels: CopiedChannels) -> Tensor:
        """The columns of the expanded weight that these channels need, in the float layer's layout."""
        ints, scale, _ = self.held("weight")
        grouped = ints.unflatten(0, (self.groups, -1))
        shape = (self.groups, 1, -1, *[1] * (ints.dim() - 2))
        columns = channels.column.view(shape).expand(-1, grouped.shape[1], -1, *ints.shape[2:])
        chosen = (grouped.gather(2, columns) * channels.used.view(shape)).flatten(0, 1)
        return self.layout(torch.ops.ocs.dequantize(chosen, scale), self.groups)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input of the original channels and, where there are any, of the copies, with the copies' weight."""
        grid, axis = self.input_grid, self.input_axis
        if grid is None:
            return x, None if self.copied is None else gather(x, self.copied_index, axis), self.copied
        if grid.oracle:
            cuts = oracle_cuts(grid, x, axis, self.groups)
        else:
            cuts = Cuts(self.input_scale, self.cut_source, self.cut_factor, self.cut_shift)
        if not self.expand:
            return folded(x, grid, cuts, axis), None, None
        own, index, at, copied = rounded(x, grid, cuts, axis), self.copied_index, self.copied_at, self.copied
        if grid.oracle and cuts.source is not None:
            channels = copied_channels(self.source_of("weight"), cuts, self.groups, self.channels["weight"])
            index, at, copied = channels.index, channels.at, self._copied_weight(channels).to(self.original.dtype)
        return own, None if copied is None else rounded(x, grid, cuts, axis, index, at), copied


class QuantLinear(QuantProduct):
    """nn.Linear with a quantized weight: x [..., in_features] -> [..., out_features]. Its channels are in_features."""

    float_kind = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """input W^T + bias."""
        if self.input_grid is not None:
            own, more, copied = self.operands(input)
            y = F.linear(own, self.original, self.bias)
            return y if copied is None else y + F.linear(more, copied)
        if self.copied is None:
            return F.linear(input, self.original, self.bias)
        return _expanded_linear(input, self.original, self.copied, self.copied_index, self.bias)


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


class _QuantConvolution(QuantProduct):
    """What convolutions of either direction share."""

    kept = ("_reversed_padding_repeated_twice",)

    @property
    def input_axis(self) -> int:
        """Before the spatial ones."""
        return -1 - len(self.kernel_size)

    def sum_parts(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """product(x, weight, bias) over the original channels plus that over the copies."""
        own, more, copied = self.operands(x)
        y = product(own, self.original, self.bias)
        return y if copied is None else y.add_(product(more, copied, None))


class _QuantConv(_QuantConvolution):
    """nn.Conv1d/2d/3d with a quantized weight, batched or not; every padding mode and groups."""

    convolve: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor) -> Tensor:
        """x [N, in_channels, ...] or [in_channels, ...] -> [..., out_channels, ...]."""
        x, padding = input, self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if self._is_pointwise():  # which is mostly memory
            own, more, copied = self.operands(x)
            y = self.convolve(own, self.original, self.bias)
            return y if copied is None else _add_pointwise(y, copied, more)
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
    input_names = ("query", "key", "value")

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """One weight for all three projections, or one each where their inputs differ in size."""
        if float_layer._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As torch's, on quantized inputs where they are to be; what is one tensor stays one."""
        seen = {id(x): x for x in (query, key, value)}
        on_grid = {name: self.on_grid(x) for name, x in seen.items()}
        return super().forward(*(on_grid[id(x)] for x in (query, key, value)), *args, **kwargs)

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
