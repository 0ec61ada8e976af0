"""Packed layers: each computes what the quantized layer that it was packed from does, to float rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SmallNet, outlier_weight
from test_hooked import Hook, add_hook
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import ocs
from ocs.nn.base import QuantizedLayer
from ocs.nn.packed.layer import PackedLayer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # other orders of the same sums


def pair(layer: nn.Module, *example: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A quantized layer and its packed copy, each alone in a model."""
    model = nn.Sequential(layer).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() > 1:
                p.copy_(torch.from_numpy(outlier_weight(tuple(p.shape), seed=i)) * 0.1)
    if "abits" in options and ("act_r" in options or options.get("act_scale") != "dynamic"):
        options["calibration"] = lambda model: model[0](*example)
    asked = {"0": {"abits": options["abits"]}} if "abits" in options else {}  # as recurrent layers must be
    ocs.quantize(model, **{"skip": None, "wbits": 5, "r": 0.1, "embeddings": True, "overrides": asked} | options)
    packed = ocs.pack(copy.deepcopy(model))
    assert isinstance(packed[0], PackedLayer)
    return model[0], packed[0]


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, PackedSequence):
        yield output.data
    elif isinstance(output, Tensor):
        yield output
    else:
        for each in output:
            yield from tensors(each)


def assert_same(packed: Any, quantized: Any, **tolerances: float) -> None:
    for ours, theirs in zip(tensors(packed), tensors(quantized), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerances or CLOSE)


def both(layers: tuple[nn.Module, nn.Module], *inputs: Any) -> None:
    """Call both layers, and compare."""
    quantized, packed = layers
    with torch.no_grad():
        assert_same(packed(*inputs), quantized(*inputs))


# --- Every kind -------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(100, 70), lambda: torch.randn(9, 100)),
    "linear, one row": (lambda: nn.Linear(64, 48, bias=False), lambda: torch.randn(1, 64)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), lambda: torch.randn(2, 8, 5, 5)),
    "grouped conv": (lambda: nn.Conv1d(8, 12, 3, groups=4, padding_mode="circular"), lambda: torch.randn(2, 8, 7)),
    "transposed conv": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), lambda: torch.randn(2, 8, 4, 4)),
    "lstm": (lambda: nn.LSTM(10, 20, 2, bidirectional=True), lambda: torch.randn(5, 3, 10)),
    "lstm, projected": (lambda: nn.LSTM(10, 20, proj_size=7), lambda: torch.randn(5, 3, 10)),
    "gru": (lambda: nn.GRU(10, 20, 2, batch_first=True), lambda: torch.randn(3, 5, 10)),
    "rnn": (lambda: nn.RNN(10, 20, nonlinearity="relu", bias=False), lambda: torch.randn(5, 3, 10)),
    "lstm cell": (lambda: nn.LSTMCell(10, 20), lambda: torch.randn(3, 10)),
    "gru cell": (lambda: nn.GRUCell(10, 20, bias=False), lambda: torch.randn(3, 10)),
    "rnn cell": (lambda: nn.RNNCell(10, 20), lambda: torch.randn(10)),
    "embedding": (lambda: nn.Embedding(30, 33, padding_idx=2), lambda: torch.randint(0, 30, (4, 5))),
    "bag": (lambda: nn.EmbeddingBag(30, 33, padding_idx=2), lambda: torch.randint(0, 30, (4, 5))),
}  # fmt: skip
INPUTS = {
    "signed": {"abits": 8},
    "auto": {"abits": 4, "act_signed": "auto"},
    "split": {"abits": 4, "act_r": 0.2},
    "oracle": {"abits": 4, "act_r": 0.2, "act_split": "oracle"},
    "dynamic": {"abits": 8, "act_scale": "dynamic"},
    "dynamic, split": {"abits": 8, "act_scale": "dynamic", "act_r": 0.4, "act_select": "max"},
}
MULTIPLYING = [name for name in KINDS if "embedding" not in name and "bag" not in name]


def with_inputs(kinds: list[str], *inputs: str | None) -> list[tuple[str, str | None]]:
    """Pair kinds with ways to round their inputs; only linear and recurrent layers have rows."""
    return [(kind, each) for kind in kinds for each in inputs if "dynamic" not in str(each) or "conv" not in kind]


def made(kind: str, **options: Any) -> tuple[tuple[nn.Module, nn.Module], Tensor]:
    torch.manual_seed(0)
    build, draw = KINDS[kind]
    x = draw()
    return pair(build(), x, **options), x


@pytest.mark.parametrize("r", [0, 0.1, 0.5])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str, granularity: str, r: float) -> None:
    both(*made(kind, granularity=granularity, r=r))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["linear", "conv", "gru", "embedding"])
def test_all_bits(kind: str, bits: int) -> None:
    layers, x = made(kind, wbits=bits, r=0.3)
    both(layers, x)
    for name in layers[0].channels:
        assert torch.equal(layers[1].float_weight(name), layers[0].float_weight(name))
        for ours, theirs in zip(layers[1].weight_state(name), layers[0].weight_state(name), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "rounded"), with_inputs(["linear", "conv", "grouped conv"], *INPUTS))
def test_rounded_inputs_of_products(kind: str, rounded: str) -> None:
    layers, x = made(kind, **INPUTS[rounded])
    assert layers[1].input_grid == layers[0].input_grid is not None
    both(layers, x)
    both(layers, x.abs())
    assert_same(layers[1](9 * x), layers[0](9 * x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_how_an_input_is_split_is_found_out_once(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    x = torch.randn(3, 12, 5, 5) if kind == "conv" else torch.randn(3, 12)
    net = nn.Sequential(nn.Conv2d(12, 8, 3, groups=2) if kind == "conv" else nn.Linear(12, 8))
    ocs.quantize(net, abits=4, act_r=0.5, act_select="max", calibration=[x], skip=None)
    expected, cut = net(x), {"cut_source", "cut_factor", "cut_shift"}
    ocs.pack(net)
    assert not cut & net[0].state_dict().keys()
    monkeypatch.setattr("ocs.nn.product.static_parts", None)
    torch.testing.assert_close(net(x), expected)
    monkeypatch.undo()
    ocs.unpack(net)
    assert not cut & net[0].state_dict().keys()
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize(("kind", "rounded"), with_inputs(MULTIPLYING, "signed", "dynamic"))
def test_rounded_inputs(kind: str, rounded: str) -> None:
    layers, x = made(kind, **INPUTS[rounded])
    assert layers[1].input_grid == layers[0].input_grid is not None
    both(layers, x)


@pytest.mark.parametrize("rounded", ["signed", "dynamic"])
def test_sums_of_integers_are_exact(rounded: str) -> None:
    """What is left is one product with both scales, in which float sums of 4000 terms are far off."""
    x = torch.randn(3, 4000)
    _, packed = pair(nn.Linear(4000, 33, bias=False), x, wbits=6, r=0.02, **INPUTS[rounded])
    d = packed.input_scale if rounded == "signed" else x.abs().amax(1, keepdim=True) / 127
    ints, scale, source = packed.weight_state("weight")
    sums = torch.round(x / d).clamp(-127, 127).long()[:, source] @ ints.long().t()
    torch.testing.assert_close(packed(x).double(), sums * scale.double() * d.double(), rtol=4e-7, atol=0)


# --- Inputs of any form -----------------------------------------------------------------------------------------------

TOLERANCES = {torch.bfloat16: 0.04, torch.float16: 5e-3, torch.float64: 1e-5}


@pytest.mark.parametrize("rounded", [None, "signed", "split", "dynamic"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_linear_in_other_dtypes(dtype: torch.dtype, rounded: str | None) -> None:
    (quantized, packed), x = made("linear", **INPUTS.get(rounded, {}))
    close = dict.fromkeys(("rtol", "atol"), TOLERANCES[dtype])
    assert packed.to(dtype).weight.dtype == dtype
    assert packed.scale.dtype == torch.float32
    assert_same(packed(x.to(dtype)), quantized.to(dtype)(x.to(dtype)), **close)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["conv", "lstm", "gru", "rnn", "lstm cell", "embedding", "bag"])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    (quantized, packed), x = made(kind)
    x = x.to(dtype) if x.is_floating_point() else x
    close = dict.fromkeys(("rtol", "atol"), TOLERANCES[dtype])
    with torch.no_grad():
        assert_same(packed.to(dtype)(x), quantized.to(dtype)(x), **close)


@pytest.mark.parametrize("rounded", [None, "signed", "dynamic"])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (17, 40), (2, 3, 4, 40), (0, 40), (2, 0, 40)])
def test_any_leading_shape(shape: tuple[int, ...], rounded: str | None) -> None:
    both(pair(nn.Linear(40, 24), torch.randn(8, 40), **INPUTS.get(rounded, {})), torch.randn(shape))


def test_layouts() -> None:
    quantized, packed = pair(nn.Linear(40, 24))
    x = torch.randn(40, 6).t()
    nested = torch.nested.nested_tensor([torch.randn(3, 40), torch.randn(2, 40)], layout=torch.jagged)
    both((quantized, packed), x)
    both((quantized, packed), torch.randn(6, 80)[:, ::2])
    both((quantized, packed), x.to_sparse())
    torch.testing.assert_close(packed(nested).values(), quantized(nested).values())


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "lstm, projected"])
def test_recurrent_layers_take_all_that_torchs_take(kind: str) -> None:
    layers, x = made(kind)
    layer = layers[0]
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    states = [torch.randn(rows, 3, H) for H in layer.state_sizes()]
    hx = tuple(states) if layer.has_cell else states[0]
    unbatched = tuple(h[:, 0] for h in states) if layer.has_cell else states[0][:, 0]
    both(layers, x, hx)
    both(layers, x[0] if layer.batch_first else x[:, 0], unbatched)
    both(
        layers, torch.randn(10, 3, 5).permute(1, 2, 0) if layer.batch_first else torch.randn(10, 3, 5).permute(2, 1, 0)
    )
    for in_order in (True, False):
        lengths = (5, 3, 3) if in_order else (3, 6, 1)
        both(layers, pack_sequence([torch.randn(n, 10) for n in lengths], enforce_sorted=in_order), hx)


def test_wrong_sizes_are_said_once() -> None:
    for kind, bad in {
        "linear": torch.randn(3, 101), "lstm": torch.randn(5, 3, 12), "lstm cell": torch.randn(3, 9)
    }.items():  # fmt: skip
        layers, x = made(kind)
        with pytest.raises(RuntimeError, match=rf"Packed\w+: expected {x.shape[-1]} input channels, not"):
            layers[1](bad)
    with pytest.raises(RuntimeError, match=r"PackedGRU: expected a sequence of one step or more, not of none"):
        made("gru")[0][1](torch.randn(3, 0, 10))
    with pytest.raises(RuntimeError, match="an index is outside the rows of the weight"):
        made("embedding")[0][1](torch.tensor([30]))


@pytest.mark.parametrize("channels", [33, 41, 64])
def test_padding_of_codes_hides_no_wrong_size(channels: int) -> None:
    """Codes of 40 channels fill two tiles, as those of all these do."""
    _, packed = pair(nn.Linear(40, 24), r=0)
    with pytest.raises(RuntimeError, match="expects 40 input channels"):
        packed.packed_weight("weight").multiply(torch.randn(2, channels), None)


# --- Derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "rounded"), with_inputs(MULTIPLYING, None, "signed", "dynamic"))
def test_gradients(kind: str, training: bool, rounded: str | None) -> None:
    """Of inputs, and in training of biases: those of the quantized layer."""
    layers, x = made(kind, **INPUTS.get(rounded, {}))
    grads = []
    for layer in layers:
        y = x.clone().requires_grad_()
        sum(out.square().sum() for out in tensors(layer.train(training)(y))).backward()
        grads.append([y.grad, *(p.grad for p in layer.parameters())])
    assert grads[1][0].any()
    for ours, theirs in zip(*grads[::-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_biases_train_without_a_gradient_of_the_input() -> None:
    _, packed = pair(nn.Linear(40, 24))
    assert not packed(torch.randn(2, 40)).requires_grad
    packed.train()(torch.randn(2, 40)).sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((24,), 2.0))
    packed.requires_grad_(False)
    assert not packed(torch.randn(2, 40)).requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize(
    ("kind", "rounded"),
    [("linear", None), ("linear", "signed"), ("linear", "split"), ("linear", "dynamic"), ("conv", "split"),
     ("gru", None), ("rnn cell", None), ("gru", "dynamic")],
)  # fmt: skip
def test_forward_mode(kind: str, rounded: str | None) -> None:
    (quantized, packed), x = made(kind, **INPUTS.get(rounded, {}))

    def tangent(layer: nn.Module) -> Tensor:
        return torch.func.jvp(lambda x: next(tensors(layer(x))), (x,), (x,))[1]

    expected = tangent(quantized)
    assert expected.any()
    torch.testing.assert_close(tangent(packed), expected, **CLOSE)
    with torch.no_grad(), forward_ad.dual_level():
        y = next(tensors(packed(forward_ad.make_dual(x, x))))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected, **CLOSE)


# --- As a module ------------------------------------------------------------------------------------------------------


def test_autocast() -> None:
    """As of the quantized layer: products in bfloat16."""
    x = torch.randn(6, 40)
    for rounded in (None, "signed", "dynamic"):
        quantized, packed = pair(nn.Linear(40, 24), x, **INPUTS.get(rounded, {}))
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(packed(x), quantized(x), rtol=0.02, atol=0.02)
            assert_same(packed(x.bfloat16()), quantized(x.bfloat16()), rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    quantized, packed = pair(nn.Linear(40, 24))
    x = torch.randn(40, 6)
    torch.testing.assert_close(torch.vmap(packed, in_dims=1)(x), quantized(x.t()), **CLOSE)
    torch.testing.assert_close(torch.func.jacrev(packed)(x[:, 0]), quantized.weight, **CLOSE)


def test_hooks_go_over() -> None:
    model, seen = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8)), []
    handle = model[0].register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    ocs.quantize(model)
    ocs.pack(model)(torch.randn(2, 40))
    handle.remove()
    model(torch.randn(2, 40))
    assert seen == ["PackedLinear"]


def test_a_wrapped_forward_goes_over() -> None:
    model = nn.Sequential(nn.Linear(40, 24))
    add_hook(model[0], Hook())
    ocs.quantize(model)
    x = torch.randn(2, 40)
    expected = model(x)
    for each in (ocs.pack(model), copy.deepcopy(model)):
        assert_same(each(x.double()), expected)
    assert_same(ocs.unpack(model)(x.double()), expected)


def test_what_it_shows() -> None:
    quantized, packed = pair(nn.Linear(40, 24), wbits=4, granularity="channel")
    size = packed.weight_packed.numel()
    assert repr(packed) == (
        f"PackedLinear(in_features=40, out_features=24, bias=True, bits=4, splits=4, packed in {size:,} bytes, "
        "scale per channel)"
    )
    assert isinstance(packed, type(quantized))
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    assert torch.equal(packed.weight_int, quantized.weight_int)
    assert torch.equal(packed.source, quantized.source)
    assert (packed.splits, packed.expanded_shape("weight")) == (4, (24, 44))


def test_its_weight_is_read_and_not_written() -> None:
    _, packed = pair(nn.Linear(40, 24))
    for write in (
        lambda: packed.weight.zero_(),
        lambda: packed.weight.data.zero_(),
        lambda: setattr(packed, "weight", nn.Parameter(torch.zeros(24, 40))),
        lambda: delattr(packed, "weight"),
    ):
        with pytest.raises(RuntimeError, match="PackedLinear: its weight is made from integers and cannot be written"):
            write()


def test_channels_last_and_no_float_buffers() -> None:
    torch.manual_seed(0)
    model, x = SmallNet().eval(), torch.randn(2, 3, 8, 8)
    ocs.quantize(model, wbits=5, r=0.2)
    expected = model(x)
    ocs.pack(model).to(memory_format=torch.channels_last)
    assert_same(model(x), expected)
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            floats = [b for b in layer.buffers(recurse=False) if b.is_floating_point() and b is not layer.scale]
            assert not any(buffer.numel() for buffer in floats)


@pytest.mark.parametrize("float_layer", [nn.Linear(8, 4), nn.Conv2d(8, 4, 1), nn.Embedding(8, 4)], ids=str)
def test_symbolic_traces_are_refused(float_layer: nn.Module) -> None:
    model = nn.Sequential(float_layer)
    ocs.quantize(model, wbits=4, embeddings=True, skip=None, progress=False)
    with pytest.raises(RuntimeError, match="symbolic_trace cannot take it: use"):
        torch.fx.symbolic_trace(ocs.pack(model))
