"""Quantized LSTM, GRU and RNN layers and cells: the weights of inputs, hidden states and projections alike.

Each weight has its own split plan and scale. Folded, a layer is one fused call with the folded weights. Expanded, it
widens: a copy of hidden unit j in W_hh [gates H, H + n] is a second unit with the same gate rows, so that it computes
the same state as unit j, step after step, without a gather inside the loop. Inputs and initial states are gathered by
`source`, outputs and final states cropped to H. A stack of layers is then a chain of single-layer fused calls; dropout
comes between crop and gather, so that copies share its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ocs.nn.base import QuantizedLayer
from ocs.nn.registry import register

States = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM


class _Recurrent(QuantizedLayer):
    """What layers and cells share: gates, widening, and states."""

    gates: ClassVar[int]
    input_if_asked = True  # as in the paper
    has_cell: ClassVar[bool] = False  # a cell state besides the hidden one

    def suffixes(self) -> Iterator[str]:
        """What follows weight_ih and weight_hh, for every layer and direction."""
        yield ""

    def source(self, name: str) -> Tensor:
        """The original channel of each expanded one, in weight_{name}."""
        return self.source_of(f"weight_{name}")

    def units(self, suffix: str) -> Tensor:
        """The original hidden unit of each unit of the widened layer: those that the next weight splits."""
        projected = f"weight_hr{suffix}" in self.channels
        return self.source(f"hr{suffix}" if projected else f"hh{suffix}")

    def rows(self, name: str) -> Tensor:
        """The rows of the float layer's weight that the widened one has: of its units, gate by gate.

        A projection's rows are the hidden state, which the next step's weight splits.
        """
        kind, suffix = name.removeprefix("weight_")[:2], name.removeprefix("weight_")[2:]
        if kind == "hr":
            return self.source(f"hh{suffix}")
        units = self.units(suffix)
        first = torch.arange(self.gates, device=units.device) * self.hidden_size
        return (first[:, None] + units).flatten()

    def __getattr__(self, name: str) -> Any:
        """weight_hh_l0 and the like, for whoever reads them: what the layer computes, in the float layer's shape."""
        if name in self.__dict__.get("channels", ()):
            return self.folded(name).to(getattr(self, self.running(name)).dtype)
        return super().__getattr__(name)

    def running(self, name: str) -> str:
        """weight_hh_l0 runs as running_hh_l0."""
        return name.replace("weight", "running")

    def expanded_shape(self, name: str) -> tuple[int, ...]:
        """The widened rows, C + n columns."""
        return self.rows(name).numel(), self.source_of(name).numel()

    def rebuild(self) -> None:
        """The weights, and the rows that the biases run with."""
        super().rebuild()
        for suffix in self.suffixes():
            rows = self.rows(f"weight_hh{suffix}") if self.widened else None
            self.register_buffer(f"gate_rows{suffix}", rows, persistent=False)

    def effective(self, name: str) -> Tensor:
        """Folded, or widened."""
        if not self.widened:
            return self.folded(name)
        return self.dequantized(name)[self.rows(name)]

    @property
    def widened(self) -> bool:
        """Runs expanded, and there is something to expand."""
        return self.expand and self.splits > 0

    def bias_of(self, name: str, suffix: str) -> Tensor | None:
        """bias_ih or bias_hh as it runs."""
        bias, rows = getattr(self, f"{name}{suffix}"), getattr(self, f"gate_rows{suffix}")
        return bias if bias is None or rows is None else bias[rows]

    def state_sources(self, suffix: str) -> tuple[Tensor, ...]:
        """The original units of the widened hidden state, and of the widened cell state."""
        return (self.source(f"hh{suffix}"), self.units(suffix))[: 1 + self.has_cell]

    def state_sizes(self) -> tuple[int, ...]:
        """H of the hidden state (after a projection), and of the cell state."""
        return (getattr(self, "proj_size", 0) or self.hidden_size, self.hidden_size)[: 1 + self.has_cell]

    def as_states(self, hx: Any, x: Tensor, *leading: int) -> States:
        """The initial states [*leading, H], checked; zeros where none are given."""
        sizes = [(*leading, H) for H in self.state_sizes()]
        if hx is None:
            return tuple(x.new_zeros(size) for size in sizes)
        states = tuple(hx) if self.has_cell else (hx,)
        if len(states) != len(sizes):
            raise RuntimeError(f"{type(self).__name__}: expected initial states (h, c), not {len(states)} tensors")
        for state, size in zip(states, sizes, strict=True):
            if tuple(state.shape) != size:
                raise RuntimeError(f"{type(self).__name__}: expected a state of size {size}, not {tuple(state.shape)}")
        return states

    def as_hx(self, states: Iterable[Tensor]) -> Any:
        """States as the fused calls take them and the float layer returns them."""
        states = tuple(states)
        return states if self.has_cell else states[0]

    def check_input_size(self, x: Tensor) -> None:
        """The last dimension is the number of input channels."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"{type(self).__name__}: expected {self.input_size} input channels, not {x.shape[-1]}")


# --- Layers -----------------------------------------------------------------------------------------------------------


class _RecurrentLayer(_Recurrent):
    """nn.LSTM, nn.GRU or nn.RNN with quantized weights; see torch's for inputs, states and outputs."""

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Of inputs, hidden states and projections, layer by layer, forward and reverse."""
        kinds = ("ih", "hh", "hr") if float_layer.proj_size else ("ih", "hh")
        return tuple(f"weight_{kind}{suffix}" for suffix in _suffixes(float_layer) for kind in kinds)

    @staticmethod
    def other_names(float_layer: nn.Module) -> tuple[str, ...]:
        """The biases, if any."""
        kinds = ("bias_ih", "bias_hh") if float_layer.bias else ()
        return tuple(f"{kind}{suffix}" for suffix in _suffixes(float_layer) for kind in kinds)

    def suffixes(self) -> Iterator[str]:
        """_l0, _l0_reverse, _l1 ..."""
        return _suffixes(self)

    def rebuild(self) -> None:
        """Both directions of a layer, which run in one call, have one width."""
        for layer in range(self.num_layers):
            widths = {tuple(map(len, self.state_sources(suffix))) for suffix in self.directions(layer)}
            if len(widths) > 1:
                raise ValueError(f"the directions of layer {layer} have different numbers of splits")
        super().rebuild()

    def directions(self, layer: int) -> list[str]:
        """The suffixes of one layer."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.bidirectional]

    def effective(self, name: str) -> Tensor:
        """Both directions see the copies of both, their own and, with zero weights, the other's."""
        weight = super().effective(name)
        if not (self.widened and self.bidirectional and name.startswith("weight_ih")):
            return weight
        reverse = name.endswith("_reverse")
        other = name.removesuffix("_reverse") if reverse else f"{name}_reverse"
        zeros = weight.new_zeros(weight.shape[0], self.splits_of(other))
        C = self.channels[name]
        return torch.cat([weight[:, :C], zeros, weight[:, C:]] if reverse else [weight, zeros], 1)

    def channels_of_input(self, layer: int) -> Tensor:
        """The original channel of each channel of a layer's widened input."""
        forward, *reverse = self.directions(layer)
        copies = [self.copies(f"weight_ih{suffix}") for suffix in reverse]
        return torch.cat([self.source(f"ih{forward}"), *copies])

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """As torch's: of each layer and direction, the weights that it computes with and its biases."""
        names = (*self.weight_names(self), *self.other_names(self))
        return [[getattr(self, n) for n in names if n.endswith(suffix)] for suffix in self.suffixes()]

    def flatten_parameters(self) -> None:
        """Nothing to do: models call it on their float layers."""

    def fused(
        self, x: Tensor, batch_sizes: Tensor | None, states: States, first: int, last: int, dropout: float
    ) -> tuple[Tensor, ...]:
        """One call of torch's own kernel over layers first .. last - 1: (output, h) or (output, h, c)."""
        weights = []
        for suffix in (suffix for layer in range(first, last) for suffix in self.directions(layer)):
            weights += [getattr(self, f"running_{kind}{suffix}") for kind in ("ih", "hh")]
            if self.bias:
                weights += [self.bias_of(name, suffix) for name in ("bias_ih", "bias_hh")]
            if self.proj_size:
                weights.append(getattr(self, f"running_hr{suffix}"))
        options = (weights, self.bias, last - first, dropout, self.training, self.bidirectional)
        if batch_sizes is not None:
            return self.kernel()(x, batch_sizes, self.as_hx(states), *options)
        return self.kernel()(x, self.as_hx(states), *options, self.batch_first)

    def kernel(self) -> Callable[..., Any]:
        """torch's fused kernel."""
        return getattr(torch._VF, self.mode.lower())

    def chain(self, x: Tensor, batch_sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """The widened layers one after the other, each cropped to the original units."""
        sizes, ends = self.state_sizes(), []
        for layer in range(self.num_layers):
            directions = self.directions(layer)
            at = layer * len(directions)
            sources = zip(*(self.state_sources(suffix) for suffix in directions), strict=True)
            wide = tuple(
                torch.stack([state[at + d].index_select(-1, source) for d, source in enumerate(by_direction)])
                for state, by_direction in zip(states, sources, strict=True)
            )
            x = x.index_select(-1, self.channels_of_input(layer))
            x, *last = self.fused(x, batch_sizes, wide, layer, layer + 1, 0.0)
            x = x.unflatten(-1, (len(directions), -1))[..., : sizes[0]].flatten(-2)
            ends.append([state[..., :H] for state, H in zip(last, sizes, strict=True)])
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x.contiguous(), tuple(torch.cat(parts) for parts in zip(*ends, strict=True))

    def run(self, x: Tensor, batch_sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Expanded as a chain, folded in one call."""
        if self.widened:
            return self.chain(x, batch_sizes, states)
        x, *last = self.fused(x, batch_sizes, states, 0, self.num_layers, self.dropout)
        return x, tuple(last)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """(output, final states), as the float layer; input batched, unbatched or packed, hx initial states or None."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        x = self.on_grid(input)
        if x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: expected 2 or 3 dimensions, not {x.dim()}")
        self.check_input_size(x)
        if x.dim() == 3:
            leading = (self.num_layers * (1 + self.bidirectional), x.shape[0 if self.batch_first else 1])
            x, states = self.run(x, None, self.as_states(hx, x, *leading))
            return x, self.as_hx(states)
        states = self.as_states(hx, x, self.num_layers * (1 + self.bidirectional))
        batch = 0 if self.batch_first else 1
        x, states = self.run(x.unsqueeze(batch), None, tuple(state.unsqueeze(1) for state in states))
        return x.squeeze(batch), self.as_hx(state.squeeze(1) for state in states)

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        x, batch_sizes, order, back = packed
        x = self.on_grid(x)
        self.check_input_size(x)
        states = self.as_states(hx, x, self.num_layers * (1 + self.bidirectional), int(batch_sizes[0]))
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        x, states = self.run(x, batch_sizes, states)
        if back is not None:
            states = tuple(state.index_select(1, back) for state in states)
        return PackedSequence(x, batch_sizes, order, back), self.as_hx(states)


def _suffixes(layer: nn.Module) -> Iterator[str]:
    for i in range(layer.num_layers):
        yield f"_l{i}"
        if layer.bidirectional:
            yield f"_l{i}_reverse"


@register
class QuantLSTM(_RecurrentLayer):
    """nn.LSTM with quantized weights, proj_size included."""

    float_kind = nn.LSTM
    gates = 4
    has_cell = True


@register
class QuantGRU(_RecurrentLayer):
    """nn.GRU with quantized weights."""

    float_kind = nn.GRU
    gates = 3


@register
class QuantRNN(_RecurrentLayer):
    """nn.RNN with quantized weights, tanh or relu."""

    float_kind = nn.RNN
    gates = 1


# --- Cells ------------------------------------------------------------------------------------------------------------


class _RecurrentCell(_Recurrent):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell with quantized weights: one step."""

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Of the input and of the hidden state."""
        return ("weight_ih", "weight_hh")

    @staticmethod
    def other_names(float_layer: nn.Module) -> tuple[str, ...]:
        """The biases."""
        return ("bias_ih", "bias_hh")

    def kernel(self) -> Callable[..., Any]:
        """torch's fused kernel."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The next states, h or (h, c) [N, H]; input [N, input_size], or unbatched [input_size]."""
        x = self.on_grid(input)
        if x.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: expected 1 or 2 dimensions, not {x.dim()}")
        self.check_input_size(x)
        states = self.as_states(hx, x, *x.shape[:-1])
        if x.dim() == 1:
            return self.as_hx(state.squeeze(0) for state in self._step(x[None], [state[None] for state in states]))
        return self.as_hx(self._step(x, states))

    def _step(self, x: Tensor, states: Iterable[Tensor]) -> States:
        if self.widened:
            x = x.index_select(-1, self.source("ih"))
            sources = self.state_sources("")
            states = [state.index_select(-1, source) for state, source in zip(states, sources, strict=True)]
        biases = (self.bias_of(name, "") for name in ("bias_ih", "bias_hh"))
        last = self.kernel()(x, self.as_hx(states), self.running_ih, self.running_hh, *biases)
        return tuple(state[..., : self.hidden_size].contiguous() for state in (last if self.has_cell else (last,)))


@register
class QuantLSTMCell(_RecurrentCell):
    """nn.LSTMCell with quantized weights."""

    float_kind = nn.LSTMCell
    gates = 4
    has_cell = True

    def kernel(self) -> Callable[..., Any]:
        """torch's fused kernel."""
        return torch._VF.lstm_cell


@register
class QuantGRUCell(_RecurrentCell):
    """nn.GRUCell with quantized weights."""

    float_kind = nn.GRUCell
    gates = 3

    def kernel(self) -> Callable[..., Any]:
        """torch's fused kernel."""
        return torch._VF.gru_cell


@register
class QuantRNNCell(_RecurrentCell):
    """nn.RNNCell with quantized weights, tanh or relu."""

    float_kind = nn.RNNCell
    gates = 1

    def kernel(self) -> Callable[..., Any]:
        """torch's fused kernel."""
        return torch._VF.rnn_tanh_cell if self.nonlinearity == "tanh" else torch._VF.rnn_relu_cell
