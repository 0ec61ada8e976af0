"""Quantized layers: expanded and folded agree with each other and with the float layer, and travel as modules do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import SmallNet, outlier_weight
from torch import nn

import ocs
from ocs.functional import QuantizedWeight, quantize_weight
from ocs.kernels import reference
from ocs.nn import QuantizedLayer
from ocs.nn.registry import REPLACEMENTS

# layer, input shape
LAYERS = {
    "linear": (lambda: nn.Linear(30, 7), (4, 30)),
    "linear, no bias, any rank": (lambda: nn.Linear(30, 7, bias=False), (2, 3, 4, 30)),
    "linear, vector": (lambda: nn.Linear(30, 7), (30,)),
    "conv1d": (lambda: nn.Conv1d(10, 6, 5, padding="same"), (3, 10, 20)),
    "conv2d": (lambda: nn.Conv2d(10, 6, 3, stride=2, padding=1, bias=False), (2, 10, 9, 9)),
    "conv2d, unbatched": (lambda: nn.Conv2d(10, 6, 3), (10, 9, 9)),
    "conv2d, grouped": (lambda: nn.Conv2d(12, 6, 3, groups=3, dilation=2), (2, 12, 9, 9)),
    "conv2d, depthwise": (lambda: nn.Conv2d(12, 24, 3, groups=12), (2, 12, 9, 9)),
    "conv2d, circular": (lambda: nn.Conv2d(10, 6, 3, padding=1, padding_mode="circular"), (2, 10, 9, 9)),
    "conv2d, pointwise": (lambda: nn.Conv2d(10, 6, 1), (2, 10, 9, 9)),
    "conv2d, pointwise, unbatched": (lambda: nn.Conv2d(10, 6, 1, padding="valid"), (10, 9, 9)),
    "conv2d, pointwise, strided": (lambda: nn.Conv2d(10, 6, 1, stride=2), (2, 10, 9, 9)),
    "conv2d, pointwise, padded": (lambda: nn.Conv2d(10, 6, 1, padding=1), (2, 10, 9, 9)),
    "conv2d, pointwise, reflect": (lambda: nn.Conv2d(10, 6, 1, padding=1, padding_mode="reflect"), (2, 10, 9, 9)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(10, 6, 5, stride=2, output_padding=1), (3, 10, 20)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(10, 6, 3, stride=2, padding=1, bias=False), (2, 10, 9, 9)),
    "transposed 2d, grouped": (lambda: nn.ConvTranspose2d(12, 6, 3, groups=3, dilation=2), (2, 12, 9, 9)),
    "transposed 2d, depthwise": (lambda: nn.ConvTranspose2d(12, 24, 3, groups=12), (2, 12, 9, 9)),
    "transposed 2d, unbatched": (lambda: nn.ConvTranspose2d(10, 6, 3), (10, 9, 9)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(10, 6, 3), (2, 10, 4, 4, 4)),
    "conv3d, pointwise": (lambda: nn.Conv3d(10, 6, 1), (2, 10, 5, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(10, 6, 3, padding=(1, 0, 1)), (2, 10, 5, 5, 5)),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    layer.weight.data = torch.from_numpy(outlier_weight(tuple(layer.weight.shape)))
    return layer, torch.randn(shape)


def quantized(layer: nn.Module, *, expand: bool, bits: int = 5, r: float = 0.2, granularity: str = "tensor"):
    groups = getattr(layer, "groups", 1)
    w = REPLACEMENTS[type(layer)].layout(layer.weight, groups)
    weight = quantize_weight(w, bits, r, granularity=granularity, groups=groups)
    return REPLACEMENTS[type(layer)](layer, {"weight": weight}, bits, expand)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_expanded_and_folded_agree(name: str, granularity: str) -> None:
    """The same sums in another order: a few float32 roundings of the largest output apart."""
    layer, x = make(name)
    expanded, folded = (quantized(layer, expand=e, granularity=granularity) for e in (True, False))
    assert folded.weight.shape == layer.weight.shape
    ints, scale, source = expanded.held("weight")
    groups, C = getattr(layer, "groups", 1), expanded.channels["weight"]
    assert ints.shape[1] == C + expanded.splits // groups == source.numel() // groups
    whole = torch.ops.ocs.dequantize(ints, scale)
    assert torch.equal(expanded.original, expanded.layout(whole[:, :C], groups))
    if expanded.splits:
        assert torch.equal(expanded.copied, expanded.layout(whole[:, C:], groups))
    assert tuple(expanded.layout(whole, groups).shape) == expanded.expanded_shape("weight")
    assert torch.equal(expanded.weight, folded.weight)  # for whoever reads it
    a, b = expanded(x).detach(), folded(x).detach()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_folded_runs_the_dequantized_weight(name: str) -> None:
    layer, x = make(name)
    folded = quantized(layer, expand=False, bits=8, r=0.2)
    plain = copy.deepcopy(layer)
    plain.weight.data = folded.weight
    assert torch.equal(folded(x), plain(x))
    step = float(folded.scale)
    assert float((folded.weight - layer.weight.detach()).abs().max()) <= step / 2 * (1 + 1e-6)


@pytest.mark.parametrize("naive", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_splitting_alone_changes_nothing(name: str, naive: bool) -> None:
    """Functional equivalence before rounding (eq. 5 and 6): split the float weight, gather the input, same output."""
    layer, x = make(name)
    groups = getattr(layer, "groups", 1)
    expanded = quantized(layer, expand=True, r=0.5)
    weight = expanded.layout(layer.weight.detach(), groups)
    unit, C = 0.1, weight.shape[1]
    parts = []
    for w in (weight.numpy() / unit).reshape(groups, -1, *weight.shape[1:]).astype("f8"):
        picks = reference.pick_channels(w, expanded.splits // groups)
        parts.append(reference.split_channels(w, picks, not naive)[0] * unit)
    split = torch.cat([torch.from_numpy(part) for part in parts]).float()
    expanded.original = expanded.layout(split[:, :C], groups)
    if expanded.splits:
        expanded.copied = expanded.layout(split[:, C:], groups)
    torch.testing.assert_close(expanded(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_called_as_the_float_layer_is(name: str) -> None:
    """By keyword, and with nothing in the batch."""
    layer, x = make(name)
    expanded = quantized(layer, expand=True)
    assert torch.equal(expanded(input=x), expanded(x))
    batched = x if x.dim() > 1 and "unbatched" not in name else x[None]
    assert expanded(batched[:0]).shape == layer(batched[:0]).shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    layer, _ = make("linear")
    x = torch.nested.nested_tensor([torch.randn(2, 30), torch.randn(3, 30)])
    ours, folded = (quantized(layer, expand=expand)(x) for expand in (True, False))
    torch.testing.assert_close(ours.values(), folded.values())


def test_second_derivatives() -> None:
    """The copies' part is added in place."""
    for name in ("linear", "conv2d", "conv2d, pointwise", "transposed 2d"):
        layer, x = make(name)
        ours = quantized(layer, expand=True).double()
        x = x[:1, ..., :4, :4] if x.dim() == 4 else x[:1]
        assert torch.autograd.gradcheck(ours, x.double().requires_grad_())
        assert torch.autograd.gradgradcheck(ours, x.double().requires_grad_())


def test_no_splits_no_gather() -> None:
    layer, x = make("conv2d")
    expanded = quantized(layer, expand=True, r=0.0)
    assert expanded.copied is None
    assert torch.equal(expanded(x), quantized(layer, expand=False, r=0.0)(x))


@pytest.mark.parametrize("expand", [True, False])
def test_state_dict_round_trip(expand: bool) -> None:
    layer, x = make("conv2d, grouped")
    ours = quantized(layer, expand=expand)
    state = ours.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "weight_int": (6, 5, 3, 3), "scale": (), "source": (15,), "bias": (6,)}  # fmt: skip
    other = copy.deepcopy(layer)
    other.weight.data = torch.randn_like(other.weight)
    for assign in (False, True):
        loaded = quantized(other, expand=not expand)
        loaded.expand = expand
        loaded.load_state_dict(state, assign=assign)
        assert torch.equal(loaded(x), ours(x))


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(travel, net: SmallNet) -> None:
    ocs.quantize(net, wbits=5, r=0.2)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(travel(net)(x), net(x))


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_casting_keeps_the_scale_and_rounds_once(dtype: torch.dtype, expand: bool) -> None:
    layer, _ = make("conv2d")
    ours = quantized(layer, expand=expand, granularity="channel")
    before = ours.weight.clone()
    ours.to(dtype)
    assert (ours.scale.dtype, ours.weight_int.dtype, ours.weight.dtype) == (torch.float32, torch.int8, dtype)
    assert torch.equal(ours.weight, before.to(dtype))
    ours.float()
    assert torch.equal(ours.weight, before)


def test_half_precision_model_runs() -> None:
    layer, x = make("linear")
    ours = quantized(layer.bfloat16(), expand=True)
    assert ours.weight.dtype == ours(x.bfloat16()).dtype == torch.bfloat16


def test_channels_last_is_kept() -> None:
    layer, x = make("conv2d")
    layer.to(memory_format=torch.channels_last)
    ours = quantized(layer, expand=False)
    assert ours.weight.is_contiguous(memory_format=torch.channels_last)
    plain = quantized(layer.to(memory_format=torch.contiguous_format), expand=False)
    torch.testing.assert_close(ours(x.to(memory_format=torch.channels_last)), plain(x))
    expanded = quantized(layer, expand=True)
    assert expanded(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    moved = copy.deepcopy(plain).to(memory_format=torch.channels_last).half().float()
    assert moved.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.weight, plain.weight)


def test_bias_is_the_same_parameter_and_trains() -> None:
    layer, x = make("linear")
    ours = quantized(layer, expand=True)
    assert ours.bias is layer.bias
    ours(x).sum().backward()
    assert ours.bias.grad is not None
    assert [name for name, _ in ours.named_parameters()] == ["bias"]


def test_repr_says_what_was_done() -> None:
    layer, _ = make("conv2d, circular")
    text = repr(quantized(layer, expand=True, granularity="channel"))
    assert text.startswith(
        "QuantConv2d(10, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), padding_mode=circular"
    )
    assert text.endswith("bits=5, splits=2 (expanded), scale per channel)")


@pytest.mark.parametrize("expand", [True, False])
def test_compile_whole_graph(net: SmallNet, expand: bool) -> None:
    ocs.quantize(net, wbits=5, r=0.2, expand=expand)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("expand", [True, False])
def test_export(net: SmallNet, expand: bool) -> None:
    ocs.quantize(net, wbits=5, r=0.2, expand=expand)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), net(x))


def test_inference_mode_and_meta(net: SmallNet) -> None:
    ocs.quantize(net, wbits=5, r=0.2)
    with torch.inference_mode():
        assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    shapes = {name: t.shape for name, t in net.state_dict().items()}
    state = net.state_dict()
    meta = copy.deepcopy(net).to("meta")
    assert {name: t.shape for name, t in meta.state_dict().items()} == shapes
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(empty.eval()(x), net(x))


STRANGERS = {
    "source outside": ("source", lambda t: t + 1000, "source is no split plan"),
    "source reordered": ("source", lambda t: t.flip(0), "source is no split plan"),
    "scale zero": ("scale", lambda t: t * 0, "scale is not positive"),
    "scale NaN": ("scale", lambda t: t * float("nan"), "scale is not positive"),
    "integers too large": ("weight_int", lambda t: t * 0 + 127, "weight_int is not of 5-bit integers"),
    "integers not integers": ("weight_int", lambda t: t * 0.5, "weight_int is not of 5-bit integers"),
}


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("case", STRANGERS)
def test_a_state_from_a_stranger_is_refused(case: str, expand: bool) -> None:
    """The layer is named, and is as it was."""
    name, damage, message = STRANGERS[case]
    layer, x = make("linear")
    model = nn.Sequential(quantized(layer, expand=expand))
    before = model(x)
    state = model.state_dict()
    state[f"0.{name}"] = damage(state[f"0.{name}"])
    with pytest.raises(RuntimeError, match=f"0: {message}"):
        model.load_state_dict(state)
    assert torch.equal(model(x), before)


PARTIAL = {
    "no source": ({"0.source": None}, "source is missing"),
    "no scale": ({"0.scale": None}, "scale is missing"),
    "another granularity": ({"0.scale": torch.ones(7)}, r"scale has a size mismatch: \[7\]"),
    "other channels": ({"0.weight_int": torch.zeros(7, 9, dtype=torch.int8)}, "weight_int has a size mismatch"),
    "a scale too small": ({"0.scale": torch.tensor(1e-60, dtype=torch.double)}, "scale is not positive"),
    "a source of floats": ({"0.source": torch.arange(36.0)}, "source is no split plan"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", PARTIAL)
def test_integers_scale_and_source_are_loaded_together(case: str, strict: bool) -> None:
    """Or the layer would compute what neither model did."""
    changes, message = PARTIAL[case]
    layer, x = make("linear")
    model = nn.Sequential(quantized(layer, expand=True))
    before, held = model(x), [tensor.clone() for tensor in model[0].held("weight")]
    state = {**nn.Sequential(quantized(nn.Linear(30, 7), expand=True)).state_dict(), **changes}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model(x), before)
    assert all(torch.equal(a, b) for a, b in zip(model[0].held("weight"), held, strict=True))


def test_a_state_without_the_layer_leaves_it_alone() -> None:
    layer, x = make("linear")
    model = nn.Sequential(quantized(layer, expand=True))
    before = model(x)
    assert model.load_state_dict({}, strict=False).missing_keys == ["0.bias", "0.weight_int", "0.scale", "0.source"]
    assert torch.equal(model(x), before)


def test_an_assigned_source_becomes_int64() -> None:
    layer, _ = make("linear")
    model = nn.Sequential(quantized(layer, expand=True))
    state = model.state_dict()
    model.load_state_dict({**state, "0.source": state["0.source"].int()}, assign=True)
    assert model[0].source.dtype == torch.int64


def test_a_linear_layer_refuses_what_torchs_refuses() -> None:
    layer, _ = make("linear")
    for x in (torch.randn(0, 29), torch.randn(15, 60), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="QuantLinear: expected 30 input channels"):
            quantized(layer, expand=True)(x)


def test_a_half_precision_scale_is_loaded_as_float32() -> None:
    layer, _ = make("linear")
    ours = quantized(layer, expand=True)
    state = {name: t.half() if name == "scale" else t for name, t in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    assert ours.scale.dtype == torch.float32


def test_type_leaves_integers_integers() -> None:
    """Module.type() casts integer buffers too."""
    layer, _ = make("linear")
    ours = quantized(layer, expand=True)
    before = ours.weight.clone()
    ours.type(torch.float16)
    assert (ours.weight_int.dtype, ours.source.dtype, ours.scale.dtype) == (torch.int8, torch.int64, torch.float32)
    assert torch.equal(ours.weight, before.half())


def test_every_kind_is_a_quantized_layer() -> None:
    assert all(issubclass(kind, QuantizedLayer) for kind in REPLACEMENTS.values())
    assert QuantizedWeight._fields == ("ints", "scale", "source", "threshold")
