"""Which channels of inputs are split: the rules literally, the threshold after them, and what the report says."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SmallNet
from torch import Tensor, nn

import ocs
from ocs import functional
from ocs.calibration.statistics import Statistics
from ocs.kernels import reference
from ocs.kernels.constants import OCTAVE_BINS
from ocs.nn.input import InputGrid
from ocs.nn.weights import Weight, weights_of
from ocs.plan.input_splits import choose_input_splits


def outlying(channels: int, seed: int = 0) -> Tensor:
    """Inputs [400, C] whose channels differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(400, channels, generator=generator) * torch.randn(channels, generator=generator).mul(1.5).exp()


def statistics_of(x: Tensor) -> Statistics:
    """What calibration keeps of x [N, C]."""
    seen = Statistics(-1, x.shape[1])
    seen.update(x)
    return seen


def weight_of(channels: int, groups: int = 1, *, kernel: tuple[int, ...] = ()) -> Weight:
    """A weight whose columns differ in size."""
    generator = torch.Generator().manual_seed(9)
    C = channels // groups
    w = torch.randn(2 * groups, C, *kernel, generator=generator)
    scale = torch.rand(C, generator=generator) * 4
    return Weight("weight", w * scale.view(-1, *[1] * len(kernel)), groups)


# --- The rules, literally ---------------------------------------------------------------------------------------------


def literal_copies(x: np.ndarray, splits: int) -> list[int]:
    """As the paper does with weights: find the largest |x| of all, halve its channel, repeat."""
    picks = reference.pick_channels(x, splits)
    return reference.split_channels(x, picks, False)[1][x.shape[1] :].tolist()


@pytest.mark.parametrize("groups", [1, 3])
def test_max_splits_the_channel_with_the_largest_value_again_and_again(groups: int) -> None:
    x = outlying(12)
    C, splits, copies = 12 // groups, 12 // groups, []
    for g in range(groups):
        copies += [g * C + c for c in literal_copies(x[:, g * C : (g + 1) * C].numpy(), splits)]
    assert len(set(copies)) < len(copies)
    for clip in ("none", "mse"):
        grid = InputGrid(4, splits=splits, clip=clip)
        chosen = choose_input_splits(statistics_of(x), grid, "max", weight_of(12, groups))
        assert chosen.flatten().tolist() == copies


@pytest.mark.parametrize("groups", [1, 3])
def test_max_with_equal_parts_splits_what_has_the_largest_of_them(groups: int) -> None:
    x, chosen = outlying(12, seed=2), []
    largest, parts = x.abs().amax(0).view(groups, -1), torch.ones(groups, 12 // groups)
    for g in range(groups):
        for _ in range(12 // groups):
            c = int((largest[g] / parts[g]).argmax())
            parts[g, c] += 1
            chosen.append(g * 12 // groups + c)
    grid = InputGrid(4, splits=12 // groups, split="even")
    ours = choose_input_splits(statistics_of(x), grid, "max", weight_of(12, groups)).flatten()
    assert ours.tolist() == chosen
    by_halves = choose_input_splits(statistics_of(x), replace(grid, split="qa"), "max", weight_of(12, groups)).flatten()
    assert (by_halves.tolist() != chosen) or groups > 1


def test_percentile_splits_each_channel_once() -> None:
    x, grid = outlying(12), InputGrid(4, splits=4)
    beyond = (x.abs() > x.abs().quantile(0.99)).sum(0)
    chosen = choose_input_splits(statistics_of(x), grid, "percentile", weight_of(12)).flatten().tolist()
    assert chosen[0] == int(beyond.argmax())
    assert len(set(chosen)) == 4


def literal_error(x: np.ndarray, counts: np.ndarray, sizes: list[float], threshold: float, grid: InputGrid) -> float:
    """What one channel adds: values x of counts, cut into parts of these sizes, rounded with this threshold."""
    step, total = threshold / grid.qmax, 0.0
    steps = 1 if grid.split != "naive" else sum(sizes.count(size) ** 2 for size in set(sizes))
    for value, count in zip(x, counts, strict=True):
        lost = sum(max(value * size - threshold, 0.0) for size in sizes)
        total += count * (min(value**2, steps * step**2 / 12) + lost**2)
    return total


def literal_by_error(seen: Statistics, grid: InputGrid, w: np.ndarray) -> list[int]:
    """The definition in ocs.plan.input_splits, in loops."""
    at = np.arange(OCTAVE_BINS)
    x = np.where(at, 2.0 ** (at // 8 - 16) * (1 + (at % 8 + 0.5) / 8), 0)
    edges = 2.0 ** ((at + 1) // 8 - 16) * (1 + (at + 1) % 8 / 8)
    power = (w.astype(np.float64) ** 2).reshape(*w.shape[:2], -1).sum((0, 2))
    counts, best = seen.octaves.numpy(), (np.inf, [])
    for threshold in edges[-80:]:
        sizes = [[1.0] for _ in power]

        def error(c: int, sizes: list[float], threshold: float = threshold) -> float:
            return power[c] * literal_error(x, counts[c], sizes, threshold, grid)

        def halved(sizes: list[float]) -> list[float]:
            if grid.split == "even":
                return [1 / (len(sizes) + 1)] * (len(sizes) + 1)
            return sorted(sizes)[:-1] + [max(sizes) / 2] * 2

        gains = [error(c, sizes[c]) - error(c, halved(sizes[c])) for c in range(len(power))]
        copies, left = [], sum(error(c, sizes[c]) for c in range(len(power)))
        for _ in range(grid.splits):
            largest = [float(seen.channel_max[c]) * max(sizes[c]) for c in range(len(power))]
            most = max(gains)
            near = [c for c in range(len(power)) if np.isclose(gains[c], most, rtol=1e-9, atol=0)]
            c = max(near, key=lambda c: (largest[c], -c))
            copies.append(c)
            left -= gains[c]
            sizes[c] = halved(sizes[c])
            gains[c] = error(c, sizes[c]) - error(c, halved(sizes[c]))
        best = min(best, (left, copies), key=lambda found: found[0])
    return best[1]


@pytest.mark.parametrize("split", ["qa", "naive", "even"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kernel", [(), (3,)])
def test_error_splits_what_lowers_the_estimate_most(split: str, signed: bool, kernel: tuple[int, ...]) -> None:
    x = outlying(6, seed=3)
    seen = statistics_of(x if signed else x.abs())
    grid, weight = InputGrid(3, signed, 4, split, clip="mse"), weight_of(6, kernel=kernel)
    chosen = choose_input_splits(seen, grid, "error", weight).flatten().tolist()
    assert chosen == literal_by_error(seen, grid, weight.tensor.numpy())


def test_error_looks_at_the_weights() -> None:
    """Of two channels with outliers the one that meets nothing is left alone."""
    x = torch.randn(400, 8)
    x[:, 2] *= 20
    x[:, 5] *= 25
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight[:, 5] *= 1e-4
    (weight,) = weights_of(layer)
    grid = InputGrid(4, splits=2, clip="mse")
    chosen = {s: choose_input_splits(statistics_of(x), grid, s, weight).flatten().tolist() for s in ("max", "error")}
    assert 5 in chosen["max"]
    assert chosen["error"] == [2, 2]


def test_of_equal_gains_the_largest_part_is_halved() -> None:
    """At half the threshold each channel, of one bin, is to be split once; the split that is left helps nobody."""
    x = torch.tensor([0.95, 0.97, 0.99]).expand(50, 3)
    weight = Weight("weight", torch.ones(2, 3), 1)
    chosen = choose_input_splits(statistics_of(x), InputGrid(3, splits=3, clip="mse"), "error", weight)
    assert chosen.tolist() == [[2, 1, 0]]


def test_error_by_groups() -> None:
    """One threshold for all, and the splits of each group its own."""
    x = outlying(12, seed=1)
    weight = weight_of(12, 3, kernel=(3, 3))
    chosen = choose_input_splits(statistics_of(x), InputGrid(4, splits=4, clip="mse"), "error", weight)
    assert torch.equal(chosen // 4, torch.arange(3)[:, None].expand(3, 4))
    assert len(chosen.unique()) < 12


@pytest.mark.parametrize("clip", ["none", 0.6])
def test_where_the_maximum_gives_the_threshold_error_is_max(clip: str | float) -> None:
    seen, grid = statistics_of(outlying(12)), InputGrid(4, splits=5, clip=clip)
    by_max, by_error = (choose_input_splits(seen, grid, select, weight_of(12)) for select in ("max", "error"))
    assert torch.equal(by_max, by_error)


@pytest.mark.parametrize("select", ["percentile", "max", "error"])
def test_nothing_but_zeros(select: str) -> None:
    seen, grid = statistics_of(torch.zeros(9, 6)), InputGrid(4, splits=3, clip="mse")
    chosen = choose_input_splits(seen, grid, select, weight_of(6)).flatten()
    assert chosen.shape == (3,)
    assert seen.threshold(4, "mse", True, chosen) == 0


# --- The threshold comes after the splits -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["none", 0.7, "mse", "aciq", "kl", "percentile"])
def test_thresholds_are_those_of_the_split_values(clip: str | float) -> None:
    x = outlying(12, seed=4)
    seen, splits = statistics_of(x), 9
    picks = reference.pick_channels(x.numpy(), splits)
    halved, source = reference.split_channels(x.numpy(), picks, False)
    copies = torch.from_numpy(source[12:])
    assert int(copies.bincount().max()) > 2
    expected = functional.clip_threshold(halved, 5, clip)
    tolerance = {"none": 1e-6, 0.7: 1e-6, "kl": 0.1}.get(clip, 0.01)  # kl looks at bins, of which ours are others
    assert seen.threshold(5, clip, True, copies) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("clip", ["none", 0.7, "mse", "aciq", "kl", "percentile"])
def test_thresholds_of_equal_parts(clip: str | float) -> None:
    x, copies = outlying(12, seed=4), torch.tensor([1, 1, 1, 1, 1, 7, 7, 3])
    parts = [x[:, 1] / 6] * 6 + [x[:, 7] / 3] * 3 + [x[:, 3] / 2] * 2
    values = torch.stack(parts + [x[:, c] for c in range(12) if c not in (1, 3, 7)])
    expected = functional.clip_threshold(values, 5, clip)
    tolerance = {"none": 1e-6, 0.7: 1e-6, "kl": 0.1}.get(clip, 0.015)
    assert statistics_of(x).threshold(5, clip, True, copies, "even") == pytest.approx(expected, rel=tolerance)


def test_split_counts_are_those_of_the_split_values() -> None:
    x = outlying(12, seed=4)
    seen = statistics_of(x)
    copies = torch.tensor([1, 1, 1, 1, 1, 7, 7, 3])
    parts = [x[:, 1] / 8] * 4 + [x[:, 1] / 4] * 2 + [x[:, 7] / 4] * 2 + [x[:, 7] / 2] + [x[:, 3] / 2] * 2
    rest = [x[:, c] for c in range(12) if c not in (1, 3, 7)]
    expected = torch.stack(parts + rest).abs()
    for zoom in (0, 1):
        ours = seen.split_counts(copies, zoom)
        assert int(ours.sum()) == pytest.approx(expected.numel(), rel=0.005)
        for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3):  # bins of channels are an eighth of an octave wide
            below = int(ours[: round(2**zoom * share * len(ours))].sum())
            assert below == pytest.approx(int((expected < share * seen.limit).sum()), rel=0.03)
    assert torch.equal(seen.split_counts(torch.tensor([], dtype=torch.int64)), seen.counts)


# --- quantize() -------------------------------------------------------------------------------------------------------


def outputs_error(select: str, x: Tensor, layer: nn.Linear, **options: object) -> float:
    net = nn.Sequential(copy.deepcopy(layer))
    ocs.quantize(net, wbits=8, act_select=select, calibration=[x], **options)
    return float((net(x) - layer(x)).detach().square().mean())


def test_repeated_splits_leave_less_error_where_channels_differ() -> None:
    """One channel of 50 times the others: halving it once is not enough."""
    torch.manual_seed(0)
    x, layer = torch.randn(400, 40), nn.Linear(40, 20)
    x[:, 3] *= 50
    for bits in (6, 8):
        once, again = (outputs_error(s, x, layer, abits=bits, act_r=0.1) for s in ("percentile", "max"))
        assert again < 0.3 * once
        once, again, error = (
            outputs_error(s, x, layer, abits=bits, act_r=0.1, act_clip="mse") for s in ("percentile", "max", "error")
        )
        assert max(again, error) < 0.8 * once


def test_the_report_counts_repeated_splits(net: SmallNet) -> None:
    x = torch.randn(8, 3, 8, 8)
    x[:, 1] *= 40
    report = ocs.quantize(net, abits=4, act_r=1.0, act_select="max", skip=None, calibration=x)
    (line,) = (line for line in report.quantized if line.name == "stem")
    assert line.act_sources == (1, 1, 1)
    assert line.act_splits == 3
    assert line.expanded_shape == (8, 6, 3, 3)
    assert report.settings["act_select"] == "max"
    assert net.stem.settings["act_select"] == "max"
    plain = ocs.quantize(SmallNet().eval(), abits=4, act_r=1.0, skip=None, calibration=x)
    assert report.packed_bytes == plain.packed_bytes  # a copy is one number, whichever channel it is of


@pytest.mark.parametrize(
    "options",
    [
        {"abits": 4},
        {"abits": 4, "act_r": 0.1, "act_split": "oracle"},
        {"abits": 4, "overrides": {"head": {"act_split": "oracle", "act_r": 0.1}}},
    ],
)
def test_a_rule_without_splits_has_no_effect(net: SmallNet, options: dict) -> None:
    with pytest.raises(ValueError, match="act_select='max' has no effect: it is for act_r with act_split='static'"):
        ocs.quantize(net, act_select="max", calibration=torch.randn(4, 3, 8, 8), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abits": 4, "act_r": 0.1, "act_select": "most"}, "act_select='most': use 'percentile' or 'max' or 'error'"),
        ({"act_select": "max"}, "an act_ option without abits has no effect"),
    ],
)
def test_what_cannot_be_is_refused(net: SmallNet, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ocs.quantize(net, calibration=torch.randn(4, 3, 8, 8), **options)


def test_an_override_names_a_rule_of_its_own(net: SmallNet) -> None:
    x = torch.randn(8, 3, 8, 8)
    x[:, 1] *= 40
    ocs.quantize(
        net, abits=4, act_r=1.0, overrides={"stem": {"act_select": "max"}, "head": {"act_r": 0.0}}, skip=None,
        calibration=x,
    )  # fmt: skip
    assert net.stem.input_source.tolist() == [0, 1, 2, 1, 1, 1]
    assert net.body[0].input_copies().unique().numel() == 8


def test_a_saved_calibration_serves_every_rule(net: SmallNet) -> None:
    """Nothing is measured for them beyond what calibration has always kept of channels."""
    x = torch.randn(8, 3, 8, 8)
    calibration = ocs.calibrate(net, x)
    assert set(vars(calibration["head"])) == {
        "axis", "channels", "inputs", "rows", "sums", "zeros", "largest", "smallest", "highest", "limit", "counts",
        "negative", "octaves", "channel_max",
    }  # fmt: skip
    for select in ("percentile", "max", "error"):
        options = {"abits": 4, "act_r": 0.3, "act_select": select, "act_clip": "mse"}
        ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
        ocs.quantize(ours, calibration=calibration, **options)
        ocs.quantize(theirs, calibration=x, **options)
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key
