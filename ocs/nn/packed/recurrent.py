"""Recurrent layers and cells whose weights are multiplied as they are packed: all steps of a layer in one call."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ocs.kernels.constants import MAX_BITS
from ocs.kernels.recurrent_steps import STEPS, States
from ocs.nn.input_rows import round_rows
from ocs.nn.packed.layer import PackedLayer
from ocs.nn.packed.weight import FLOAT_ROWS

_CELLS = tuple(STEPS)


class _PackedRecurrent(PackedLayer):
    """What layers and cells have in common."""

    widened = False

    def forward_bias(self, name: str, suffix: str) -> Tensor | None:
        """Give bias_ih or bias_hh, None without biases."""
        return self._parameters.get(f"{name}{suffix}")

    def row_product(self, name: str, x: Tensor) -> Tensor:
        """Multiply rows [N, C], each rounded with its own scale, by a dequantized weight, for gradients."""
        bias = self._parameters.get(name.replace("weight", "bias"))
        return F.linear(round_rows(x, self.input_grid.bits), self.whole_weight(name), bias)

    def run_packed(self, suffix: str, x: Tensor, sizes: list[int], states: States) -> tuple[Tensor, States]:
        """Run one layer in one direction on rows [rows, C]: (hidden states [rows, H], final states), in x's dtype."""
        if not sizes:
            raise RuntimeError(f"{type(self).__name__}: expected a sequence of one step or more, not of none")
        grid = self.row_grid() or FLOAT_ROWS
        if not self.rounds_states and suffix not in ("", "_l0", "_l0_reverse"):
            grid = FLOAT_ROWS  # the scale is that of the layer's input, not of hidden states
        from_x = self.packed_weight(f"weight_ih{suffix}").product(x.float(), self.forward_bias("bias_ih", suffix), grid)
        hidden, of_state = self.packed_weight(f"weight_hh{suffix}").operands(), self.forward_bias("bias_hh", suffix)
        of_state = from_x.new_empty(0) if of_state is None else of_state.detach()
        projection = f"weight_hr{suffix}"
        projects = projection in self.channels
        projected = self.packed_weight(projection).operands() if projects else (*hidden[:3], 0, 0, MAX_BITS)  # none
        h, c = (states[0].float(), states[1].float() if self.has_cell else from_x.new_empty((0, 0)))
        y, h, c = torch.ops.ocs.recurrent.default(
            from_x, *hidden, of_state, *projected, h, c, _as_tensor(sizes, x.device),
            self.input_grid.bits if self.rounds_states else 0,
            _CELLS.index(self.kernel_name), suffix.endswith("_reverse"),
        )  # fmt: skip
        last = (h, c) if self.has_cell else (h,)
        return y.to(x.dtype), tuple(state.to(x.dtype) for state in last)


def _as_tensor(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Make a tensor of how many sequences each step has, which fall: without a list where all are the same."""
    if sizes[0] == sizes[-1]:
        return torch.full((len(sizes),), sizes[0], dtype=torch.int64, device=device)
    return torch.tensor(sizes, device=device)


class PackedRecurrent(_PackedRecurrent):
    """nn.LSTM, nn.GRU or nn.RNN."""

    def _kernel_weights(self, suffix: str) -> list[Tensor]:
        """List the weights and biases of one layer and direction in the order of torch's kernel, for gradients."""
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        weights = [self.whole_weight(f"weight_{kind}{suffix}") for kind in kinds]
        biases = [self.forward_bias(name, suffix) for name in ("bias_ih", "bias_hh")] if self.bias else []
        return [*weights[:2], *biases, *weights[2:]]

    def run_direction(self, suffix: str, x: Tensor, sizes: list[int], states: States) -> tuple[Tensor, States]:
        """Run one layer in one direction on rows [rows, C]: (hidden states [rows, H], final states)."""
        if self.asks_for_gradient(x, *states):
            return super().run_direction(suffix, x, sizes, states)
        return self.run_packed(suffix, x, sizes, states)

    def run(self, x: Tensor, batch_sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Run all layers, in torch's own call where a gradient is asked for and no state is rounded."""
        if self.asks_for_gradient(x, *states) and not self.rounds_states:
            return super().run(x, batch_sizes, states)
        return self.run_steps(x, batch_sizes, states)


class PackedCell(_PackedRecurrent):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell."""

    def _step(self, x: Tensor, states: Iterable[Tensor]) -> States:
        states = tuple(states)
        if not self.asks_for_gradient(x, *states):
            return self.run_packed("", x, [x.shape[0]], states)[1]
        if self.rounds_states:
            return super()._step(x, states)
        weights = (self.whole_weight("weight_ih"), self.whole_weight("weight_hh"))
        last = self.torch_kernel()(x, self.as_torch_states(states), *weights, self.bias_ih, self.bias_hh)
        return last if self.has_cell else (last,)
