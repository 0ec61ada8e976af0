"""Layers that are linear in their weight, and the linear layer itself.

Such a layer runs expanded as a sum, L(x[source]; W) = L(x; W[:, :C]) + L(x[copies]; W[:, C:]): the original channels
need not be moved, and the few copies cost little.
"""

from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.nn.base import QuantizedLayer
from ocs.nn.copied_channels import CopiedChannels, copied_channels, copies_needed
from ocs.nn.input_parts import (
    InputParts,
    as_dense,
    oracle_parts,
    round_folded,
    round_parts,
    static_parts,
    take_channels,
    with_row_scales,
)
from ocs.nn.registry import register


class Operands(NamedTuple):
    """What a layer multiplies: the original channels by the weight `original`, and the copies, if any, by `copied`."""

    input: Tensor  # the original channels
    copied_input: Tensor | None = None
    copied: Tensor | None = None


class QuantProduct(QuantizedLayer):
    """A layer that is linear in its weight: it computes the original channels' part and, expanded, the copies' part."""

    original: Tensor
    copied: Tensor | None
    bias: nn.Parameter | None
    derived_buffers = ("copied", "copied_index", "copied_at", "cut_source", "cut_factor", "cut_shift")
    splits_input = True

    @property
    def weight(self) -> Tensor:
        """The float layer's weight as this one computes it, in its shape: [O, C, ...], copies added up.

        For whoever reads a layer's weight instead of calling it; made anew each time where the layer runs expanded.
        Writes are refused.
        """
        return self.float_weight("weight")

    def whole_weight(self, name: str) -> Tensor:
        """Make the weight as a whole, where there are copies."""
        return self.original if self.copied is None else super().whole_weight(name)

    def forward_buffer(self, name: str) -> str:
        """Name the buffer that forward reads: the original channels' part stands for the whole weight."""
        return "original"

    def rebuild(self) -> None:
        """Make both parts of the weight from the integers again, each in one pass."""
        self._buffers.update(dict.fromkeys(self.derived_buffers))
        parts = self._cut_input()
        if self.expand:
            self._rebuild_expanded(parts)
        else:
            self._set_part("original", self.folded("weight"))

    def _rebuild_expanded(self, parts: InputParts) -> None:
        source, C = self.source_of("weight"), self.channels["weight"]
        self._set_part("original", self._columns(slice(C)))
        if parts.source is not None:
            copied = copied_channels(source, parts, self.groups, C)
            self._buffers.update(copied_index=copied.channel, copied_at=copied.part)
            self._set_part("copied", self._copied_weight(copied))
        elif self.splits:
            self._buffers["copied_index"] = self.copies()
            self._set_part("copied", self._columns(slice(C, None)))

    def _columns(self, columns: slice) -> Tensor:
        """Dequantize some columns of the expanded weight, float32 [O, m, ...]."""
        if self.scale_group:
            return self.dequantized("weight")[:, columns]
        ints, scale, _ = self.weight_state("weight")
        return torch.ops.ocs.dequantize(ints[:, columns], scale)

    def _set_part(self, buffer: str, weight: Tensor) -> None:
        self.set_forward_buffer(buffer, self.in_float_layout(weight), like=self.original)

    def expanded_shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape with the copies of weight and input; Oracle OCS has the least, some batches need more."""
        if self.input_grid is None or not self.input_grid.splits:
            return super().expanded_shape(name)
        ints, _, source = self.weight_state(name)
        shape, channels = list(ints.shape), self.channels[name]
        shape[1] = channels + copies_needed(source, self._buffers.get("input_source"), self.groups, channels)
        if self.input_grid.oracle:
            shape[1] += self.input_grid.splits
        return tuple(self.in_float_layout(torch.empty(shape, dtype=torch.int8, device="meta")).shape)

    def static_parts(self) -> InputParts:
        """Split the input as calibration said; there are no parts yet where each batch has its own."""
        if self.input_grid is None or self.input_grid.oracle:
            return InputParts(None)
        return static_parts(self.input_grid, self.input_scale, self._buffers.get("input_source"), self.groups)

    def _cut_input(self) -> InputParts:
        """Keep in buffers how calibration split the input, lest each call find it out again."""
        parts = self.static_parts()
        self._buffers.update(cut_source=parts.source, cut_factor=parts.factor, cut_shift=parts.shift)
        return parts

    def _parts_of_input(self, x: Tensor) -> InputParts:
        """Tell how an input is split and scaled: as calibration said, or by its own values."""
        if self.input_grid.oracle:
            return oracle_parts(self.input_grid, x, self.input_axis, self.groups)
        parts = InputParts(self.input_scale, self.cut_source, self.cut_factor, self.cut_shift)
        return with_row_scales(x, self.input_grid, parts)

    def _copied_weight(self, copied: CopiedChannels) -> Tensor:
        """Dequantize the columns of the expanded weight that these channels meet: float32 [O, m, ...]."""
        ints, scale, _ = self.weight_state("weight")
        weight = self.dequantized("weight") if self.scale_group else ints
        grouped = weight.unflatten(0, (self.groups, -1))
        shape = (self.groups, 1, -1, *[1] * (ints.dim() - 2))
        columns = copied.column.view(shape).expand(-1, grouped.shape[1], -1, *ints.shape[2:])
        chosen = (grouped.gather(2, columns) * copied.used.view(shape)).flatten(0, 1)
        return chosen if self.scale_group else torch.ops.ocs.dequantize(chosen, scale)

    # --- What forward multiplies

    def operands(self, x: Tensor) -> Operands:
        """Prepare an input: rounded if it is to be, with the copies that an expanded layer multiplies besides."""
        x = as_dense(x)
        if self.input_grid is None:
            return self._unsplit_operands(x)
        parts = self._parts_of_input(x)
        if not self.expand:
            return Operands(round_folded(x, self.input_grid, parts, self.input_axis))
        if self.input_grid.oracle and parts.source is not None:
            return self._oracle_operands(x, parts)
        return self._static_operands(x, parts)

    def _unsplit_operands(self, x: Tensor) -> Operands:
        """Take the copies in the weight from an input that is split nowhere."""
        if self.copied is None:
            return Operands(x)
        return Operands(x, take_channels(x, self.copied_index, self.input_axis), self.copied)

    def _static_operands(self, x: Tensor, parts: InputParts) -> Operands:
        """Round an input of which the same channels are split in every batch."""
        rounded = round_parts(x, self.input_grid, parts, self.input_axis)
        if self.copied is None:
            return Operands(rounded)
        copies = round_parts(x, self.input_grid, parts, self.input_axis, self.copied_index, self.copied_at)
        return Operands(rounded, copies, self.copied)

    def _oracle_operands(self, x: Tensor, parts: InputParts) -> Operands:
        """Round an input of which this batch's own channels are split."""
        rounded = round_parts(x, self.input_grid, parts, self.input_axis)
        copied = copied_channels(self.source_of("weight"), parts, self.groups, self.channels["weight"])
        copies = round_parts(x, self.input_grid, parts, self.input_axis, copied.channel, copied.part)
        weight = self.in_float_layout(self._copied_weight(copied)).to(self.original.dtype)
        return Operands(rounded, copies, weight)


@register
class QuantLinear(QuantProduct):
    """nn.Linear with a quantized weight: x [..., in_features] -> [..., out_features]. Its channels are in_features."""

    float_kind = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Compute input W^T + bias."""
        if self.input_grid is not None:
            x, copied_input, copied = self.operands(input)
            y = F.linear(x, self.original, self.bias)
            return y if copied is None else y + F.linear(copied_input, copied)
        if self.copied is None:
            return F.linear(input, self.original, self.bias)
        return _expanded_linear(input, self.original, self.copied, self.copied_index, self.bias)


@torch.fx.wrap  # as a whole: tracing knows no shapes
def _expanded_linear(input: Tensor, original: Tensor, copied: Tensor, copies: Tensor, bias: Tensor | None) -> Tensor:
    if input.is_nested or input.layout != torch.strided:
        return F.linear(input, original + _scattered(copied, copies, original), bias)
    if input.shape[-1:] != original.shape[1:]:
        raise RuntimeError(f"QuantLinear: expected {original.shape[1]} input channels, not {list(input.shape)}")
    x = input.reshape(-1, original.shape[1])
    y = F.linear(x, original, bias)
    y.addmm_(x[:, copies].to(y.dtype), copied.t().to(y.dtype))
    return y.view(*input.shape[:-1], original.shape[0])


def _scattered(copied: Tensor, copies: Tensor, original: Tensor) -> Tensor:
    """Add the weights of copies up on their source channels [O, C]."""
    return torch.zeros_like(original).index_add(1, copies, copied)
