"""Quantized LSTM, GRU and RNN layers and cells: the weights of inputs, hidden states and projections alike.

Each weight has its own split plan and scale. Folded, a layer is one fused call with the folded weights. Expanded, it
widens: a copy of hidden unit j in W_hh [gates H, H + n] is a second unit with the same gate rows, so that it computes
the same state as unit j, step after step, without a gather inside the loop. Inputs and initial states are gathered by
`source`, outputs and final states cropped to H. A stack of layers is then a chain of single-layer fused calls; dropout
comes between crop and gather, so that copies share its mask. Inputs and units are filled up with zero weights to a
multiple of 16 where that adds little: matrices of 663 columns multiply more slowly than those of 672.

Where the grid of the input is dynamic, all that meets a weight is rounded, each row with a scale of its own: inputs of
every layer, hidden states, and what a projection gets. No fused kernel does that, so that such a layer computes step by
step (ocs.kernels.recurrent_steps), with the folded weights: widening would give the same. States that come in or go out
are not rounded themselves.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ocs.kernels.recurrent_steps import STEPS, States, run_sequence
from ocs.nn.base import QuantizedLayer
from ocs.nn.input_parts import as_dense, refuse_nested
from ocs.nn.input_rows import round_rows
from ocs.nn.registry import register


class _Recurrent(QuantizedLayer):
    """A recurrent layer or cell: its gates, how it is widened, and its states."""

    gates: ClassVar[int]  # how many rows of a weight each hidden unit has
    input_if_asked = True  # as in the paper
    has_cell: ClassVar[bool] = False  # whether there is a cell state besides the hidden one

    def suffixes(self) -> Iterator[str]:
        """Give what follows weight_ih and weight_hh in names, for every layer and direction."""
        yield ""

    def widened_units(self, suffix: str) -> Tensor:
        """Give the original hidden unit of each unit of the widened layer: those that the next weight splits."""
        projection = f"weight_hr{suffix}"
        return self.source_of(projection if projection in self.channels else f"weight_hh{suffix}")

    def widened_rows(self, name: str) -> Tensor:
        """Give the row of the float layer's weight for each row of the widened one: its units, gate by gate.

        A projection's rows are the hidden state, which the next step's weight splits.
        """
        kind, suffix = name.removeprefix("weight_")[:2], name.removeprefix("weight_")[2:]
        if kind == "hr":
            return self.source_of(f"weight_hh{suffix}")
        return self._rows_of(self.widened_units(suffix))

    def _rows_of(self, units: Tensor) -> Tensor:
        """Give the rows of units in the float layer's weight, gate by gate."""
        first = torch.arange(self.gates, device=units.device) * self.hidden_size
        return (first[:, None] + units).flatten()

    def filler(self, count: int) -> int:
        """Tell how many channels or units, whose weights are 0, are added to so many."""
        return 0

    def filled(self, source: Tensor) -> Tensor:
        """Let the filler's units begin and end as the first one does: nothing reads them."""
        return F.pad(source, (0, self.filler(source.numel())))

    def __getattr__(self, name: str) -> Any:
        """Make weight_hh_l0 and the like for whoever reads them: what the layer computes, shaped as the float one."""
        if name in self.__dict__.get("channels", ()):
            return self.float_weight(name)
        return super().__getattr__(name)

    def derived_names(self) -> Iterable[str]:
        """Name the rows of the widened biases."""
        return [f"gate_rows{suffix}" for suffix in self.suffixes()]

    def expanded_shape(self, name: str) -> tuple[int, ...]:
        """Tell the shape of the widened weight: the rows of all units, C + n columns."""
        return self.widened_rows(name).numel(), self.source_of(name).numel()

    def rebuild(self) -> None:
        """Make the weights from the integers again, and the rows of the widened biases."""
        super().rebuild()
        for suffix in self.suffixes():
            rows = self._rows_of(self.filled(self.widened_units(suffix))) if self.widened else None
            self.register_buffer(f"gate_rows{suffix}", rows, persistent=False)

    def forward_weight(self, name: str) -> Tensor:
        """Make the float32 weight that forward computes with from the integers: widened, or folded."""
        if not self.widened:
            return self.folded(name)
        return self.dequantized(name)[self.widened_rows(name)]

    @property
    def widened(self) -> bool:
        """Whether it runs expanded and there is something to expand."""
        return self.expand and self.splits > 0 and not self.rounds_states

    @property
    def rounds_states(self) -> bool:
        """Whether all that meets its weights is rounded row by row, hidden states too, so that it runs step by step."""
        return self.input_grid is not None and self.input_grid.dynamic

    @property
    def kernel_name(self) -> str:
        """The name of torch's kernel: lstm, gru, rnn_tanh or rnn_relu."""
        return {4: "lstm", 3: "gru"}.get(self.gates) or f"rnn_{self.nonlinearity}"

    def round_input(self, x: Tensor) -> Tensor:
        """Round an input that has one scale; where each row has its own, every product rounds what it multiplies."""
        if not self.rounds_states:
            return super().round_input(x)
        refuse_nested(x)
        return as_dense(x)

    def row_product(self, name: str, x: Tensor) -> Tensor:
        """Multiply rows [N, C], each rounded with its own scale, by a weight, and add its bias, if any: [N, O]."""
        weight, bias = getattr(self, self.forward_buffer(name)), self._parameters.get(name.replace("weight", "bias"))
        return F.linear(round_rows(x, self.input_grid.bits), weight, bias)

    def step(self, suffix: str, from_input: Tensor, states: States) -> States:
        """Compute the next states [N, H] from what the input gives to each gate [N, gates H]."""
        from_hidden, projection = self.row_product(f"weight_hh{suffix}", states[0]), f"weight_hr{suffix}"
        h, *cell = STEPS[self.kernel_name](from_input, from_hidden, states)
        return (self.row_product(projection, h) if projection in self.channels else h, *cell)

    def forward_bias(self, name: str, suffix: str) -> Tensor | None:
        """Give bias_ih or bias_hh of all units that forward computes."""
        bias, rows = getattr(self, f"{name}{suffix}"), getattr(self, f"gate_rows{suffix}")
        return bias if bias is None or rows is None else bias[rows]

    def state_sources(self, suffix: str) -> tuple[Tensor, ...]:
        """Give the original units of the widened hidden state and, if there is one, of the widened cell state."""
        hidden = self.filled(self.source_of(f"weight_hh{suffix}"))
        return (hidden, self.filled(self.widened_units(suffix))) if self.has_cell else (hidden,)

    def state_sizes(self) -> tuple[int, ...]:
        """Give H of the hidden state (after a projection) and, if there is one, of the cell state."""
        hidden = getattr(self, "proj_size", 0) or self.hidden_size
        return (hidden, self.hidden_size) if self.has_cell else (hidden,)

    def initial_states(self, hx: Any, x: Tensor, *leading: int) -> States:
        """Check the initial states [*leading, H] that a caller gave, or make zeros where none are given."""
        sizes = [(*leading, H) for H in self.state_sizes()]
        if hx is None:
            return tuple(x.new_zeros(size, layout=torch.strided) for size in sizes)
        states = tuple(hx) if self.has_cell else (hx,)
        if len(states) != len(sizes):
            raise RuntimeError(f"{type(self).__name__}: expected initial states (h, c), not {len(states)} tensors")
        for state, size in zip(states, sizes, strict=True):
            if tuple(state.shape) != size:
                raise RuntimeError(f"{type(self).__name__}: expected a state of size {size}, not {tuple(state.shape)}")
        return states

    def as_torch_states(self, states: Iterable[Tensor]) -> Any:
        """Give states as torch's kernels take them and the float layer returns them: (h, c), or h alone."""
        states = tuple(states)
        return states if self.has_cell else states[0]

    def check_input_size(self, x: Tensor) -> None:
        """Refuse an input whose last dimension is not the number of input channels."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"{type(self).__name__}: expected {self.input_size} input channels, not {x.shape[-1]}")


# --- Layers -----------------------------------------------------------------------------------------------------------


class _RecurrentLayer(_Recurrent):
    """nn.LSTM, nn.GRU or nn.RNN with quantized weights; see torch's for inputs, states and outputs."""

    @staticmethod
    def weight_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name the weights of inputs, hidden states and projections, layer by layer, forward and reverse."""
        kinds = ("ih", "hh", "hr") if float_layer.proj_size else ("ih", "hh")
        return tuple(f"weight_{kind}{suffix}" for suffix in _suffixes(float_layer) for kind in kinds)

    @staticmethod
    def unquantized_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name the biases, if any."""
        kinds = ("bias_ih", "bias_hh") if float_layer.bias else ()
        return tuple(f"{kind}{suffix}" for suffix in _suffixes(float_layer) for kind in kinds)

    def suffixes(self) -> Iterator[str]:
        """Give _l0, _l0_reverse, _l1 ..."""
        return _suffixes(self)

    def rebuild(self) -> None:
        """Make the weights again; both directions of a layer, which run in one call, must have one width."""
        for layer in range(self.num_layers):
            widths = {tuple(map(len, self.state_sources(suffix))) for suffix in self.directions(layer)}
            if len(widths) > 1:
                raise ValueError(f"the directions of layer {layer} have different numbers of splits")
        super().rebuild()

    def directions(self, layer: int) -> list[str]:
        """Give the suffixes of one layer: of its forward direction and, if it has one, of its reverse."""
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def forward_weight(self, name: str) -> Tensor:
        """Make the weight from the integers; both directions see the copies of both, with zero weights the other's."""
        weight = super().forward_weight(name)
        if not self.widened:
            return weight
        if self.bidirectional and name.startswith("weight_ih"):
            reverse = name.endswith("_reverse")
            other = name.removesuffix("_reverse") if reverse else f"{name}_reverse"
            zeros = weight.new_zeros(weight.shape[0], self.splits_of(other))
            C = self.channels[name]
            weight = torch.cat([weight[:, :C], zeros, weight[:, C:]] if reverse else [weight, zeros], 1)
        by_gate = weight.unflatten(0, (1 if name.startswith("weight_hr") else self.gates, -1))
        _, rows, columns = by_gate.shape
        return F.pad(by_gate, (0, self.filler(columns), 0, self.filler(rows))).flatten(0, 1)

    def filler(self, count: int) -> int:
        """Fill up to a multiple of 16 where that adds a 32nd at most.

        Not where states are projected: torch's kernel takes a hidden state as wide as the cell state for another.
        """
        least = -count % 16
        return least if 32 * least <= count and not self.proj_size else 0

    def widened_input(self, x: Tensor, layer: int) -> Tensor:
        """Add the copies of both directions to a layer's input [..., C], and zeros."""
        copies = torch.cat([self.copies(f"weight_ih{suffix}") for suffix in self.directions(layer)])
        filler = self.filler(x.shape[-1] + copies.numel())
        return torch.cat([x, x.index_select(-1, copies), x.new_zeros(*x.shape[:-1], filler)], -1)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights that it computes with and its biases, a list for each layer and direction as in torch."""
        names = (*self.weight_names(self), *self.unquantized_names(self))
        return [[getattr(self, n) for n in names if n.endswith(suffix)] for suffix in self.suffixes()]

    def flatten_parameters(self) -> None:
        """Do nothing: models call it on their float layers."""

    def run_fused(
        self, x: Tensor, batch_sizes: Tensor | None, states: States, first: int, last: int, dropout: float
    ) -> tuple[Tensor, ...]:
        """Call torch's own kernel over layers first .. last - 1: (output, h) or (output, h, c)."""
        weights = []
        for layer in range(first, last):
            for suffix in self.directions(layer):
                weights += self._kernel_weights(suffix)
        options = (weights, self.bias, last - first, dropout, self.training, self.bidirectional)
        if batch_sizes is not None:
            return self.torch_kernel()(x, batch_sizes, self.as_torch_states(states), *options)
        return self.torch_kernel()(x, self.as_torch_states(states), *options, self.batch_first)

    def _kernel_weights(self, suffix: str) -> list[Tensor]:
        """List the weights and biases of one layer and direction in the order of torch's kernel."""
        weights = [getattr(self, f"running_{kind}{suffix}") for kind in ("ih", "hh")]
        if self.bias:
            weights += [self.forward_bias(name, suffix) for name in ("bias_ih", "bias_hh")]
        if self.proj_size:
            weights.append(getattr(self, f"running_hr{suffix}"))
        return weights

    def torch_kernel(self) -> Callable[..., Any]:
        """Find torch's fused kernel."""
        return getattr(torch._VF, self.kernel_name)

    def run_widened(self, x: Tensor, batch_sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Run the widened layers one after the other, each cropped to the original units."""
        sizes, ends = self.state_sizes(), []
        for layer in range(self.num_layers):
            wide = self._widened_states(layer, states)
            x = self.widened_input(x, layer)
            x, *last = self.run_fused(x, batch_sizes, wide, layer, layer + 1, 0.0)
            x = x.unflatten(-1, (len(self.directions(layer)), -1))[..., : sizes[0]].flatten(-2)
            last = (state.flatten(0, -3) for state in last)  # traced in torch 2.10, an LSTM's have one dimension more
            ends.append([state[..., :H] for state, H in zip(last, sizes, strict=True)])
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        return x.contiguous(), tuple(torch.cat(parts) for parts in zip(*ends, strict=True))

    def _widened_states(self, layer: int, states: States) -> States:
        """Gather one layer's initial states for its widened units."""
        directions = self.directions(layer)
        first = layer * len(directions)
        sources = zip(*(self.state_sources(suffix) for suffix in directions), strict=True)
        return tuple(
            torch.stack([state[first + d].index_select(-1, source) for d, source in enumerate(by_direction)])
            for state, by_direction in zip(states, sources, strict=True)
        )

    def run_steps(self, x: Tensor, batch_sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Run all layers step by step, on packed rows or on a batch in the layer's own layout."""
        if batch_sizes is not None:
            return self.run_rows(x, batch_sizes.tolist(), states)
        x = x.transpose(0, 1) if self.batch_first else x
        steps, batch, _ = x.shape
        x, states = self.run_rows(x.flatten(0, 1), [batch] * steps, states)
        x = x.unflatten(0, (steps, batch))
        return x.transpose(0, 1).contiguous() if self.batch_first else x, states

    def run_rows(self, x: Tensor, sizes: list[int], states: States) -> tuple[Tensor, States]:
        """Run all layers on rows [rows, C], those of one step after those of another; sizes: how many each step has."""
        ends: list[States] = []
        first = list(zip(*(state.unbind() for state in states), strict=True))  # of each layer and direction
        for layer in range(self.num_layers):
            x = F.dropout(x, self.dropout, self.training) if layer and self.dropout else x
            outputs = []
            for suffix in self.directions(layer):
                output, last = self.run_direction(suffix, x, sizes, first[len(ends)])
                outputs.append(output)
                ends.append(last)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def run_direction(self, suffix: str, x: Tensor, sizes: list[int], states: States) -> tuple[Tensor, States]:
        """Run one layer in one direction on rows [rows, C]: (hidden states [rows, H], final states)."""
        from_input, step = self.row_product(f"weight_ih{suffix}", x), partial(self.step, suffix)
        return run_sequence(from_input, sizes, states, step, reverse=suffix.endswith("_reverse"))

    def run(self, x: Tensor, batch_sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Run all layers: step by step where states are rounded, layer by layer where widened, else in one call."""
        if self.rounds_states:
            return self.run_steps(x, batch_sizes, states)
        if self.widened:
            return self.run_widened(x, batch_sizes, states)
        x, *last = self.run_fused(x, batch_sizes, states, 0, self.num_layers, self.dropout)
        return x, tuple(last)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Compute (output, final states); input batched, unbatched or packed, hx the initial states or None."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        x = self.round_input(input)
        if x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: expected 2 or 3 dimensions, not {x.dim()}")
        self.check_input_size(x)
        batch = 0 if self.batch_first else 1
        if x.dim() == 3:
            x, states = self.run(x, None, self.initial_states(hx, x, self._state_rows(), x.shape[batch]))
            return x, self.as_torch_states(states)
        states = self.initial_states(hx, x, self._state_rows())
        x, states = self.run(x.unsqueeze(batch), None, tuple(state.unsqueeze(1) for state in states))
        return x.squeeze(batch), self.as_torch_states(state.squeeze(1) for state in states)

    def _state_rows(self) -> int:
        """Count the layers and directions, each of which has a state."""
        return self.num_layers * (2 if self.bidirectional else 1)

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        x, batch_sizes, order, back = packed
        x = self.round_input(x)
        self.check_input_size(x)
        states = self.initial_states(hx, x, self._state_rows(), int(batch_sizes[0]))
        if order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        x, states = self.run(x, batch_sizes, states)
        if back is not None:
            states = tuple(state.index_select(1, back) for state in states)
        return PackedSequence(x, batch_sizes, order, back), self.as_torch_states(states)


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
        """Name the weights of the input and of the hidden state."""
        return ("weight_ih", "weight_hh")

    @staticmethod
    def unquantized_names(float_layer: nn.Module) -> tuple[str, ...]:
        """Name the biases."""
        return ("bias_ih", "bias_hh")

    def torch_kernel(self) -> Callable[..., Any]:
        """Find torch's fused kernel."""
        return getattr(torch._VF, f"{self.kernel_name}_cell")

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Compute the next states, h or (h, c) [N, H]; input [N, input_size], or unbatched [input_size]."""
        x = self.round_input(input)
        if x.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: expected 1 or 2 dimensions, not {x.dim()}")
        self.check_input_size(x)
        states = self.initial_states(hx, x, *x.shape[:-1])
        if x.dim() == 1:
            states = self._step(x[None], [state[None] for state in states])
            return self.as_torch_states(state.squeeze(0) for state in states)
        return self.as_torch_states(self._step(x, states))

    def _step(self, x: Tensor, states: Iterable[Tensor]) -> States:
        if self.rounds_states:
            return self.step("", self.row_product("weight_ih", x), tuple(states))
        if self.widened:
            x = x.index_select(-1, self.source_of("weight_ih"))
            sources = self.state_sources("")
            states = [state.index_select(-1, source) for state, source in zip(states, sources, strict=True)]
        biases = (self.forward_bias(name, "") for name in ("bias_ih", "bias_hh"))
        last = self.torch_kernel()(x, self.as_torch_states(states), self.running_ih, self.running_hh, *biases)
        last = last if self.has_cell else (last,)
        return tuple(state[..., : self.hidden_size].contiguous() for state in last)


@register
class QuantLSTMCell(_RecurrentCell):
    """nn.LSTMCell with quantized weights."""

    float_kind = nn.LSTMCell
    gates = 4
    has_cell = True


@register
class QuantGRUCell(_RecurrentCell):
    """nn.GRUCell with quantized weights."""

    float_kind = nn.GRUCell
    gates = 3


@register
class QuantRNNCell(_RecurrentCell):
    """nn.RNNCell with quantized weights, tanh or relu."""

    float_kind = nn.RNNCell
    gates = 1
