"""Quantized LSTM, GRU and RNN: expanded, folded and torch's own kernel on the folded weights agree in every setting."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import folded_twin, outlier_weight
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import ocs
from ocs.nn import QuantizedLayer

INPUT, HIDDEN = 10, 20
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
    "gru, no bias": (nn.GRUCell, {"bias": False}),
    "tanh": (nn.RNNCell, {}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {"num_layers": 1},
    "two layers": {},
    "both directions": {"bidirectional": True},
    "three layers, both directions, batch first": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
    "dropout": {"dropout": 0.4, "num_layers": 3},
}
ONLY = {
    "lstm": {"projected": {"proj_size": 7}, "projected, both directions": {"proj_size": 7, "bidirectional": True}},
    "rnn": {"relu": {"nonlinearity": "relu"}},
    "gru": {},
}
CASES = [(kind, name) for kind in KINDS for name in {**OPTIONS, **ONLY[kind]}]

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def heavy(layer: nn.Module) -> nn.Module:
    """Outliers to split, small enough that the states do not saturate."""
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            if p.dim() == 2:
                p.copy_(torch.from_numpy(outlier_weight(tuple(p.shape), seed=i)) * 0.08)
    return layer


def make(kind: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"num_layers": 2, **{**OPTIONS, **ONLY[kind]}[name]}
    return heavy(KINDS[kind](INPUT, HIDDEN, **options))


def quantized(layer: nn.Module, *, expand: bool, bits: int = 5, r: float = 0.2, **options: Any) -> QuantizedLayer:
    model = nn.Sequential(copy.deepcopy(layer))
    ocs.quantize(model, wbits=bits, r=r, expand=expand, **options)
    return model[0]


def flat(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, PackedSequence):
        return [output.data]
    if isinstance(output, tuple):
        return [tensor for part in output for tensor in flat(part)]
    return [output]


def assert_agree(a: Any, b: Any, atol: float = 1e-5) -> None:
    """Rounding differs: the same sums in another order, fed back for as many steps as there are."""
    for ours, theirs in zip(flat(a), flat(b), strict=True):
        assert ours.shape == theirs.shape
        assert ours.is_contiguous() or not theirs.is_contiguous()  # what torch's layers allow to be viewed
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def states_for(layer: nn.Module, *batch: int) -> Any:
    """Initial states that are not zero."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(rows, *batch, layer.proj_size or HIDDEN) * 0.5
    return (h, torch.randn(rows, *batch, HIDDEN) * 0.5) if isinstance(layer, nn.LSTM) else h


def three_ways(layer: nn.Module, call: Callable[[nn.Module], Any], **options: Any) -> None:
    """Expanded, folded, and torch's layer on the folded weights: equal to rounding; folded even bit for bit."""
    expanded, folded = (quantized(layer, expand=e, **options) for e in (True, False))
    outputs = []
    for module in (expanded, folded, folded_twin(nn.Sequential(layer), nn.Sequential(folded))[0]):
        torch.manual_seed(3)  # dropout
        outputs.append(call(module))
    assert_agree(outputs[0], outputs[1])
    assert_agree(outputs[1], outputs[2], atol=0)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_agree_over_200_steps(kind: str, name: str) -> None:
    layer = make(kind, name)
    three_ways(layer, lambda module: module(torch.linspace(-2, 2, 200 * 3 * INPUT).sin().view(200, 3, INPUT)))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_widened_layers_are_filled_up_to_a_multiple_of_16(kind: str, name: str) -> None:
    """94 channels and 95 units, 96 once they are filled up; what fills them changes nothing, whatever states begin."""
    torch.manual_seed(0)
    options = {"num_layers": 2, **{**OPTIONS, **ONLY[kind]}[name]}
    options |= {"proj_size": 78} if "proj_size" in options else {}  # 94 and 95 would become one width: left as they are
    layer = heavy(KINDS[kind](78, 79, **options))
    ours = quantized(layer, expand=True)
    assert layer.proj_size or {size % 16 for w in (ours.running_ih_l0, ours.running_hh_l0) for size in w.shape} == {0}
    rows, x = layer.num_layers * (1 + layer.bidirectional), (torch.randn(5, 5, 78) / 8).requires_grad_()
    h = torch.randn(rows, 5, layer.proj_size or 79) / 8
    states = (h, torch.randn(rows, 5, 79)) if kind == "lstm" else h

    def call(module: nn.Module) -> tuple[Any, Tensor]:
        output = module(x, states)
        (gradient,) = torch.autograd.grad(sum(tensor.sum() for tensor in flat(output)), x)
        return output, gradient / gradient.abs().amax()

    three_ways(layer, call)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_initial_states_and_granularity(kind: str, name: str) -> None:
    layer = make(kind, name)
    x = torch.randn(4, 4, INPUT)
    states = states_for(layer, 4)
    three_ways(layer, lambda module: module(x, states), granularity="channel", bits=3, split="naive")


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_unbatched(kind: str, name: str) -> None:
    layer = make(kind, name)
    x, states = torch.randn(6, INPUT), states_for(layer)
    three_ways(layer, lambda module: module(x))
    three_ways(layer, lambda module: module(x, states))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_packed_sequences(kind: str, name: str, in_order: bool) -> None:
    layer = make(kind, name)
    lengths = (7, 5, 2) if in_order else (2, 7, 5)
    packed = pack_sequence([torch.randn(n, INPUT) for n in lengths], enforce_sorted=in_order)
    states = states_for(layer, 3)
    three_ways(layer, lambda module: module(packed))
    three_ways(layer, lambda module: module(packed, states))
    output, _ = quantized(layer, expand=True)(packed)
    assert pad_packed_sequence(output)[1].tolist() == list(lengths)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str) -> None:
    kind, options = CELLS[name]
    torch.manual_seed(0)
    layer = heavy(kind(INPUT, HIDDEN, **options))
    h = torch.randn(3, HIDDEN)
    hx = (h, torch.randn(3, HIDDEN)) if kind is nn.LSTMCell else h

    def unroll(module: nn.Module) -> Any:
        state = hx
        for x in torch.linspace(-1, 1, 200 * 3 * INPUT).sin().view(200, 3, INPUT):
            state = module(x, state)
        return state

    three_ways(layer, unroll)
    x = torch.randn(3, INPUT)
    three_ways(layer, lambda module: module(x))
    three_ways(layer, lambda module: module(x[0]))


def test_each_weight_has_its_own_plan_and_scale() -> None:
    ours = quantized(make("lstm", "both directions"), expand=True)
    assert len(ours.channels) == 8
    assert len({float(ours.weight_state(name)[1]) for name in ours.channels}) == 8
    assert ours.weight_hh_l0_int.shape == (4 * HIDDEN, HIDDEN + 4)
    assert ours.scale_hh_l1_reverse.shape == ()
    assert ours.source_ih_l1.shape == (2 * HIDDEN + 8,)


def test_a_split_unit_is_a_second_unit_with_the_same_gates() -> None:
    ours = quantized(make("lstm", "two layers"), expand=True)
    copies = ours.copies("weight_hh_l0")
    for name in ("weight_ih_l0", "weight_hh_l0"):
        gates = getattr(ours, ours.forward_buffer(name)).unflatten(0, (4, -1))
        assert torch.equal(gates[:, HIDDEN:], gates[:, copies])
    assert ours.running_hh_l0.shape == (4 * (HIDDEN + 4), HIDDEN + 4) == ours.expanded_shape("weight_hh_l0")


def test_dropout_masks_are_shared_by_copies() -> None:
    """Else the halves of a split channel would not add up: the outputs would differ from the folded layer's."""
    layer = make("gru", "dropout").train()
    x = torch.randn(5, 3, INPUT)
    outputs = []
    for expand in (True, False):
        torch.manual_seed(1)
        outputs.append(quantized(layer, expand=expand, r=1.0)(x))
    assert_agree(*outputs)
    assert not torch.equal(outputs[0][0], quantized(layer, expand=True, r=1.0)(x)[0])


def test_no_splits_one_call() -> None:
    layer = make("lstm", "two layers")
    ours = quantized(layer, expand=True, r=0.0)
    assert not ours.widened
    x = torch.randn(5, 3, INPUT)
    assert_agree(ours(x), quantized(layer, expand=False, r=0.0)(x), atol=0)


@pytest.mark.parametrize("expand", [True, False])
def test_close_to_float_at_8_bits(expand: bool) -> None:
    for kind, name in itertools.product(KINDS, ["two layers", "both directions"]):
        layer = make(kind, name)
        x = torch.randn(20, 3, INPUT)
        assert_agree(quantized(layer, expand=expand, bits=8)(x), layer(x), atol=0.1)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting(dtype: torch.dtype, expand: bool) -> None:
    layer = make("lstm", "both directions")
    ours = quantized(layer, expand=expand)
    x = torch.randn(4, 2, INPUT)
    before = ours(x)
    ours.to(dtype)
    assert ours(x.to(dtype))[0].dtype == dtype
    assert (ours.scale_hh_l0.dtype, ours.weight_hh_l0_int.dtype) == (torch.float32, torch.int8)
    ours.float()
    assert_agree(ours(x), before, atol=1e-2)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: str, expand: bool) -> None:
    layer = make(kind, "both directions")
    ours = quantized(layer, expand=expand)
    other = copy.deepcopy(layer)
    for p in other.parameters():
        nn.init.normal_(p)
    loaded = quantized(other, expand=expand)
    loaded.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, INPUT)
    assert_agree(loaded(x), ours(x), atol=0)
    names = set(layer.state_dict())
    expected = {name for name in names if name.startswith("bias")}
    for name in names - expected:
        expected |= {f"{name}_int", name.replace("weight", "scale"), name.replace("weight", "source")}
    assert set(ours.state_dict()) == expected


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in ("two layers", "both directions")])
def test_compile_whole_graph(kind: str, name: str, expand: bool) -> None:
    """torch.compile refuses nn.LSTM itself."""
    ours = quantized(make(kind, name).eval(), expand=expand)
    x = torch.randn(4, 2, INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_agree(compiled(x), ours(x))


@pytest.mark.parametrize("name", CELLS)
def test_compile_cells(name: str) -> None:
    kind, options = CELLS[name]
    ours = quantized(heavy(kind(INPUT, HIDDEN, **options)), expand=True)
    x = torch.randn(2, INPUT)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_agree(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), ours(x))


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export(kind: str, expand: bool) -> None:
    ours = quantized(make(kind, "both directions").eval(), expand=expand)
    program = torch.export.export(ours, (torch.randn(4, 2, INPUT),))
    x = torch.randn(4, 2, INPUT)
    assert_agree(program.module()(x), ours(x))


def test_gradients_flow_to_inputs_and_biases() -> None:
    layer = make("lstm", "both directions")
    gradients = []
    for expand in (True, False):
        ours = quantized(layer, expand=expand)
        x = torch.linspace(-1, 1, 4 * 2 * INPUT).view(4, 2, INPUT).requires_grad_()
        ours(x)[0].square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in ours.parameters())])
    assert_agree(tuple(gradients[0]), tuple(gradients[1]), atol=1e-4)


def test_wrong_inputs_have_clear_errors() -> None:
    ours = quantized(make("lstm", "two layers"), expand=True)
    x = torch.randn(4, 2, INPUT)
    with pytest.raises(RuntimeError, match="QuantLSTM: expected 10 input channels, not 9"):
        ours(x[..., :9])
    with pytest.raises(ValueError, match="expected 2 or 3 dimensions, not 4"):
        ours(x[None])
    with pytest.raises(RuntimeError, match=r"expected a state of size \(2, 2, 20\), not \(2, 3, 20\)"):
        ours(x, (torch.zeros(2, 3, HIDDEN), torch.zeros(2, 3, HIDDEN)))
    with pytest.raises(RuntimeError, match=r"expected initial states \(h, c\), not 3 tensors"):
        ours(x, torch.zeros(3, 2, HIDDEN))
    cell = quantized(heavy(nn.GRUCell(INPUT, HIDDEN)), expand=True)
    with pytest.raises(ValueError, match="expected 1 or 2 dimensions, not 3"):
        cell(x)


@pytest.mark.parametrize("expand", [True, False])
def test_whoever_reads_a_weight_finds_what_the_layer_computes(expand: bool) -> None:
    ours = quantized(make("lstm", "both directions"), expand=expand)
    assert all(torch.equal(getattr(ours, name), ours.folded(name)) for name in ours.channels)
    assert [len(weights) for weights in ours.all_weights] == [4, 4, 4, 4]
    assert torch.equal(ours.all_weights[3][1], ours.weight_hh_l1_reverse)
    assert ours.bfloat16().weight_hh_l0.dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="'QuantLSTM' object has no attribute 'weight_hh_l9'"):
        ours.weight_hh_l9  # noqa: B018


def test_models_call_flatten_parameters() -> None:
    quantized(make("gru", "two layers"), expand=True).flatten_parameters()


def test_repr_and_report() -> None:
    model = nn.ModuleDict({"lstm": make("lstm", "both directions"), "head": nn.Linear(2 * HIDDEN, 3)})
    report = ocs.quantize(model, wbits=5, r=0.1)
    assert repr(model["lstm"]) == (
        "QuantLSTM(10, 20, num_layers=2, bidirectional=True, bits=5, splits=18 (expanded), scale per tensor)"
    )
    assert len(report.quantized) == 9
    lines = {layer.label: layer for layer in report.layers}
    assert list(lines)[:2] == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    hh = lines["lstm.weight_hh_l0"]
    assert (hh.name, hh.weight, hh.shape, hh.splits) == ("lstm", "weight_hh_l0", (80, 20), 2)
    assert hh.expanded_shape == (88, 22)
    assert lines["lstm.weight_ih_l0"].expanded_shape == (88, 11)
    assert hh.packed_bytes == 80 * 22 * 5 / 8 + 4 + 2 * 4
    assert "2 layers quantized (9 weights), 0 left float" in str(report)


def test_overhead_in_the_terms_of_table_5() -> None:
    """Two layers of 650 units: a split unit brings a column to one weight and its gate rows to two."""
    report = ocs.quantize(nn.Sequential(nn.LSTM(650, 650, 2)), wbits=5, r=0.02)
    assert report.relative_size == pytest.approx((663 / 650) ** 2)
