"""Quantized layers, in two executions with the same values (section 3 of the paper).

Expanded: the layer has C + n input channels and gathers its input by `source`; its integers fit k bits. This is the
form to deploy. Folded (expand=False): the copies' weights are added back onto their source channel, so that the layer
costs what the float one did. They agree to float rounding and hold the same state: `weight_int` int8 [O, C + n, ...],
`scale` float32 [] or [O], `source` int64 [C + n] and the float layer's bias. `weight` is what runs: float, not saved,
rebuilt from the integers whenever those or its dtype change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.composite import source_valid
from ocs.functional import QuantizedWeight, qmax


class QuantizedLayer(nn.Module):
    """What the layers below share: the integers and the float weight made of them.

    Args:
        float_layer: the layer to replace; its hyperparameters and its bias (the same Parameter) are taken over.
        quantized: its weight, from functional.quantize_weight.
        bits: what the integers fit, 2 to 8.
        expand: run expanded, else folded.
    """

    float_kind: ClassVar[type[nn.Module]]  # what it replaces
    kept: ClassVar[tuple[str, ...]]  # the float layer's hyperparameters

    groups: int = 1
    channels_per_group: int  # C: the original input channels of one group

    weight_int: Tensor
    scale: Tensor
    source: Tensor
    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, float_layer: nn.Module, quantized: QuantizedWeight, bits: int, expand: bool = True) -> None:
        super().__init__()
        hyperparameters = {name: getattr(float_layer, name) for name in self.kept}
        vars(self).update(hyperparameters, bits=bits, expand=expand, training=float_layer.training)
        self.register_buffer("weight_int", quantized.ints)
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("source", quantized.source)
        self.register_buffer("weight", float_layer.weight.detach(), persistent=False)
        self.register_parameter("bias", float_layer.bias)
        self.rebuild()

    @property
    def splits(self) -> int:
        """The copies over all groups."""
        return self.source.numel() - self.groups * self.channels_per_group

    def rebuild(self) -> None:
        """Make `weight` from the integers again, in its dtype and memory format."""
        if self.expand:
            weight = torch.ops.ocs.dequantize(self.weight_int, self.scale)
        else:
            weight = torch.ops.ocs.fold(self.weight_int, self.scale, self.source, self.groups, self.channels_per_group)
        self.weight = weight.to(self.weight.dtype, memory_format=_memory_format(self.weight))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The input of the expanded channels; x itself where there is nothing to copy."""
        return x.index_select(dim, self.source) if self.expand and self.splits else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Moves and casts as nn.Module does, but scale stays float32 and weight is rounded once, from the integers."""
        before = {name: getattr(self, name) for name in ("weight_int", "scale", "source")}
        dtype = self.weight.dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        if self.weight.dtype != dtype:
            self.rebuild()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._problem_of(*(state_dict.get(prefix + name) for name in ("weight_int", "scale", "source")))
        if problem:  # nothing of this layer is loaded
            error_msgs.append(f"{prefix.removesuffix('.')}: {problem}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.scale.dtype != torch.float32:
            self.scale = self.scale.float()
        self.rebuild()

    def _problem_of(self, weight_int: Tensor | None, scale: Tensor | None, source: Tensor | None) -> str:
        """What no layer of this shape can have, or ""; shapes are compared by nn.Module."""
        most = qmax(self.bits)
        if _has_values(weight_int) and (
            weight_int.dtype != torch.int8 or bool((weight_int.short().abs() > most).any())
        ):
            return f"weight_int is not of {self.bits}-bit integers (int8 in [-{most}, {most}])"
        if _has_values(scale) and not bool((scale.isfinite() & (scale > 0)).all()):
            return "scale is not positive and finite"
        same_shape = _has_values(source) and source.shape == self.source.shape
        if same_shape and not source_valid(source.long(), self.groups, self.channels_per_group):
            return "source is no split plan of this layer"
        return ""

    def extra_repr(self) -> str:
        """Hyperparameters as the float layer shows them, then what was quantized."""
        form = "expanded" if self.expand else "folded"
        scales = "channel" if self.scale.dim() else "tensor"
        shown = self.float_kind.extra_repr(self)
        return f"{shown}, bits={self.bits}, splits={self.splits} ({form}), scale per {scales}"


def _has_values(tensor: Tensor | None) -> bool:
    return tensor is not None and not tensor.is_meta


def _memory_format(weight: Tensor) -> torch.memory_format:
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.dim() == rank and not weight.is_contiguous() and weight.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


class QuantLinear(QuantizedLayer):
    """nn.Linear with a quantized weight: x [..., in_features] -> [..., out_features]. Its channels are in_features."""

    float_kind = nn.Linear
    kept = ("in_features", "out_features")

    @property
    def channels_per_group(self) -> int:
        """C = in_features."""
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(self.gather(x, -1), self.weight, self.bias)


class _QuantConv(QuantizedLayer):
    """nn.Conv1d/2d/3d with a quantized weight, batched or not; every padding mode and groups."""

    kept = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "output_padding",
        "_reversed_padding_repeated_twice",
    )
    convolve: ClassVar[Callable[..., Tensor]]

    @property
    def channels_per_group(self) -> int:
        """C = in_channels / groups."""
        return self.in_channels // self.groups

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, ...] or [in_channels, ...] -> [..., out_channels, ...]."""
        x = self.gather(x, -1 - len(self.kernel_size))
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self.convolve(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


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


#: The float layers that can be quantized, and what replaces them.
REPLACEMENTS: dict[type[nn.Module], type[QuantizedLayer]] = {
    kind.float_kind: kind for kind in (QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear)
}
