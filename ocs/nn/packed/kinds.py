"""The kinds of packed layers: what each does otherwise than the quantized layer that it is packed from.

packed_kind() joins one of the classes here with that of the quantized layer, in whose stead it computes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ocs.nn.attention import QuantMultiheadAttention
from ocs.nn.base import QuantizedLayer
from ocs.nn.embedding import _QuantLookup
from ocs.nn.input_parts import as_dense, round_folded
from ocs.nn.own_forward import QuantOwnForward, own_forward
from ocs.nn.packed.attention import PackedAttention
from ocs.nn.packed.layer import PackedLayer
from ocs.nn.packed.read_weight import ReadWeight
from ocs.nn.packed.recurrent import PackedCell, PackedRecurrent
from ocs.nn.product import Operands, QuantLinear, QuantProduct
from ocs.nn.recurrent import _RecurrentCell, _RecurrentLayer
from ocs.nn.weights import parameter_of


class PackedProduct(PackedLayer):
    """A layer that is linear in its weight, which convolutions unpack at each call."""

    derived_buffers = ("cut_source", "cut_factor", "cut_shift")

    def rebuild(self) -> None:
        """Keep none of the weight's values, and how the input is split."""
        super().rebuild()
        self._cut_input()

    @property
    def original(self) -> Tensor:
        """The weight in floats, copies added up, made anew."""
        return self.whole_weight("weight")

    def operands(self, x: Tensor) -> Operands:
        """Prepare an input, the parts of split channels added up: the copies are in the weight."""
        return Operands(self.rounded(x))

    def rounded(self, x: Tensor) -> Tensor:
        """Round an input to its grid, if it has one."""
        x, grid = as_dense(x), self.input_grid
        if grid is None:
            return x
        return round_folded(x, grid, self._parts_of_input(x), self.input_axis)


class PackedLinear(PackedProduct):
    """nn.Linear whose weight is multiplied as it is packed."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute input W^T + bias."""
        self.refuse_tracing()
        x = as_dense(input)
        if x.is_nested or self.asks_for_gradient(x):
            return F.linear(self.rounded(x), self.original.to(x.dtype), self.bias)
        if x.shape[-1:] != (self.in_features,):
            raise RuntimeError(f"PackedLinear: expected {self.in_features} input channels, not {list(x.shape)}")
        grid = self.row_grid()
        if grid is None:
            return self.packed_weight("weight").multiply(self.rounded(x), self.bias)
        return self.packed_weight("weight").multiply(x, self.bias, grid)


class PackedLookup(PackedLayer):
    """A table of rows, which are unpacked as they are looked up."""

    def rows(self, index: Tensor) -> Tensor:
        """Dequantize the rows [..., embedding_dim] that an index asks for."""
        self.refuse_tracing()
        if index.is_floating_point():
            raise RuntimeError(f"{type(self).__name__}: expected indices of integers, not {index.dtype}")
        return self.packed_weight("weight").rows(index).to(self.dtype)


class PackedOwnForward(PackedLayer):
    """A layer with a forward of its own, which reads a weight that multiplies as it is packed."""

    def __getattr__(self, name: str) -> Any:
        """Give the forward, and whoever asks, a parameter as a tensor of packed weights."""
        parts = [each for each in self.__dict__.get("channels", ()) if parameter_of(each) == name]
        if not parts:
            return super().__getattr__(name)
        weights, stacked = [self.packed_weight(part) for part in parts], name not in self.channels
        if not weights[0].form.tiled or torch.compiler.is_compiling() or self.asks_for_gradient():
            whole = [self.in_float_layout(weight.folded()).to(self.dtype) for weight in weights]
            return torch.stack(whole) if stacked else whole[0]
        return ReadWeight.of(weights, self.dtype, transposed=self.transposed_weight, stacked=stacked)

    @property
    def input_axis(self) -> int:
        """The axis of the channels, before as many others as the weight has."""
        return 1 - len(self.forms[next(iter(self.channels))].shape)


# --- Their classes ----------------------------------------------------------------------------------------------------

_KINDS: tuple[tuple[type[QuantizedLayer], type[PackedLayer]], ...] = (
    (QuantLinear, PackedLinear),
    (QuantProduct, PackedProduct),
    (_RecurrentLayer, PackedRecurrent),
    (_RecurrentCell, PackedCell),
    (_QuantLookup, PackedLookup),
    (QuantMultiheadAttention, PackedAttention),
    (QuantOwnForward, PackedOwnForward),
)


@cache
def packed_kind(kind: type[QuantizedLayer]) -> type[PackedLayer]:
    """Make the class of packed layers for a kind of quantized ones."""
    packed = next(packed for quantized, packed in _KINDS if issubclass(kind, quantized))
    content = {"__doc__": kind.__doc__, "__module__": __name__, "__reduce_ex__": _reduce}
    return type(kind.__name__.replace("Quant", "Packed"), (packed, kind), content)


def _reduce(layer: PackedLayer, protocol: int) -> Any:
    """Pickle a layer by the kind that it is packed from, as its class has no name in a module."""
    kind = layer.quantized_kind()
    own = issubclass(kind, QuantOwnForward)
    made_of = (kind.float_kind, kind.like, kind.transposed_weight) if own else (kind,)
    return _blank, made_of, layer.__getstate__()


def _blank(*made_of: Any) -> PackedLayer:
    kind = packed_kind(own_forward(*made_of) if len(made_of) == 3 else made_of[0])
    return kind.__new__(kind)
