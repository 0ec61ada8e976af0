"""Layers that are linear in their weight, and the linear layer itself.

Such a layer runs expanded as a sum, L(x[source]; W) = L(x; W[:, :C]) + L(x[copies]; W[:, C:]): the original channels
need not be moved, and the few copies cost little.
"""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.nn.base import QuantizedLayer
from ocs.nn.input import (
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
from ocs.nn.registry import register


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


@register
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
