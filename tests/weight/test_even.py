"""split="even": a channel split n - 1 times becomes n equal parts, in everything that splits weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Everything, SmallNet, outlier_weight
from test_selection import greedy, kinds
from torch import Tensor, nn

import ocs
from ocs import functional
from ocs.kernels import reference
from ocs.model.targets import find_targets
from ocs.nn.input import InputGrid
from ocs.nn.input_parts import oracle_parts, round_folded, static_parts
from ocs.plan.input_facts import InputFacts
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import LayerOptions
from ocs.plan.quantize_layer import LayerQuantizer
from ocs.weight import plan as plans
from ocs.weight import selection as select

SPLITS = ("qa", "even")
CLIPS = ("none", "auto", 0.6, *functional.CLIP_METHODS)


def one_outlier(shape: tuple[int, ...], times: float = 9) -> np.ndarray:
    """A weight whose channel 1 wants to be split more than once."""
    w = outlier_weight(shape)
    w[:, 1] *= times * np.abs(w).max() / np.abs(w[:, 1]).max()
    return w


# --- Plans ------------------------------------------------------------------------------------------------------------


def test_plans_by_hand() -> None:
    """Thirds where halving leaves a half and two quarters; depth is what it was of halves."""
    w = np.float32([[1, 6], [-2, 3]])
    even, halves = (functional.plan_splits(w, 1.0, split=split) for split in ("even", "qa"))
    assert even.source.tolist() == halves.source.tolist() == [0, 1, 1, 1]
    assert even.parts.tolist() == [1, 3, 3, 3]
    assert halves.parts.tolist() == [1, 4, 2, 4]
    assert even.depth.tolist() == [0, 1, 1, 1]
    assert halves.depth.tolist() == [0, 2, 1, 2]
    assert even.offset.tolist() == [0, 0, 1, 2]
    assert even.split_max.tolist() == [2, 2, 2, 2]
    assert halves.split_max.tolist() == [2, 1.5, 3, 1.5]


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="into more than 4194304 parts"):
        plans.even_parts(np.ones(1, np.float32), np.zeros(2**22 + 1, np.int64))
    with pytest.raises(ValueError, match="split='odd': use 'qa' or 'naive' or 'even'"):
        functional.plan_channels(np.ones((2, 2), np.float32), [0], split="odd")


# --- Integers ---------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("rounding", ["nearest", "squant", "gptq"])
def test_with_every_rounding_and_clip_method(
    kind: Callable, rounding: str, clip: str | float, granularity: str
) -> None:
    """The parts are those of a whole number each, and of that to which w rounds where nothing is clipped."""
    w = one_outlier((6, 12, 3))
    moments = {}
    if rounding == "gptq":
        x = np.random.default_rng(0).standard_normal((100, 36))
        moments = {"moments": kind(x.T @ x)}
    q = functional.quantize_weight(kind(w), 4, 0.4, clip, granularity, "even", rounding, **moments)
    ints, scale = np.asarray(q.ints).astype(np.int64), np.asarray(q.scale).reshape(-1, 1, 1)
    assert np.abs(ints).max() <= 7
    source = np.asarray(q.source)
    parts = np.bincount(source)
    assert parts.max() == 6
    for c in range(12):
        own = ints[:, source == c]
        saturated = (np.abs(own) == 7).any(1)
        expected = (own.sum(1)[:, None] + np.arange(parts[c])[:, None]) // parts[c]
        assert (own == expected)[np.broadcast_to(~saturated[:, None], own.shape)].all()
    if clip == "none" and rounding == "nearest":
        folded = np.asarray(functional.fold(q, 12))
        whole = reference.round_half_up((w / scale).astype(np.float32).astype(np.float64))
        np.testing.assert_array_equal(folded, whole.astype(np.float32) * scale + np.float32(0))


def test_split_once_it_is_quantization_aware() -> None:
    w = outlier_weight((8, 40, 3))
    for r in (0.0, 0.025, 0.05):
        for rounding in ("nearest", "squant"):
            for clip in ("none", "mse", "aciq-release"):
                one, other = (functional.quantize_weight(w, 4, r, clip, "channel", s, rounding) for s in SPLITS)
                for a, b in zip(one, other, strict=True):
                    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_split_more_often_it_leaves_less(granularity: str) -> None:
    """Two splits of an outlier twice as large as the rest and more: a third instead of a half."""
    w = one_outlier((16, 20, 3))
    halves, even = (functional.quantize_weight(w, 4, 0.1, granularity=granularity, split=s) for s in SPLITS)
    np.testing.assert_allclose(np.divide(even.threshold, halves.threshold).min(), 2 / 3, rtol=1e-6)
    assert functional.weight_error(w, even)[1] < functional.weight_error(w, halves)[1]


# --- Which channels ---------------------------------------------------------------------------------------------------


def parts_of(picks: list[int], channels: int) -> np.ndarray:
    return 1 + np.bincount(np.array(picks, int), minlength=channels)


def test_saturation_of_equal_parts_is_lowered_greedily() -> None:
    w = np.abs(outlier_weight((4, 6, 3))).astype(np.float64)
    thresholds = np.array([0.5, 0.3, 1.0, 0.7])

    def saturation(picks: list[int]) -> float:
        n = parts_of(picks, 6)[:, None]
        return float(((n * np.maximum(w / n - thresholds[:, None, None], 0)) ** 2).sum())

    assert select.lowering_saturation(w, thresholds, 9, "even") == greedy(saturation, 6, 9)
    assert select.lowering_saturation(np.array([[[1.0], [9.0], [3.5]]]), np.array(9.0), 4, "even") == [1, 1, 2, 1]


def test_thresholds_of_equal_parts_are_lowered_greedily() -> None:
    """Each split counts at once; one of halves would need two to lower a half."""
    largest = np.abs(outlier_weight((5, 8))).astype(np.float64)

    def squares(picks: list[int]) -> float:
        return float(((largest / parts_of(picks, 8)).max(1) ** 2).sum())

    assert select.lowering_thresholds(largest, 6, "even") == greedy(squares, 8, 6)
    assert select.lowering_thresholds(np.array([[64.0, 1.0], [1.0, 35.0]]), 3, "even") == [0, 1, 0]
    assert select.lowering_thresholds(np.array([[64.0, 1.0], [1.0, 10.0]]), 3, "even") == [0, 0, 0]
    assert select.lowering_thresholds(np.zeros((2, 3)), 3, "even") == [0, 0, 0]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_select_goes_with_it(granularity: str, clip: str) -> None:
    how = {"clip": clip, "granularity": granularity, "split": "even"}
    better = 0
    for seed in range(6):
        w = outlier_weight((16, 24, 9), seed)
        by_error, by_max = (functional.quantize_weight(w, 3, 0.3, select=s, **how) for s in ("error", "max"))
        noise = [functional.weight_error(w, q)[1] for q in (by_error, by_max)]
        assert noise[0] <= noise[1]
        better += noise[0] < noise[1]
    assert (better == 0) if (granularity, clip) == ("tensor", "none") else better >= 1
    mine = functional.plan_splits(w, 0.1, select=lambda w, n: [5, 2, 5], **how)
    assert mine.parts.tolist() == [1 + 2 * (c == 5) + (c == 2) for c in range(24)] + [3, 2, 3]


# --- Models -----------------------------------------------------------------------------------------------------------


def outputs(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*Everything.inputs())


def everything() -> nn.Module:
    torch.manual_seed(0)
    return Everything().eval()


@pytest.mark.parametrize("rounding", ["nearest", "squant"])
def test_layers_expanded_and_folded_agree(rounding: str) -> None:
    """Every kind of layer, with channels that are split into thirds and more."""
    models = [everything(), everything()]
    for model, expand in zip(models, (True, False), strict=True):
        report = ocs.quantize(model, wbits=5, r=0.5, split="even", rounding=rounding, expand=expand)
        assert report.settings["split"] == "even"
    sources = [tensor for name, tensor in models[0].state_dict().items() if "source" in name and tensor.numel()]
    assert len(sources) > 6
    assert any(source.bincount().max() > 2 for source in sources)
    for ours, theirs in zip(*map(outputs, models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_files_keep_it(tmp_path: Path) -> None:
    model = everything()
    ocs.quantize(model, wbits=5, r=0.5, split="even")
    ocs.save(model, tmp_path / "model.safetensors")
    again = everything()
    ocs.load(tmp_path / "model.safetensors", again)
    assert again.net.head.settings["split"] == "even"
    for ours, theirs in zip(outputs(model), outputs(again), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "how",
    [
        {"allocate": "knapsack"},
        {"allocate": "error", "select": "error", "granularity": "channel"},
        {"wbits": "auto", "budget": 4500, "clip": "auto"},
        {"recipe": "best"},
    ],
    ids=str,
)
def test_what_decides_over_splits_takes_it(net: SmallNet, how: dict) -> None:
    with torch.no_grad():
        net.body[0].weight[:, 3] *= 9
    halves, even = (ocs.quantize(copy.deepcopy(net), **{"wbits": 4, "r": 0.4, "split": s, **how}) for s in SPLITS)
    uniform = ocs.quantize(copy.deepcopy(net), wbits=4, r=0.4, granularity=how.get("granularity"), split="even")
    if "recipe" not in how:
        assert even.packed_bytes <= how.get("budget", uniform.packed_bytes)
    assert even.mean_sqnr_db > halves.mean_sqnr_db


def test_a_knapsack_of_splits_goes_by_the_range_of_equal_parts(net: SmallNet) -> None:
    with torch.no_grad():
        net.body[0].weight[:, 3] *= 100
    target = next(each for each in find_targets(net) if each.name == "body.0")
    found = {}
    for split in SPLITS:
        options = LayerOptions(wbits=4, r=0.25, split=split)
        found[split] = (
            LayerQuantizer(LayerPlan(target, options), InputFacts()).measure("weight", options, 2).range_ratio
        )
    assert found == {"qa": 0.5, "even": pytest.approx(1 / 3, rel=1e-6)}


def test_the_report_says_what_it_did(net: SmallNet) -> None:
    with torch.no_grad():
        net.body[0].weight[:, 3] *= 9
    report = ocs.quantize(net, wbits=4, r=0.4, split="even", rounding="squant", clip="mse", explain=True)
    steps = report.quantized[0].steps
    assert [what for what, _ in steps] == ["nearest", "OCS", "even", "squant", "clip mse"]
    assert steps[2][1] > steps[1][1]


# --- Inputs -----------------------------------------------------------------------------------------------------------


def literal_input(x: np.ndarray, scale: np.float32, picks: list[int], grid: InputGrid) -> np.ndarray:
    """What a layer computes with: the rounded equal parts of each channel of x [N, C], added up."""
    low, high = reference.grid(grid.bits, grid.signed)
    n = parts_of(picks, x.shape[1])
    u, total = (x / scale).astype(np.float64), np.zeros(x.shape)
    for c, k in np.argwhere(np.arange(n.max()) < n[:, None]):
        total[:, c] += np.clip(np.rint((u[:, c] + k + 0.5) / n[c] - 0.5), low, high)
    return (total * scale).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("oracle", [True, False])
def test_inputs_in_equal_parts(oracle: bool, signed: bool) -> None:
    x = np.random.default_rng(0).standard_normal((60, 10)).astype(np.float32) * np.float32([1, 40, *[1] * 7, 9])
    x = x if signed else np.abs(x)
    grid = InputGrid(5, signed, 6, "even", "oracle" if oracle else "static")
    picks = [1, 1, 1, 1, 9, 1]
    largest = np.abs(x).max(0)
    scale = np.float32((largest / np.float32(parts_of(picks, 10))).max()) / np.float32(grid.qmax)
    if oracle:
        parts = oracle_parts(grid, torch.from_numpy(x), -1, 1)
        assert float(parts.scale) == pytest.approx(scale, rel=1e-6)
        scale = np.float32(parts.scale)
    else:
        source = torch.tensor([*range(10), *picks])
        parts = static_parts(grid, torch.tensor(scale), source, 1)
    ours = round_folded(torch.from_numpy(x), grid, parts, -1)
    np.testing.assert_allclose(ours, literal_input(x, scale, picks, grid), atol=1e-5)


def test_equal_parts_of_inputs_round_as_if_nothing_were_split() -> None:
    """Hermite's identity off ties: three parts hold what three times the grid does."""
    u = torch.linspace(-21.03, 21.03, 4001)[:, None].expand(-1, 2)
    grid, source = InputGrid(bits=4, splits=2, split="even"), torch.tensor([0, 1, 1, 1])
    ours = round_folded(u, grid, static_parts(grid, torch.tensor(1.0), source, 1), -1)
    assert torch.equal(ours[:, 1], torch.round(u[:, 1]))


@pytest.mark.parametrize("expand", [True, False])
def test_channels_of_inputs_split_once_are_halved_as_with_qa(net: SmallNet, expand: bool) -> None:
    x, found = torch.randn(4, 3, 8, 8), []
    for split in SPLITS:
        model = copy.deepcopy(net)
        ocs.quantize(model, wbits=5, abits=5, act_r=0.3, split=split, calibration=[x], expand=expand)
        found.append((model(x), model.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    for (name, ours), theirs in zip(found[0][1].items(), found[1][1].values(), strict=True):
        assert torch.equal(ours, theirs) or name.endswith("input_form")  # which says how channels are split


@pytest.mark.parametrize("select", ["max", "error"])
def test_inputs_in_equal_parts_are_less_off(select: str, tmp_path: Path) -> None:
    """One channel of 50 times the others, split twice: thirds instead of a half; files keep it, folded ones agree."""
    torch.manual_seed(0)
    x, layer = torch.randn(400, 40), nn.Linear(40, 20)
    x[:, 3] *= 50
    off = {}
    for split in SPLITS:
        nets = [nn.Sequential(copy.deepcopy(layer)) for _ in range(3)]
        how = {"wbits": 8, "abits": 6, "act_r": 0.05, "act_select": select, "split": split, "calibration": [x]}
        for model, expand in zip(nets, (True, False), strict=False):
            ocs.quantize(model, expand=expand, **how)
        torch.testing.assert_close(nets[0](x), nets[1](x))
        ocs.save(nets[0], tmp_path / split)
        ocs.load(tmp_path / split, nets[2])
        assert torch.equal(nets[0](x), nets[2](x))
        torch.testing.assert_close(ocs.lower(copy.deepcopy(nets[0]))(x), nets[0](x))
        off[split] = float((nets[0](x) - layer(x)).detach().square().mean())
    assert off["even"] < 0.6 * off["qa"]
