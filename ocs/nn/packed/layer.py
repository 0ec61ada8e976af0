"""Quantized layers that hold k bits for each integer and no float weight: what ocs.pack makes.

A packed layer is the quantized layer of its kind but for what it holds: instead of `weight_int`, `scale` and `source`
the buffers `weight_packed` uint8, `scale` and `copies` int32 (the original channel of each copy), and no float weight:
it multiplies the packed one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.autograd import forward_ad

from ocs.nn.base import QuantizedLayer
from ocs.nn.hooked import reason_of_forward, take_hook
from ocs.nn.packed.weight import FLOAT_ROWS, Form, PackedWeight, RowGrid
from ocs.nn.state import packed_buffers, weight_buffers


class PackedLayer(QuantizedLayer):
    """What packed layers have in common."""

    of_other_form = "the state is of a model that is not packed: load it into one, call ocs.unpack on this one first"
    source_dtype = torch.int32
    derived_buffers = ()
    forms: dict[str, Form]  # of each weight

    # --- What it holds

    @classmethod
    def of(cls, layer: QuantizedLayer, pack: Callable[..., PackedWeight]) -> PackedLayer:
        """Make the packed layer that holds what a quantized one does.

        pack: PackedWeight.of, or what shares its results between layers that share integers.
        """
        packed = _with_attributes(cls, layer)
        others, packed._buffers, vars(packed)["forms"] = packed._buffers, {}, {}
        for name in layer.channels:
            ints, scale, source = layer.weight_state(name)
            form = (layer.bits, layer.groups, layer.channels[name], layer.scale_group)
            packed._hold(name, pack(ints, scale, source, *form))
        packed._take_buffers(layer, others)
        return packed

    def unpacked(self, unpack: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> QuantizedLayer:
        """Make the quantized layer that this one was packed from, to the bit.

        unpack: PackedWeight.state, or what shares its results between layers that share codes.
        """
        layer = _with_attributes(self.quantized_kind(), self)
        others, layer._buffers = layer._buffers, {}
        vars(layer).pop("forms")
        for name in self.channels:
            layer._buffers.update(zip(weight_buffers(name), unpack(*self.packed_weight(name)), strict=True))
        layer._take_buffers(self, others)
        return layer

    @classmethod
    def quantized_kind(cls) -> type[QuantizedLayer]:
        """Find the kind of quantized layers that this one is packed from."""
        return cls.__bases__[-1]

    def buffers_of(self, name: str) -> tuple[str, str, str]:
        """Name the buffers that hold a weight: its codes, scale and copies."""
        return packed_buffers(name)

    def other_codes(self, name: str) -> str:
        """Name the buffer that the quantized layer has of a weight, which this one has not."""
        return weight_buffers(name)[0]

    def hold(self, name: str, ints: Tensor, scale: Tensor, source: Tensor) -> None:
        """Pack what a weight consists of, and hold that."""
        vars(self).setdefault("forms", {})
        form = (self.bits, self.groups, self.channels[name], self.scale_group)
        self._hold(name, PackedWeight.of(ints, scale, source, *form))

    def _hold(self, name: str, weight: PackedWeight) -> None:
        self.forms[name] = weight.form
        self._buffers.update(zip(self.buffers_of(name), weight[:3], strict=True))

    def packed_weight(self, name: str) -> PackedWeight:
        """Give a weight as it is held."""
        self.refuse_tracing()
        codes, scale, copies = self.buffers_of(name)
        return PackedWeight(self._buffers[codes], self._buffers[scale], self._buffers[copies], self.forms[name])

    def weight_state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Unpack integers, scale and source of a weight."""
        return PackedWeight.state(*self.packed_weight(name))

    def source_of(self, name: str) -> Tensor:
        """Give the original channel of each expanded channel of a weight."""
        return self.packed_weight(name).source()

    def folded(self, name: str) -> Tensor:
        """Dequantize a weight to float32 [O, C, ...], with the copies added back onto their source channel."""
        return self.packed_weight(name).folded()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights that may be read."""
        return self._buffers[self.forward_buffer(next(iter(self.channels)))].dtype

    def whole_weight(self, name: str) -> Tensor:
        """Make a weight as it is computed, in the float layer's shape."""
        return self.in_float_layout(self.folded(name)).to(self.dtype)

    def expanded_shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape, in the float layer's layout, of the expanded weight."""
        return tuple(self.in_float_layout(torch.empty(self.forms[name].shape, dtype=torch.int8, device="meta")).shape)

    def derived_names(self) -> tuple[str, ...]:
        """Name the buffers that rebuild() fills, which are none of the weights'."""
        return self.derived_buffers

    def rebuild(self) -> None:
        """Keep the dtype of the weights and none of their values."""
        for name in self.channels:
            buffer = self.forward_buffer(name)
            codes = self._buffers[self.buffers_of(name)[0]]
            self._buffers[buffer] = codes.new_empty(0, dtype=self._buffers[buffer].dtype)

    def state_problem(self, name: str, *tensors: Tensor) -> str:
        """Say why these tensors cannot be what a weight consists of, or ""."""
        return PackedWeight(*tensors, self.forms[name]).problem(self.buffers_of(name)[0])

    def __getattr__(self, name: str) -> Any:
        """Unpack what a quantized layer has under another name: weight_int, source."""
        held = self.__dict__.get("channels", ()) if name.endswith("_int") or "source" in name else ()
        for weight in held:
            ints, _, source = weight_buffers(weight)
            if name == ints:
                return self.packed_weight(weight).integers()
            if name == source:
                return self.source_of(weight)
        return super().__getattr__(name)

    def refuse_tracing(self) -> None:
        """Refuse torch.fx.symbolic_trace, which would keep a float weight where a packed one is."""
        if not torch.compiler.is_compiling() and torch.fx._symbolic_trace._is_fx_tracing_flag:
            name = type(self).__name__
            raise RuntimeError(f"{name}: torch.fx.symbolic_trace cannot take it: use torch.export, or ocs.unpack first")

    # --- How its input is rounded

    def row_grid(self) -> RowGrid | None:
        """Tell how products round the input; None where they cannot, as channels of it are split."""
        grid = self.input_grid
        if grid is None:
            return FLOAT_ROWS
        if grid.splits or grid.oracle:
            return None
        return RowGrid(grid.bits) if grid.dynamic else RowGrid(grid.bits, self.input_scale, grid.signed)

    def asks_for_gradient(self, *inputs: Tensor | None) -> bool:
        """Tell whether a derivative is to reach these inputs, forward-mode too, or, in training, the biases."""
        if forward_ad._current_level >= 0:
            return True
        if not torch.is_grad_enabled() or torch.jit.is_tracing():  # a trace is for inference
            return False
        trained = self._parameters.values() if self.training else ()
        return any(tensor is not None and tensor.requires_grad for tensor in (*inputs, *trained))

    # --- As an nn.Module

    def extra_repr(self) -> str:
        """Show the hyperparameters as the float layer does, then what is packed."""
        weight = self.packed_weight(next(iter(self.channels)))
        shown = self.float_kind.extra_repr(self)
        shown = f"{shown}, " if shown else ""
        grid = f", input of {self.input_grid}" if self.input_grid else ""
        size = sum(form.packed_bytes() for form in self.forms.values())
        scales = self._shown_scales(weight.scale)
        return f"{shown}bits={self.bits}, splits={self.splits}, packed in {size:,} bytes, scale per {scales}{grid}"


def _with_attributes(kind: type[QuantizedLayer], layer: QuantizedLayer) -> QuantizedLayer:
    """Make a layer of another kind that has all that a layer has, in tables of its own."""
    reason = reason_of_forward(layer)
    if reason:
        raise ValueError(f"{reason}, which its replacement would lack: remove that first")
    made = kind.__new__(kind)
    vars(made).update({key: copy.copy(value) if type(value) is dict else value for key, value in vars(layer).items()})
    for own in ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl"):  # which call that layer
        vars(made).pop(own, None)
    vars(made)["_non_persistent_buffers_set"] = set(layer._non_persistent_buffers_set)
    vars(made).update(made.__getstate__())  # hooks that know the layer know this one
    take_hook(made, layer)
    return made
