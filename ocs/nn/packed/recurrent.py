"""Recurrent layers and cells whose weights are multiplied as they are packed: all steps of a layer in one call."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ocs.nn.packed.layer import PackedLayer
from ocs.nn.packed.weight import FLOAT_ROWS, PackedWeight

States = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM


class _PackedRecurrent(PackedLayer):
    """What layers and cells have in common."""

    widened = False

    def forward_bias(self, name: str, suffix: str) -> Tensor | None:
        """Give bias_ih or bias_hh, None without biases."""
        return self._parameters.get(f"{name}{suffix}")

    @property
    def cell(self) -> int:
        """The number of its cell among those of torch.ops.ocs.recurrent: LSTM, GRU, tanh, ReLU."""
        return {4: 0, 3: 1}.get(self.gates, 3 if getattr(self, "nonlinearity", "tanh") == "relu" else 2)

    def run_packed(
        self, x: Tensor, batch_sizes: Tensor, states: States, suffix: str, *, reverse: bool = False
    ) -> tuple[Tensor, States]:
        """Run one layer in one direction over x [sum of batch_sizes, C], float32: (y, last states)."""
        none, grid = x.new_empty(0), self.row_grid() or FLOAT_ROWS
        from_x = self.packed_weight(f"weight_ih{suffix}").multiply(x, self.forward_bias("bias_ih", suffix), grid)
        bias = self.forward_bias("bias_hh", suffix)
        h, c = (*states, none.view(0, 0))[:2]
        y, h, c = torch.ops.ocs.recurrent.default(
            from_x, *self.packed_weight(f"weight_hh{suffix}").operands(), none if bias is None else bias,
            *self._projection(suffix), h, c, batch_sizes, self.state_bits(), self.cell, reverse,
        )  # fmt: skip
        return y, (h, c) if self.has_cell else (h,)

    def _projection(self, suffix: str) -> tuple:
        name = f"weight_hr{suffix}"
        if name in self.channels:
            return self.packed_weight(name).operands()
        hidden: PackedWeight = self.packed_weight(f"weight_hh{suffix}")
        return hidden.codes[:0], hidden.scale[:0] if hidden.scale.dim() else hidden.scale, hidden.copies[:0], 0, 0, 8

    def state_bits(self) -> int:
        """Tell to how many bits hidden states are rounded, a scale for each row; 0: they stay floats."""
        return 0


class PackedRecurrent(_PackedRecurrent):
    """nn.LSTM, nn.GRU or nn.RNN."""

    def _kernel_weights(self, suffix: str) -> list[Tensor]:
        """List the weights and biases of one layer and direction in the order of torch's kernel."""
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        weights = [self.whole_weight(f"weight_{kind}{suffix}") for kind in kinds]
        biases = [self.forward_bias(name, suffix) for name in ("bias_ih", "bias_hh")] if self.bias else []
        return [*weights[:2], *biases, *weights[2:]]

    def run(self, x: Tensor, batch_sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Run all layers, one direction after the other."""
        if self.asks_for_gradient(x, *states):
            return super().run(x, batch_sizes, states)
        dtype, shape = x.dtype, x.shape
        if batch_sizes is None:
            x = x.transpose(0, 1) if self.batch_first else x
            shape, batch_sizes = x.shape, torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
        x, states, ends = x.float().reshape(-1, shape[-1]), tuple(state.float() for state in states), []
        for layer in range(self.num_layers):
            outputs = []
            for direction, suffix in enumerate(self.directions(layer)):
                first = tuple(state[layer * len(self.directions(layer)) + direction] for state in states)
                y, last = self.run_packed(x, batch_sizes, first, suffix, reverse=direction == 1)
                outputs.append(y)
                ends.append(last)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        x = x.view(*shape[:-1], x.shape[-1]).to(dtype)
        last = tuple(torch.stack(parts).to(dtype) for parts in zip(*ends, strict=True))
        return x.transpose(0, 1) if self.batch_first and len(shape) == 3 else x, last


class PackedCell(_PackedRecurrent):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell."""

    def _step(self, x: Tensor, states: Iterable[Tensor]) -> States:
        states = tuple(states)
        if self.asks_for_gradient(x, *states):
            weights = (self.whole_weight("weight_ih"), self.whole_weight("weight_hh"))
            last = self.torch_kernel()(x, self.as_torch_states(states), *weights, self.bias_ih, self.bias_hh)
            return last if self.has_cell else (last,)
        sizes = torch.full((1,), x.shape[0], dtype=torch.int64)
        _, last = self.run_packed(x.float(), sizes, tuple(state.float() for state in states), "")
        return tuple(state.to(x.dtype) for state in last)
