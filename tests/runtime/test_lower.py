"""ocs.lower: plain torch on int8 weights that computes what the quantized model does."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Everything, SmallNet, outlier_weight
from torch import Tensor, fx, nn

import ocs
from ocs.nn.base import QuantizedLayer
from ocs.runtime.arithmetic import Arithmetic, arithmetic_of
from ocs.runtime.lower import lower_layer
from ocs.runtime.whole_numbers import in_columns, whole_numbers

PRODUCTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(10, 6), (4, 10)),
    "linear of three dimensions": (lambda: nn.Linear(10, 6, bias=False), (2, 4, 10)),
    "conv1d": (lambda: nn.Conv1d(10, 6, 3, padding=1), (2, 10, 7)),
    "conv2d": (lambda: nn.Conv2d(10, 6, 3, stride=2, padding=1, dilation=2), (2, 10, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(10, 6, 1), (2, 10, 5, 5)),
    "same": (lambda: nn.Conv2d(10, 6, 3, padding="same", padding_mode="circular"), (2, 10, 5, 5)),
    "reflect": (lambda: nn.Conv2d(10, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 10, 5, 5)),
    "groups": (lambda: nn.Conv2d(12, 6, 3, groups=3), (2, 12, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "unbatched": (lambda: nn.Conv2d(10, 6, 3), (10, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(5, 4, 2), (2, 5, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(10, 6, 3, stride=2, output_padding=1), (2, 10, 7)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(12, 6, 3, groups=3), (2, 12, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 4, 4, 4)),
}
OPTIONS: dict[str, dict[str, object]] = {
    "float inputs": {"wbits": 5, "r": 0.2},
    "tensor": {"wbits": 5, "r": 0.2, "abits": 8},
    "channel": {"wbits": 4, "r": 0.3, "abits": 8, "granularity": "channel"},
    "8 bits, split": {"wbits": 8, "r": 0.5, "abits": 8},
    "split inputs": {"wbits": 6, "r": 0.2, "abits": 6, "act_r": 0.2},
    "both split, unsigned": {"wbits": 8, "r": 0.4, "abits": 8, "act_r": 0.3, "act_signed": "auto", "split": "naive"},
    "repeatedly split inputs": {"wbits": 6, "r": 0.2, "abits": 6, "act_r": 0.5, "act_select": "max"},
    "repeated, by error": {"wbits": 8, "r": 0.4, "abits": 5, "act_r": 0.5, "act_select": "error", "act_clip": "mse"},
    "folded": {"wbits": 5, "r": 0.2, "abits": 7, "expand": False},
}


def product(kind: str, options: str, seed: int = 0) -> tuple[QuantizedLayer, Tensor]:
    """A quantized layer, and an input whose values, and halves of these, lie between ties."""
    torch.manual_seed(seed)
    make, shape = PRODUCTS[kind]
    model, unsigned = nn.Sequential(make()), OPTIONS[options].get("act_signed") == "auto"
    model[0].weight.data = torch.from_numpy(outlier_weight(tuple(model[0].weight.shape), seed=seed))
    x = torch.randn(shape).abs() if unsigned else torch.randn(shape)
    if "act_select" in OPTIONS[options]:
        x.movedim(1 - model[0].weight.dim(), 0)[::4] *= 9  # these are split more than once
    calibration = {"calibration": [x]} if "abits" in OPTIONS[options] else {}
    ocs.quantize(model, skip=None, **OPTIONS[options], **calibration)
    if "act_select" in OPTIONS[options] and model[0].input_grid.splits > 1:
        assert model[0].input_copies().unique().numel() < model[0].input_copies().numel()
    if calibration:
        scale = model[0].input_scale
        x = ((x / scale).round() + 0.3) * scale
    return model[0], x


@pytest.mark.parametrize("target", ["vnni", "avx2", "tensorrt"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products(kind: str, options: str, target: str) -> None:
    layer, x = product(kind, options)
    if target == "tensorrt" and OPTIONS[options].get("act_signed") == "auto":
        with pytest.raises(ValueError, match="act_signed"):
            lower_layer(layer, arithmetic_of(target))
        return
    lowered, expected = lower_layer(layer, arithmetic_of(target)), layer(x)
    torch.testing.assert_close(lowered(x), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    assert isinstance(lowered, fx.GraphModule)
    assert lowered.weight_int.dtype == torch.int8
    largest = 127 if layer.input_grid is None else arithmetic_of(target).limit(_codes(lowered, x).abs().max().item())
    assert int(lowered.weight_int.abs().max()) <= largest


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def _codes(lowered: fx.GraphModule, x: Tensor) -> Tensor:
    """Integers that the layer multiplies, without their zero point."""
    found = {}

    class Run(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            value = super().run_node(node)
            if "dequantize_per_tensor" in str(node.target):
                found["q"] = self.fetch_args_kwargs_from_env(node)[0]
            return value

    Run(lowered).run(x)
    q, _, zero_point, *_ = found["q"]
    return q.int() - zero_point


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "float inputs"])
@pytest.mark.parametrize("target", ["vnni", "avx2", "tensorrt"])
def test_integer_sums_are_equal_bit_for_bit(options: str, target: str) -> None:
    """Of a linear layer, all in integers: expanded weight times rounded parts, against what the lowered one holds."""
    layer, x = product("linear", options, seed=3)
    if target == "tensorrt" and OPTIONS[options].get("act_signed") == "auto":
        return
    lowered = lower_layer(layer, arithmetic_of(target))
    ours = layer.operands(x)
    _, scale, _ = layer.weight_state("weight")
    sums = torch.nn.functional.linear(ours.input.double(), layer.original.double())
    if ours.copied is not None:
        sums += torch.nn.functional.linear(ours.copied_input.double(), layer.copied.double())
    sums = (sums / (scale.double() * layer.input_scale.double())).round().int()
    assert torch.equal(torch.nn.functional.linear(_codes(lowered, x).int(), lowered.weight_int.int()), sums)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("limit", [5, 64, 127])
def test_whole_numbers_are_cut_into_the_fewest_columns(groups: int, limit: int) -> None:
    generator = torch.Generator().manual_seed(groups * limit)
    C, copies = 7, 9
    ints = torch.randint(-127, 128, (6, C + copies, 2), generator=generator).to(torch.int8)
    source = [torch.cat([torch.arange(C), torch.randint(0, C, (copies,), generator=generator)]) for _ in range(groups)]
    source = torch.cat([each + g * C for g, each in enumerate(source)])
    whole = whole_numbers(ints, source, groups, C)
    cut, found = in_columns(whole, groups, limit)
    assert cut.dtype == torch.int8
    assert int(cut.int().abs().max()) <= limit
    assert torch.equal(whole_numbers(cut, found, groups, C), whole)
    per_group = found.view(groups, -1)
    assert torch.equal(per_group[:, :C], torch.arange(groups * C).view(groups, C))
    needed = (-(-whole.view(groups, -1, C, 2).abs().amax((1, 3)) // limit)).clamp(min=1).sum(1)
    assert per_group.shape[1] == int(needed.max())
    for o in range(6):  # literally, one output after the other
        own = source.view(groups, -1)[o // (6 // groups)]
        for c in range(C):
            columns = own == c + C * (o // (6 // groups))
            assert torch.equal(whole[o, c], ints[o, columns].int().sum(0))


def test_a_5_bit_layer_needs_no_copies() -> None:
    """OCS costs an integer engine nothing where the sums of copies fit."""
    layer, _ = product("conv2d", "tensor")
    assert layer.splits > 0
    assert lower_layer(layer, Arithmetic()).weight_int.shape[1] == 10


def test_target_without_exact_pairs_gets_no_integer_beyond_64() -> None:
    layer, x = product("conv2d", "8 bits, split")
    exact, careful = (lower_layer(layer, arithmetic_of(target)) for target in ("vnni", "avx2"))
    assert int(exact.weight_int.abs().max()) > 64 >= int(careful.weight_int.abs().max())
    assert careful.weight_int.shape[1] > exact.weight_int.shape[1]
    torch.testing.assert_close(careful(x), exact(x))


# --- Whole models -----------------------------------------------------------------------------------------------------


def lowered_everything(**options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Everything().eval()
    ocs.quantize(model, **{"wbits": 5, "r": 0.1, "embeddings": True, **options})
    lowered = copy.deepcopy(model)
    assert ocs.lower(lowered) is lowered
    return model, lowered


def test_everything() -> None:
    model, lowered = lowered_everything()
    inputs = Everything.inputs()
    for ours, theirs in zip(lowered(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not any(type(module).__module__.startswith("ocs") for module in lowered.modules())
    assert type(lowered.lstm) is nn.LSTM
    assert lowered.again is lowered.net.head


def test_everything_with_quantized_inputs() -> None:
    inputs = Everything.inputs()
    model, lowered = lowered_everything(
        abits=8, calibration=[inputs], overrides={"lstm": {"abits": 8}, "cell": {"abits": 8}}
    )
    for ours, theirs in zip(lowered(*inputs), model(*inputs), strict=True):
        assert relative(ours, theirs) < 0.03  # a tie may fall otherwise
    assert not any(type(module).__module__.startswith("ocs") for module in lowered.modules())


@pytest.mark.parametrize("options", [{}, {"granularity": "channel"}])
def test_attention(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    for layer, sizes in (
        (nn.MultiheadAttention(12, 3, batch_first=True), (12, 12, 12)),
        (nn.MultiheadAttention(12, 3, kdim=8, vdim=10, add_bias_kv=True, add_zero_attn=True), (12, 8, 10)),
    ):
        model = nn.ModuleDict({"attention": layer}).eval()
        ocs.quantize(model, wbits=8, r=0.2, **options)
        query, key, value = (torch.randn(2, 2, size) for size in sizes)
        arguments = {"key_padding_mask": torch.tensor([[False, True], [False, False]]), "average_attn_weights": False}
        expected = model["attention"](query, key, value, **arguments)
        ocs.lower(model)
        for ours, theirs in zip(model["attention"](query, key, value, **arguments), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        output, none = model["attention"](query[0], key[0], value[0], need_weights=False)
        assert none is None
        assert output.shape == (2, 12)


def test_torchs_transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    ocs.quantize(model, wbits=6, abits=8, calibration=[x], skip=None)
    expected = model(x)
    lowered = copy.deepcopy(ocs.lower(model))
    assert relative(lowered(x), expected) < 0.05
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 6, mode=mode, padding_idx=3))
    ocs.quantize(model, wbits=4, embeddings=True)
    index, offsets = torch.tensor([1, 3, 4, 3, 0, 19]), torch.tensor([0, 2, 4])
    expected = [model[0](index, offsets), model[0](index.view(2, 3))]
    ocs.lower(model)
    for ours, theirs in zip([model[0](index, offsets), model[0](index.view(2, 3))], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Experts(nn.Module):
    """Two experts in one parameter."""

    num_experts = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 10))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 10] -> [N, 6]."""
        return sum(x @ weight.T for weight in self.weight)


class Own(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Twice what a linear layer gives."""
        return 2 * super().forward(x)


ocs.register(Own)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("make", [Experts, lambda: Own(10, 6)])
def test_layers_with_a_forward_of_their_own(make: Callable[[], nn.Module], granularity: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(4, 10)
    ocs.quantize(model, wbits=5, r=0.2, granularity=granularity)
    expected = model(x)
    ocs.lower(model)
    torch.testing.assert_close(model(x), expected)
    assert any(b.dtype == torch.int8 and b.numel() >= 60 for b in model.buffers())


class Rows(nn.Module):
    """Each kind of layer whose inputs may have a scale for each row, but for recurrent ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(10, 12), Own(12, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.cross = nn.MultiheadAttention(12, 3, kdim=10, vdim=10)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 10] -> [N, T, 12]."""
        y = self.own(self.first(x).relu())
        y = y + self.attention(y, y, y)[0]
        return y + self.cross(y, x, x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"wbits": 5, "r": 0.2}, {"wbits": 8, "r": 0.5, "granularity": "channel"}])
def test_a_scale_for_each_row(options: dict[str, object], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Rows().eval(), torch.randn(2, 5, 10) * torch.tensor([1.0, 4.0]).view(2, 1, 1)
    x[1, 2] = 0
    ocs.quantize(model, abits=8, act_scale="dynamic", **options)
    model, x = model.to(dtype), x.to(dtype)
    expected = model(x)
    lowered = ocs.lower(copy.deepcopy(model))
    assert not any(type(module).__module__.startswith("ocs") for module in lowered.modules())
    assert lowered(x).dtype == dtype
    assert relative(lowered(x), expected) < (1e-5 if dtype == torch.float32 else 0.03)
    lowered = ocs.lower(nn.Sequential(model.first))
    code = lowered[0].code
    assert all(each in code for each in ("amax", "torch.round", "truediv", "weight_int"))
    assert "quantize_per_tensor" not in code
    assert torch.equal(pickle.loads(pickle.dumps(lowered))(x), lowered(x))
    assert torch.equal(lowered(x[1:]), lowered(x)[1:])


@pytest.mark.parametrize("layer", [nn.LSTM(6, 5), nn.GRUCell(6, 5)])
def test_rounded_hidden_states_are_refused_and_the_model_stays(layer: nn.Module) -> None:
    model = nn.ModuleDict({"recurrent": copy.deepcopy(layer)})
    ocs.quantize(model, abits=8, act_scale="dynamic", overrides={"recurrent": {"abits": 8}})
    with pytest.raises(ValueError, match=r"recurrent: act_scale='dynamic' rounds its hidden states.*'static'"):
        ocs.lower(model)
    assert isinstance(model["recurrent"], QuantizedLayer)
    model = nn.ModuleDict({"recurrent": copy.deepcopy(layer)})
    ocs.quantize(model, abits=8, act_scale="dynamic")
    assert type(ocs.lower(model)["recurrent"]) is type(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, net: SmallNet) -> None:
    x = torch.randn(2, 3, 8, 8)
    ocs.quantize(net, wbits=5, abits=8, calibration=[x])
    net.to(dtype)
    expected = net(x.to(dtype))
    ocs.lower(net)
    found = net(x.to(dtype))
    assert found.dtype == dtype
    assert relative(found, expected) < 0.05


# --- As plain modules -------------------------------------------------------------------------------------------------


def test_runs_without_ocs(tmp_path: Path, net: SmallNet) -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(*[net.stem, nn.ReLU(), net.body])
    ocs.quantize(net, wbits=5, r=0.1, abits=8, calibration=[x], fold_bn=False)
    ocs.lower(net)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((net, x, net(x))))
    code = """
import pickle, sys
sys.modules["ocs"] = None
import torch
model, x, y = pickle.load(open(sys.argv[1], "rb"))
torch.testing.assert_close(model(x), y, rtol=0, atol=0)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pickle")], check=True, cwd=tmp_path)


def test_memory_is_a_quarter(net: SmallNet) -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    before = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    ocs.quantize(model, wbits=5, r=0.02, skip=None)
    ocs.lower(model)
    after = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert after <= 0.27 * before


def test_public_attributes_and_hooks_stay(net: SmallNet) -> None:
    seen = []
    net.head.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    net.head.note = "kept"
    ocs.quantize(net, wbits=5)
    lowered = copy.deepcopy(ocs.lower(net))
    net(torch.randn(1, 3, 8, 8))
    assert len(seen) == 1
    assert lowered.head.in_features == 16
    assert lowered.head.note == "kept"


# --- What cannot be ---------------------------------------------------------------------------------------------------


def test_a_model_that_is_its_layer_comes_back_lowered() -> None:
    layer, x = product("linear", "tensor")
    torch.testing.assert_close(ocs.lower(layer)(x), layer(x))


def test_nothing_quantized(net: SmallNet) -> None:
    with pytest.raises(ValueError, match=r"call ocs\.quantize"):
        ocs.lower(net)
    with pytest.raises(TypeError, match="dict"):
        ocs.lower({})


def test_oracle_is_refused_and_the_model_stays(net: SmallNet) -> None:
    ocs.quantize(net, wbits=5, abits=8, act_r=0.1, act_split="oracle")
    before = [type(module) for module in net.modules()]
    with pytest.raises(ValueError, match=r"body\.0: act_split='oracle'"):
        ocs.lower(net)
    assert [type(module) for module in net.modules()] == before


def test_target_is_checked(net: SmallNet) -> None:
    ocs.quantize(net, wbits=5)
    with pytest.raises(ValueError, match="target='gpu': use 'this'"):
        ocs.lower(net, target="gpu")


def test_layers_that_grow_for_a_machine_that_saturates_are_named(net: SmallNet) -> None:
    x = torch.randn(2, 3, 8, 8)
    seven = copy.deepcopy(net)
    ocs.quantize(net, wbits=8, abits=8, calibration=[x])
    with pytest.warns(UserWarning, match=r"body\.3 and 1 more: 2\.0 times the columns.*wbits=7"):
        ocs.lower(net, target="avx2")
    ocs.quantize(seven, wbits=7, abits=8, calibration=[x])
    ocs.lower(seven, target="avx2")  # without a word


def test_products_that_saturate_are_found() -> None:
    """On x86 without VNNI oneDNN's convolutions saturate, as ONEDNN_MAX_CPU_ISA shows, and weights up to 64 do not."""
    code = """
import torch
from torch import nn
import ocs
from ocs.runtime.arithmetic import arithmetic_of
assert arithmetic_of("this").saturates
model, x = nn.Sequential(nn.Conv2d(32, 32, 3, bias=False)), torch.full((1, 32, 6, 6), 255.0)
model[0].weight.data.fill_(127.0)
ocs.quantize(model, wbits=8, abits=8, act_signed="auto", calibration=[x], skip=None)
expected = 255 * 127 * 9 * 32
right, wrong = (ocs.compile(model, x, target=target)(x) for target in ("this", "vnni"))
assert torch.equal(right, torch.full_like(right, expected)), right.flatten()[:3]
assert (wrong < 0.6 * expected).all(), wrong.flatten()[:3]
"""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no x86")
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)


class ReadsWeights(nn.Module):
    """Reads the weight of its linear layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 10] -> [N, 6]."""
        return torch.nn.functional.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_weight_that_its_parent_reads_is_one_of_floats(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ocs.model import targets

    monkeypatch.setitem(targets._READ_BY_PARENT, f"{__name__}.ReadsWeights", ("layer",))
    torch.manual_seed(0)
    model, x = nn.Sequential(ReadsWeights()), torch.randn(4, 10)
    ocs.quantize(model, wbits=5, r=0.2, granularity=granularity)
    expected = model(x)
    ocs.lower(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model[0].layer(x), expected)
    assert model[0].layer.parametrizations.weight.original.dtype == torch.int8


def test_a_fused_transformer_layer_with_float_attention() -> None:
    """Its fast path reads the weights of the linear layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    model, x = nn.Sequential(layer), torch.randn(2, 5, 16)
    ocs.quantize(model, wbits=6, skip=[nn.MultiheadAttention])
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(ocs.lower(model)(x), expected)
