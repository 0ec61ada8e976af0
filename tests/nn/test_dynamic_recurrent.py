"""act_scale="dynamic" on recurrent layers: inputs and hidden states are rounded row by row, step by step, literally."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_dynamic_input import DYNAMIC, literal_rows, quantized
from test_recurrent import CASES, CELLS, HIDDEN, INPUT, flat, heavy, make, states_for
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import ocs
from ocs.nn import QuantizedLayer


class Literal:
    """What a recurrent layer computes for one sequence, step by step, unit by unit as torch's documentation has it."""

    def __init__(self, ours: QuantizedLayer, bits: int) -> None:
        self.ours, self.bits = ours, bits

    def product(self, kind: str, suffix: str, v: Tensor) -> Tensor:
        w = self.ours.folded(f"weight_{kind}{suffix}").to(v.dtype)
        b = getattr(self.ours, f"bias_{kind}{suffix}", None) if kind != "hr" else None
        return w @ literal_rows(v, self.bits) + (0 if b is None else b.detach())

    def step(self, suffix: str, x: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ours, H = self.ours, HIDDEN
        i, j = self.product("ih", suffix, x), self.product("hh", suffix, h)
        name = ours.float_kind.__name__
        if name.startswith("LSTM"):
            a = i + j
            c = torch.sigmoid(a[H : 2 * H]) * c + torch.sigmoid(a[:H]) * torch.tanh(a[2 * H : 3 * H])
            h = torch.sigmoid(a[3 * H :]) * torch.tanh(c)
            return (self.product("hr", suffix, h) if getattr(ours, "proj_size", 0) else h), c
        if name.startswith("GRU"):
            r, z = torch.sigmoid(i[:H] + j[:H]), torch.sigmoid(i[H : 2 * H] + j[H : 2 * H])
            return z * h + (1 - z) * torch.tanh(i[2 * H :] + r * j[2 * H :]), None
        return (torch.tanh if ours.nonlinearity == "tanh" else torch.relu)(i + j), None

    def sequence(self, x: Tensor, states: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
        """x [T, C], states [rows, H] each, a dropout mask [T, ...] for each layer but the last."""
        ends: list[list[Tensor]] = []
        for layer in range(self.ours.num_layers):
            outputs = []
            for suffix in [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.ours.bidirectional]:
                h, c = states[0][len(ends)], states[1][len(ends)] if len(states) > 1 else None
                found = {}
                steps = range(len(x))
                for t in reversed(steps) if suffix.endswith("reverse") else steps:
                    h, c = self.step(suffix, x[t], h, c)
                    found[t] = h
                outputs.append(torch.stack([found[t] for t in steps]))
                ends.append([h] if c is None else [h, c])
            x = torch.cat(outputs, -1)
            if masks and layer + 1 < self.ours.num_layers:
                x = x * masks[layer]
        return x, ends


def literal_outputs(ours: QuantizedLayer, bits: int, sequences: list[Tensor], states: Any, masks: Any = ()) -> Any:
    """Outputs of each sequence, and final states [rows, N, H]; states [rows, N, H] or zeros; masks of sequences."""
    rows = ours.num_layers * (1 + ours.bidirectional)
    sizes = [ours.proj_size or HIDDEN, HIDDEN] if isinstance(ours.float_kind(1, 1), nn.LSTM) else [HIDDEN]
    if states is None:
        states = [torch.zeros(rows, len(sequences), size, dtype=torch.float64) for size in sizes]
    states = states if isinstance(states, tuple | list) else [states]
    found = [
        Literal(ours, bits).sequence(x, [each[:, n] for each in states], masks[n] if masks else [])
        for n, x in enumerate(sequences)
    ]
    ends = [torch.stack([torch.stack([row[k] for row in e]) for _, e in found], 1) for k in range(len(sizes))]
    return [output for output, _ in found], ends


def doubled(states: Any) -> Any:
    return tuple(map(doubled, states)) if isinstance(states, tuple) else states.double()


def assert_close(found: Any, *expected: Tensor) -> None:
    """In double precision, where no value falls on the other side of a tie."""
    for ours, theirs in zip(flat(found), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def recurrent(kind: str, name: str, **options: Any) -> QuantizedLayer:
    return quantized(make(kind, name), 5, **options).double().eval()


@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_recurrent_layers(kind: str, name: str, with_states: bool) -> None:
    ours, x = recurrent(kind, name), torch.randn(6, 3, INPUT, dtype=torch.float64)
    states = doubled(states_for(make(kind, name), 3)) if with_states else None
    outputs, ends = literal_outputs(ours, 5, list(x.unbind(1)), states)
    expected = torch.stack(outputs, 0 if ours.batch_first else 1)
    given = x.transpose(0, 1) if ours.batch_first else x
    assert_close(ours(given) if states is None else ours(given, states), expected, *ends)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_unbatched(kind: str, name: str) -> None:
    ours, x = recurrent(kind, name), torch.randn(6, INPUT, dtype=torch.float64)
    states = doubled(states_for(make(kind, name)))
    several = [each[:, None] for each in (states if isinstance(states, tuple) else [states])]
    (output,), ends = literal_outputs(ours, 5, [x], several)
    assert_close(ours(x, states), output, *(end[:, 0] for end in ends))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_packed_sequences(kind: str, name: str, in_order: bool) -> None:
    ours, lengths = recurrent(kind, name), (7, 5, 5, 2) if in_order else (2, 7, 5, 5)
    sequences = [torch.randn(n, INPUT, dtype=torch.float64) for n in lengths]
    states = doubled(states_for(make(kind, name), 4))
    outputs, ends = literal_outputs(ours, 5, sequences, states)
    found, last = ours(pack_sequence(sequences, enforce_sorted=in_order), states)
    assert isinstance(found, PackedSequence)
    assert_close((found, last), pack_sequence(outputs, enforce_sorted=in_order).data, *ends)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_dropout_between_layers(kind: str) -> None:
    """What is dropped and grown is rounded again; the seed gives the same masks to tensors of ones."""
    ours, x = recurrent(kind, "dropout").train(), torch.randn(6, 3, INPUT, dtype=torch.float64)
    torch.manual_seed(3)
    found = ours(x)
    torch.manual_seed(3)
    masks = [F.dropout(torch.ones(18, HIDDEN, dtype=torch.float64), 0.4).view(6, 3, HIDDEN) for _ in range(2)]
    assert 0 < int((masks[0] == 0).sum()) < masks[0].numel()
    outputs, ends = literal_outputs(ours, 5, list(x.unbind(1)), None, [[m[:, n] for m in masks] for n in range(3)])
    assert_close(found, torch.stack(outputs, 1), *ends)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    kind, options = CELLS[name]
    torch.manual_seed(0)
    ours = quantized(heavy(kind(INPUT, HIDDEN, **options)), 5).double()
    x = torch.randn(3, INPUT).double()
    states = tuple(torch.randn(3, HIDDEN).double() for _ in range(2 if kind is nn.LSTMCell else 1))
    literal = Literal(ours, 5)
    ends = [literal.step("", *row, *[None] * (3 - len(row))) for row in zip(x, *states, strict=True)]
    expected = [torch.stack(each) for each in zip(*ends, strict=True) if each[0] is not None]
    hx = states if kind is nn.LSTMCell else states[0]
    assert_close(ours(x, hx), *expected)
    unbatched = ours(x[0], tuple(each[0] for each in states) if kind is nn.LSTMCell else states[0][0])
    assert_close(unbatched, *(each[0] for each in expected))
    zeros = tuple(torch.zeros_like(each) for each in states)
    assert_close(ours(x), *flat(ours(x, zeros if kind is nn.LSTMCell else zeros[0])))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_expanded_and_folded_compute_the_same_and_hold_the_same(kind: str) -> None:
    a, b = (recurrent(kind, "both directions", expand=expand) for expand in (True, False))
    x = torch.randn(6, 3, INPUT, dtype=torch.float64)
    assert_close(a(x), *flat(b(x)))
    assert a.expand
    assert not b.expand
    assert a.splits
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    static = quantized(make(kind, "both directions"), act_scale="static", expand=True, calibration=x.float())
    assert all(torch.equal(a.weight_state(name)[0], static.weight_state(name)[0]) for name in a.channels)
    assert a.expanded_shape("weight_hh_l0") == static.expanded_shape("weight_hh_l0")


def test_close_to_float_at_8_bits() -> None:
    layer, x = make("lstm", "two layers"), torch.randn(20, 3, INPUT)
    ours = quantized(layer, 8, wbits=8)
    for found, expected in zip(flat(ours(x)), flat(layer(x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert ours.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


def test_gradients_reach_inputs_biases_and_initial_states() -> None:
    ours = quantized(make("gru", "both directions"))
    x, h = torch.randn(4, 2, INPUT, requires_grad=True), torch.randn(4, 2, HIDDEN, requires_grad=True)
    ours(x, h)[0].square().sum().backward()
    assert all(each.grad.abs().sum() > 0 for each in (x, h, *ours.parameters()))


def test_recurrent_inputs_stay_float_unless_an_override_names_their_abits() -> None:
    model = nn.Sequential(nn.LSTM(4, 5))
    report = ocs.quantize(model, **DYNAMIC)
    assert model[0].input_grid is None
    assert "input stays float: name it in overrides" in report.layers[0].reason


def test_wrong_inputs_have_clear_errors() -> None:
    ours = quantized(make("lstm", "two layers"))
    with pytest.raises(RuntimeError, match="QuantLSTM: expected 10 input channels, not 9"):
        ours(torch.randn(4, 2, 9))
    with pytest.raises(RuntimeError, match="input has no steps"):
        ours(torch.randn(0, 2, 10))
    words = torch.nested.nested_tensor([torch.randn(2, 12), torch.randn(3, 12)], layout=torch.jagged)
    for layer in (ours, quantized(nn.Linear(12, 6))):
        with pytest.raises(RuntimeError, match="a quantized layer input cannot be a nested tensor: pad it"):
            layer(words)
