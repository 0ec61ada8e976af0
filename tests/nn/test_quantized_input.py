"""Quantized inputs: the paper's procedure literally, expanded and folded alike, and layers that travel as before."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, folded_twin, state
from test_nn import LAYERS, make
from torch import Tensor, nn

import ocs
from ocs import functional
from ocs.kernels import reference
from ocs.nn.copied_channels import copied_channels, copies_needed
from ocs.nn.input import InputGrid
from ocs.nn.input_parts import (
    InputParts,
    _originals_first,
    oracle_parts,
    parts_of,
    round_folded,
    static_parts,
)

STATIC = {"act_r": 0.2}
ORACLE = {"act_r": 0.2, "act_split": "oracle"}
REPEATED = {"act_r": 0.5, "act_select": "max"}
CASES = {
    "static": STATIC,
    "static, naive": {**STATIC, "split": "naive"},
    "static, clipped": {**STATIC, "act_clip": "mse"},
    "oracle": ORACLE,
    "oracle, naive": {**ORACLE, "split": "naive"},
    "oracle, clipped": {**ORACLE, "act_clip": 0.7},
    "no splits": {},
    "unsigned": {**STATIC, "act_signed": "auto"},
    "repeated": REPEATED,
    "repeated, naive": {**REPEATED, "split": "naive"},
    "repeated, clipped": {**REPEATED, "act_clip": "mse"},
    "repeated, unsigned": {**REPEATED, "act_signed": "auto"},
    "repeated, equal parts": {**REPEATED, "split": "even"},
    "by error": {**REPEATED, "act_select": "error", "act_clip": "mse"},
    "by error, naive": {**REPEATED, "act_select": "error", "act_clip": "mse", "split": "naive"},
}


def quantized(layer: nn.Module, x: Tensor, **options: object) -> nn.Module:
    """The layer after quantize()."""
    net = nn.Sequential(copy.deepcopy(layer))
    ocs.quantize(net, skip=None, calibration=lambda model: model(x), **options)
    return net[0]


def outlying(x: Tensor) -> Tensor:
    """Inputs with outliers in a few channels (axis -1 and 1 alike)."""
    return (x**3 * 0.3).sign() * x.abs() ** 2.5


# --- The paper's procedure --------------------------------------------------------------------------------------------


def literal_parts(u: np.ndarray, picks: list[int], quantization_aware: bool) -> tuple[np.ndarray, np.ndarray]:
    """Grid units u [N, C, K] with channels split one after the other, and the source of each channel."""
    return reference.split_channels(u, picks, quantization_aware)


def literal_input(x: np.ndarray, scale: float, picks: list[int], grid: InputGrid) -> np.ndarray:
    """What the layer computes with: the rounded parts of every channel, added up."""
    low, high = reference.grid(grid.bits, grid.signed)
    parts, source = literal_parts((x / np.float32(scale)).astype(np.float64), picks, grid.split == "qa")
    q = np.clip(np.rint(parts), low, high)
    total = np.zeros(x.shape)
    for j, c in enumerate(source):
        total[:, c] += q[:, j]
    return (total * scale).astype(np.float32)


@pytest.mark.parametrize("split", ["qa", "naive"])
@pytest.mark.parametrize("signed", [True, False])
def test_static_splits_are_the_papers(split: str, signed: bool) -> None:
    x = np.random.default_rng(0).standard_normal((40, 10, 6)).astype(np.float32)
    x = np.abs(x) if not signed else x
    grid = InputGrid(bits=4, signed=signed, splits=3, split=split)
    source = torch.tensor([*range(10), 7, 2, 4])
    scale = torch.tensor(0.1)
    ours = round_folded(torch.from_numpy(x), grid, static_parts(grid, scale, source, 1), -2)
    np.testing.assert_allclose(ours, literal_input(x, float(scale), [7, 2, 4], grid), atol=1e-6)


@pytest.mark.parametrize("split", ["qa", "naive"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_repeated_splits_halve_the_largest_copy(split: str, signed: bool, groups: int) -> None:
    """As the paper does with weights: what the copies' order says are the parts that came of halving one by one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 10, 6)).astype(np.float32) * np.array([1, 30, 1, 9, 1] * 2, np.float32)[:, None]
    x = np.abs(x) if not signed else x
    grid, C, splits = InputGrid(bits=4, signed=signed, splits=7, split=split), 10 // groups, 7
    copies, expected = [], []
    for g in range(groups):
        own = x[:, g * C : (g + 1) * C]
        picks = reference.pick_channels(own, splits)
        copies.append(g * C + reference.split_channels(own, picks, False)[1][C:])
        expected.append(literal_input(own, 0.5, picks, grid))
    assert max(np.bincount(np.concatenate(copies))) >= 3
    source = torch.from_numpy(np.concatenate([x for g in range(groups) for x in (np.arange(C) + g * C, copies[g])]))
    ours = round_folded(torch.from_numpy(x), grid, static_parts(grid, torch.tensor(0.5), source, groups), -2)
    np.testing.assert_allclose(ours, np.concatenate(expected, 1), atol=1e-6)


@pytest.mark.parametrize("split", ["qa", "naive", "even"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_order_of_copies_says_what_part_each_is(groups: int, split: str) -> None:
    for seed in range(20):
        channel_max, splits = torch.rand(60, generator=torch.Generator().manual_seed(seed)) ** 9 + 1e-6, 60 // groups
        plan = torch.ops.ocs.split_plan(channel_max, groups, splits, split == "even")
        source, parts, offset = (_originals_first(each, groups, splits) for each in plan[:3])
        of_source, which = parts_of(source, 60, split)
        assert torch.equal(of_source, parts.long())
        assert torch.equal(which, offset.long())


def test_repeated_quantization_aware_splits_round_as_if_nothing_were_split() -> None:
    """Hermite's identity off ties: five parts, the halves of 1/4 and 1/8, hold what four parts of 7 steps do."""
    u = torch.linspace(-28.03, 28.03, 4001)[:, None].expand(-1, 2)
    grid, source = InputGrid(bits=4, splits=4), torch.tensor([0, 1, 1, 1, 1, 1])
    ours = round_folded(u, grid, static_parts(grid, torch.tensor(1.0), source, 1), -1)
    assert torch.equal(ours[:, 1], torch.round(u[:, 1]))
    naive = InputGrid(bits=4, splits=4, split="naive")
    assert not torch.equal(round_folded(u, naive, static_parts(naive, torch.tensor(1.0), source, 1), -1)[:, 1], ours)


@pytest.mark.parametrize("split", ["qa", "naive"])
def test_oracle_splits_are_the_papers(split: str) -> None:
    """One split at a time, of the channel with the largest |x| in this batch; the scale from the split values."""
    x = np.random.default_rng(0).standard_normal((40, 10, 6)).astype(np.float32)
    x[:, 3] *= 9
    x[:, 8] *= 4
    grid = InputGrid(bits=5, splits=6, split=split, act_split="oracle")
    picks = reference.pick_channels(x, 6)
    assert len(set(picks)) < 6  # a copy is split again
    largest = np.abs(reference.split_channels(x, picks, False)[0]).max()
    parts = oracle_parts(grid, torch.from_numpy(x), -2, 1)
    assert float(parts.scale) == np.float32(largest) / np.float32(15)
    ours = round_folded(torch.from_numpy(x), grid, parts, -2)
    np.testing.assert_allclose(ours, literal_input(x, float(parts.scale), picks, grid), atol=1e-5)


@pytest.mark.parametrize("clip", [0.6, "mse", "percentile"])
def test_oracle_clips_the_split_values(clip: str | float) -> None:
    x = torch.randn(40, 10, 6) ** 3
    x[:, 3] *= 9
    grid = InputGrid(bits=4, splits=3, act_split="oracle", clip=clip)
    split = reference.split_channels(x.numpy(), reference.pick_channels(x.numpy(), 3), False)[0]
    expected = functional.clip_threshold(split, 4, clip)
    assert float(oracle_parts(grid, x, -2, 1).scale) == pytest.approx(expected / 7, rel=1e-6)


def test_quantization_aware_splits_round_as_if_nothing_were_split() -> None:
    """Hermite's identity off ties, with twice the range: what no other channel can hold, a split one can."""
    u = torch.linspace(-14.03, 14.03, 4001)[:, None].expand(-1, 2)
    grid, source = InputGrid(bits=4, splits=1), torch.tensor([0, 1, 1])
    ours = round_folded(u, grid, static_parts(grid, torch.tensor(1.0), source, 1), -1)
    assert torch.equal(ours[:, 1], torch.round(u[:, 1]))
    assert torch.equal(ours[:, 0], torch.round(u[:, 0]).clamp(-7, 7))


def test_the_channels_with_most_outliers_are_split() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    x[:, [5, 11]] *= 6
    x[0, 17] = 20  # one large value, but no more
    layer = quantized(nn.Linear(20, 4), x, abits=4, act_r=0.1)
    assert sorted(layer.input_source[20:].tolist()) == [5, 11]
    halved = x.clone()
    halved[:, [5, 11]] /= 2
    assert float(layer.input_scale) == pytest.approx(float(halved.abs().max()) / 7)
    assert layer.input_grid == InputGrid(bits=4, splits=2)


def test_without_splits_it_is_fake_quantization() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 20)
    for options, signed, method in (
        ({"abits": 5}, True, "none"),
        ({"abits": 4, "act_clip": "mse"}, True, "mse"),
        ({"abits": 4, "act_clip": "aciq", "act_signed": "auto"}, False, "aciq"),
    ):
        seen = x if signed else x.abs()
        layer = quantized(nn.Linear(20, 4), seen, **options)
        threshold = functional.clip_threshold(seen, options["abits"], method, signed)
        assert float(layer.input_scale) * layer.input_grid.qmax == pytest.approx(threshold, rel=5e-3)
        on_grid = functional.fake_quantize(seen, layer.input_scale, options["abits"], signed)
        assert torch.equal(layer(seen), nn.functional.linear(on_grid, layer.weight, layer.bias))


def test_unsigned_only_where_nothing_was_negative(net: SmallNet) -> None:
    x = torch.randn(20, 3, 8, 8)
    ocs.quantize(net, abits=4, act_signed="auto", skip=None, calibration=x)
    signed = {name: layer.input_grid.signed for name, layer in net.named_modules() if hasattr(layer, "input_grid")}
    assert signed == {"stem": True, "body.0": False, "body.3": False, "body.5": False, "head": True}


# --- Both executions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYERS)
def test_expanded_and_folded_agree(name: str, case: str) -> None:
    """With weight splits in the same layer; a few float32 roundings of the largest output apart."""
    layer, x = make(name)
    x = outlying(x).abs() if case == "unsigned" else outlying(x)
    a, b = (quantized(layer, x, abits=5, r=0.2, expand=expand, **CASES[case]) for expand in (True, False))
    ours, plain = a(x).detach(), b(x).detach()
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
    if "depthwise" not in name and case != "no splits":
        assert a.input_grid.splits == math.ceil(CASES[case]["act_r"] * a.channels["weight"])
    float_input = layer(x).detach()
    assert (float_input - plain).abs().max() < 0.5 * float_input.abs().max()


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, grouped", "transposed 2d, grouped", "conv2d, pointwise"])
@pytest.mark.parametrize("options", [STATIC, ORACLE, REPEATED])
def test_what_is_multiplied_fits_the_bits(name: str, options: dict) -> None:
    """Expanded, inputs and weights alike are integers of their k bits times one scale each."""
    layer, x = make(name)
    ours = quantized(layer, outlying(x), abits=4, wbits=5, r=0.3, **options)
    grid = ours.input_grid
    scale = oracle_parts(grid, outlying(x), ours.input_axis, ours.groups).scale if grid.oracle else None
    own, more, copied = ours.operands(outlying(x))
    for part, step, most in (
        (own, ours.input_scale if scale is None else scale, 7),
        (more, ours.input_scale if scale is None else scale, 7),
        (ours.original, ours.scale, 15),
        (copied, ours.scale, 15),
    ):
        units = (part.detach() / step).double()
        assert (units - units.round()).abs().max() < 1e-4
        assert units.abs().max() <= most + 1e-4
    copies = ours.splits + grid.splits * ours.groups  # at least: a channel split in both has one more
    assert more.shape[ours.input_axis] >= copies


def test_groups_have_parts_of_their_own() -> None:
    """Oracle OCS halves one channel of the second group again and again, and those of the others once or not at all."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(12, 6, 3, groups=3), torch.randn(2, 12, 9, 9)
    x[:, 5] *= 50
    x[:, 9] *= 5
    a, b = (quantized(layer, x, abits=6, r=0.5, act_r=1.0, act_split="oracle", expand=e) for e in (True, False))
    depths = oracle_parts(a.input_grid, x, -3, 3).factor
    assert len(depths.unique()) > 2
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=1e-5 * float(b(x).detach().abs().max()))


def test_a_channel_split_in_weight_and_input_has_every_pair() -> None:
    """Two parts of the weight times two parts of the input are four channels, three of them new."""
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[:, 4] *= 20
    x = torch.randn(50, 6)
    x[:, 4] *= 20
    ours = quantized(layer, x, abits=4, wbits=4, r=0.1, act_r=0.1)
    assert ours.source.tolist() == ours.input_source.tolist() == [*range(6), 4]
    assert ours.copied.shape == (3, 3)
    assert ours.copied_index.tolist() == [4, 4, 4]
    assert ours.expanded_shape("weight") == (3, 9)


def test_the_report_counts_the_channels_of_both(net: SmallNet) -> None:
    x = torch.randn(8, 3, 8, 8)
    for expand in (True, False):
        ours = copy.deepcopy(net)
        report = ocs.quantize(ours, abits=4, wbits=5, r=0.2, act_r=0.2, calibration=x, expand=expand)
        for line in report.quantized:
            layer = ours.get_submodule(line.name)
            assert line.act_splits == len(line.act_sources) == layer.input_grid.splits * layer.groups
            assert line.shape[1] + (line.splits + line.act_splits) / layer.groups <= line.expanded_shape[1]
            if expand and layer.copied is not None:
                running = layer.original.shape[1] + layer.copied.shape[1]
                assert line.expanded_shape == (*line.shape[:1], running, *line.shape[2:])
        assert report.relative_size > 1.35


def test_a_wide_layer_takes_no_square_of_its_width() -> None:
    source = torch.cat([torch.arange(30_000), torch.arange(300)])
    splits = torch.cat([torch.arange(30_000), torch.arange(100, 400)])
    parts = static_parts(InputGrid(bits=4, splits=300), torch.tensor(1.0), splits, 1)
    channels = copied_channels(source, parts, 1, 30_000)
    assert channels.column.shape[1] == copies_needed(source, splits, 1, 30_000) == 300 + 300 + 200


def test_oracle_depends_on_the_batch_and_static_does_not() -> None:
    layer, x = make("linear")
    static, oracle = (quantized(layer, x, abits=4, **options) for options in (STATIC, ORACLE))
    both = torch.cat([x, 10 * x])
    torch.testing.assert_close(static(both)[: len(x)], static(x))  # sums of a product may depend on its size
    assert not torch.allclose(oracle(both)[: len(x)], oracle(x))
    assert torch.allclose(oracle(10 * x) - layer.bias, 10 * (oracle(x) - layer.bias), rtol=1e-4, atol=1e-4)


def test_oracle_needs_no_calibration(net: SmallNet) -> None:
    report = ocs.quantize(net, abits=4, **ORACLE)
    assert torch.isfinite(net(torch.randn(2, 3, 8, 8))).all()
    assert report.quantized[0].act_threshold is None
    with pytest.raises(ValueError, match="needs calibration"):
        ocs.quantize(SmallNet(), abits=4, act_signed="auto", **ORACLE)


# --- Which layers -----------------------------------------------------------------------------------------------------


def test_every_kind_of_layer() -> None:
    """Recurrent layers keep float inputs unless asked; attention has them quantized, its output projection not."""
    torch.manual_seed(0)
    model = Everything().eval()
    inputs = model.inputs()
    report = ocs.quantize(copy.deepcopy(model), abits=8, act_r=0.1, calibration=lambda m: m(*inputs))
    lines = {line.label: line for line in report.quantized}
    assert {name for name, line in lines.items() if line.act_bits} == {
        *(f"net.body.{i}" for i in (0, 3, 5)), "net.head", "up", "attention.in_proj_weight",
    }  # fmt: skip
    assert "input stays float: name it in overrides" in lines["lstm.weight_ih_l0"].reason
    assert "input stays float" in lines["attention.out_proj"].reason
    assert "input not split" in lines["attention.in_proj_weight"].reason
    assert lines["net.body.5"].reason == "depthwise: not split"
    ours = copy.deepcopy(model)
    overrides = {"lstm": {"abits": 6}, "cell": {"abits": 5}, "net.head": {"abits": None}}
    ocs.quantize(ours, abits=8, act_clip="mse", overrides=overrides, calibration=lambda m: m(*inputs))
    assert [ours.lstm.input_grid.bits, ours.cell.input_grid.bits, ours.net.head.input_grid] == [6, 5, None]
    plain = folded_twin(model, ours)
    words = inputs[1]
    for name, rest in (("lstm", ()), ("cell", ())):
        layer = getattr(ours, name)
        seen = words if name == "lstm" else words[0]
        on_grid = functional.fake_quantize(seen, layer.input_scale, layer.input_grid.bits)
        expected = getattr(plain, name)(on_grid, *rest)
        torch.testing.assert_close(layer(seen), expected, rtol=1e-4, atol=1e-5)
    query = torch.randn(4, 2, 12)
    grid, scale = ours.attention.input_grid, ours.attention.input_scale
    on_grid = functional.fake_quantize(query, scale, grid.bits)
    attended = ours.attention(query, query, query)[0]
    torch.testing.assert_close(attended, plain.attention(on_grid, on_grid, on_grid)[0], rtol=1e-4, atol=1e-5)
    packed = nn.utils.rnn.pack_padded_sequence(words, [5, 3])
    torch.testing.assert_close(ours.lstm(packed)[0].data, plain.lstm(nn.utils.rnn.pack_padded_sequence(
        functional.fake_quantize(words, ours.lstm.input_scale, 6), [5, 3]))[0].data, rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abits": 9}, "abits=9: use an integer from 2 to 8"),
        ({"abits": 4.0}, "abits=4.0: use an integer"),
        ({"abits": 4, "act_clip": "auto"}, 'act_clip=\'auto\': use "none", "mse"'),
        ({"abits": 4, "act_r": 1.5}, "act_r=1.5: use a number from 0"),
        ({"abits": 4, "act_split": "dynamic"}, "act_split='dynamic': use 'static' or 'oracle'"),
        ({"abits": 4, "act_signed": False}, 'act_signed=False: use True, or "auto"'),
        ({"act_r": 0.1}, "an act_ option without abits has no effect"),
        ({"act_clip": "mse"}, "an act_ option without abits has no effect"),
        ({"abits": 4, "fold_bn": "no"}, "fold_bn='no': use True or False"),
        ({"abits": None}, "calibration= has no effect on these options: add"),
    ],
)
def test_bad_options(net: SmallNet, options: dict, message: str) -> None:
    before = state(net)
    with pytest.raises(ValueError, match=message):
        ocs.quantize(net, calibration=torch.randn(2, 3, 8, 8), **options)
    assert_unchanged(net, before)


def test_a_nested_input_is_one_clear_error(net: SmallNet) -> None:
    ocs.quantize(net, abits=4, calibration=torch.randn(2, 3, 8, 8))
    words = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged)
    with pytest.raises(RuntimeError, match="a quantized layer input cannot be a nested tensor: pad it"):
        net.head(words)


def test_attributes_that_are_called_like_ours() -> None:
    layer = nn.Linear(4, 3)
    layer.input_grid, layer.input_scale = "mine", 3.0
    ours = quantized(layer, torch.randn(5, 4), abits=8)
    assert ours.input_grid == InputGrid(bits=8)
    assert quantize_only_weights(layer).input_grid is None


def quantize_only_weights(layer: nn.Module) -> nn.Module:
    net = nn.Sequential(layer)
    ocs.quantize(net)
    return net[0]


def test_functional_gradients(net: SmallNet) -> None:
    ocs.quantize(net, abits=4, calibration=torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    gradient = torch.func.grad(lambda x: net(x).sum())(x)
    x.requires_grad_(True)
    net(x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)


def test_a_calibration_of_another_model(net: SmallNet) -> None:
    calibration = ocs.calibrate(net, torch.randn(2, 3, 8, 8))
    calibration["head"] = ocs.calibrate(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))["0"]
    with pytest.raises(ValueError, match="head: calibration saw 4 input channels, this layer has 16"):
        ocs.quantize(net, abits=4, act_r=0.1, calibration=calibration)


@pytest.mark.parametrize("reason", ["Inf in a weight", "NaN in a batch", "a batch that fails"])
def test_all_or_nothing(net: SmallNet, reason: str) -> None:
    """With batch norms about to be folded, in train mode."""
    net.train()
    x = torch.randn(4, 3, 8, 8)
    if reason == "Inf in a weight":
        net.head.weight.data[0, 0] = torch.inf
    elif reason == "NaN in a batch":
        x[0] = torch.nan
    else:
        x = x[:, :2]
    before, flags = state(net), [module.training for module in net.modules()]
    with pytest.raises(ValueError, match=r"its input|holds NaN or Inf"):
        ocs.quantize(net, wbits=4, abits=4, fold_bn=True, calibration=[x])
    assert_unchanged(net, before)
    assert [module.training for module in net.modules()] == flags


def test_parts_of_nothing() -> None:
    x = torch.randn(0, 5)
    grid = InputGrid(bits=4)
    assert round_folded(x, grid, InputParts(torch.tensor(1.0)), -1).shape == (0, 5)
    assert oracle_parts(grid, torch.zeros(2, 5), -1, 1).scale == 1
