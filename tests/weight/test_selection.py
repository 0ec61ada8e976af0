"""Which channels are split: plans of any picks, the rule by remaining error, and rules of one's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, outlier_weight, state
from torch import Tensor, nn

import ocs
from ocs import functional
from ocs.kernels import reference
from ocs.weight import plan as plans
from ocs.weight import selection as select
from ocs.weight.types import Array

kinds = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def picks_of(plan: functional.SplitPlan, groups: int) -> list[int]:
    """The original channels that were split, in order."""
    return np.asarray(plan.source).reshape(groups, -1)[:, len(plan.channel_max) // groups :].ravel().tolist()


# --- Plans from picks -------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("split", ["qa", "even"])
@pytest.mark.parametrize("values", ["random", "ties", "zeros", "tiny"])
def test_picks_of_the_kernel_give_its_plan(kind: Callable, values: str, split: str) -> None:
    rng = np.random.default_rng(0)
    for groups in (1, 2, 3):
        for channels in (1, 2, 7, 40):
            w = outlier_weight((2 * groups, channels, 3), seed=channels)
            if values != "random":
                of_channel = {"ties": [1, 2, 4, 3], "zeros": [0, 0, 1], "tiny": [1e-44, 7e-45, 0]}[values]
                w[:] = np.tile(rng.choice(of_channel, (groups, 1, channels, 1)), (1, 2, 1, 1)).reshape(-1, channels, 1)
            for r in (0.0, 0.1, 0.5, 1.0):
                plan = functional.plan_splits(kind(w), r, groups, split=split)
                again = functional.plan_channels(kind(w), picks_of(plan, groups), groups, split=split)
                for ours, theirs in zip(again, plan, strict=True):
                    assert type(ours) is type(theirs)
                    assert ours.dtype == theirs.dtype
                    assert np.array_equal(ours, theirs)


def test_any_picks_fold_back_to_the_weight() -> None:
    """Quantization-aware splits of whichever channels change no integer's sum while nothing saturates."""
    w = outlier_weight((6, 5, 3))
    plan = functional.plan_channels(w, [2, 2, 4, 2, 2])
    assert plan.depth.tolist() == [0, 0, 3, 0, 1, 2, 2, 1, 2, 3]
    largest = np.float32(np.abs(w).max())
    folded = [
        functional.fold(functional.quantize_split(w, p, largest, 5), 5) for p in (plan, functional.plan_splits(w, 0))
    ]
    np.testing.assert_array_equal(*folded)


@pytest.mark.parametrize("channels", [[0, 1, 1], [1, 0], [-1, 2], [0, 5], [0, 0, 0, 0, 2, 2, 2, 2]])
def test_impossible_picks(channels: list[int]) -> None:
    with pytest.raises(ValueError, match="name at most 2 channels for each of 2 groups, the same number"):
        functional.plan_channels(outlier_weight((4, 2)), channels, groups=2)


def test_a_channel_cannot_be_split_forever() -> None:
    with pytest.raises(ValueError, match="more than 22 deep"):
        plans.halves(np.ones(1, np.float32), np.zeros(2**22 + 1, np.int64))


# --- select="error" ---------------------------------------------------------------------------------------------------


def greedy(errors: Callable[[list[int]], float], channels: int, splits: int) -> list[int]:
    """One split after the other, whichever leaves the least error, the lowest of equals."""
    picks: list[int] = []
    for _ in range(splits):
        picks.append(int(np.argmin([errors([*picks, c]) for c in range(channels)])))
    return picks


def test_saturation_is_lowered_greedily() -> None:
    w = np.abs(outlier_weight((4, 6, 3))).astype(np.float64)
    thresholds = np.array([0.5, 0.3, 1.0, 0.7])

    def saturation(picks: list[int]) -> float:
        split, source = reference.split_channels(w, split_order(picks), False)
        lost = np.maximum(split - thresholds[:, None, None], 0)
        return sum((lost[:, source == c].sum(1) ** 2).sum() for c in range(6))

    def split_order(picks: list[int]) -> list[int]:
        """The expanded channels that are halved."""
        largest, source, halved = list(w.max((0, 2))), list(range(6)), []
        for c in picks:
            own = [j for j, each in enumerate(source) if each == c]
            halved.append(max(own, key=lambda j: (largest[j], -j)))
            largest[halved[-1]] /= 2
            largest.append(largest[halved[-1]])
            source.append(c)
        return halved

    assert select.lowering_saturation(w, thresholds, 6) == greedy(saturation, 6, 6)


def test_where_nothing_saturates_the_largest_are_split() -> None:
    w = np.array([[[1.0], [4.0], [3.0]]])
    assert select.lowering_saturation(w, np.array(5.0), 3) == [1, 2, 1]
    assert select.lowering_saturation(w, np.array(3.9), 3) == [1, 2, 1]


def test_thresholds_of_many_rows_come_before_the_largest_value() -> None:
    largest = np.array([[9.0, 1.0, 8.9], [1.0, 5.0, 1.0], [1.0, 5.0, 1.0], [1.0, 5.0, 1.0], [1.0, 5.0, 1.0]])
    assert select.lowering_thresholds(largest, 2) == [1, 0]  # splitting channel 0 lowers row 0 by next to nothing
    assert select.lowering_thresholds(largest, 4)[:1] == [1]
    assert select.lowering_thresholds(np.zeros((2, 3)), 3) == [0, 0, 0]


def test_halving_again_takes_all_copies() -> None:
    """Of a channel with all the outliers: one split, then two that belong together."""
    largest = np.array([[64.0, 1.0], [64.0, 1.0]])
    assert select.lowering_thresholds(largest, 3) == [0, 0, 0]
    assert select.lowering_thresholds(largest, 2) == [0, 0]  # one left over, for the largest
    largest = np.array([[64.0, 1.0], [1.0, 25.0]])
    assert select.lowering_thresholds(largest, 3) == [0, 1, 0]  # 32^2 - 16^2 for two is less than 25^2 - 12.5^2 for one


@kinds
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("clip", ["none", "mse", 0.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_error_is_never_worse_than_max(kind: Callable, granularity: str, clip: str | float, groups: int) -> None:
    better = 0
    for seed in range(8):
        w = kind(outlier_weight((16, 24, 9), seed))
        noise = {}
        for rule in ("max", "error"):
            quantized = functional.quantize_weight(w, 3, 0.3, clip, granularity, groups=groups, select=rule)
            assert quantized.source.shape == ((24 + 8) * groups,)
            noise[rule] = functional.weight_error(w, quantized, groups)[1]
        assert noise["error"] <= noise["max"]
        better += noise["error"] < noise["max"]
    assert (better == 0) if (granularity, clip) == ("tensor", "none") else better >= 2


def test_error_is_the_same_for_numpy_and_torch() -> None:
    w = outlier_weight((8, 12, 3))
    how = (0.5, 2, "error", 3, "mse", "channel")
    plans = [functional.plan_splits(x, *how) for x in (w, torch.from_numpy(w))]
    assert all(np.array_equal(a, b) for a, b in zip(*plans, strict=True))


def test_error_under_squant_is_of_outputs() -> None:
    better = 0
    for seed in range(8):
        w, errors = outlier_weight((8, 12, 3), seed), []
        for rule in ("max", "error"):
            quantized = functional.quantize_weight(w, 3, 0.3, "none", "channel", "qa", "squant", select=rule)
            errors.append(functional.output_error(w, quantized).sum())
        assert errors[1] <= errors[0]
        better += errors[1] < errors[0]
    assert better >= 2


# --- Rules of one's own -----------------------------------------------------------------------------------------------


@kinds
def test_a_callable_sees_each_group_and_chooses(kind: Callable) -> None:
    w, seen = kind(outlier_weight((4, 6, 3))), []

    def mine(of_group: Array, n: int) -> list[int]:
        seen.append((of_group, n))
        return [5, 5, len(seen)]

    plan = functional.plan_splits(w, 0.5, 2, mine)
    assert picks_of(plan, 2) == [5, 5, 1, 11, 11, 8]
    assert [n for _, n in seen] == [3, 3]
    assert np.array_equal(np.concatenate([of_group for of_group, _ in seen]), w)
    seen[0][0][:] = 0
    assert w[0, 0, 0] != 0


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        (lambda w, n: [0] * (n + 1), ValueError, "body.0: select=<lambda> returned .* return 1 channels from 0 to 7"),
        (lambda w, n: [8], ValueError, "return 1 channels from 0 to 7"),
        (lambda w, n: [-1], ValueError, "return 1 channels from 0 to 7"),
        (lambda w, n: [0.5], TypeError, "body.0: select=<lambda> returned .* as integers"),
        (lambda w, n: None, TypeError, "as integers"),
        ("largest", ValueError, "select='largest': use 'max', 'error', or a callable"),
        (0.5, ValueError, "select=0.5: use 'max', 'error', or a callable"),
    ],
)
def test_what_no_rule_may_do(net: SmallNet, rule: object, error: type[Exception], match: str) -> None:
    before = state(net)
    with pytest.raises(error, match=match):
        ocs.quantize(net, r=0.1, select=rule)
    assert_unchanged(net, before)


def test_a_rule_that_fails_says_where(net: SmallNet) -> None:
    def fails(w: Tensor, n: int) -> list[int]:
        raise KeyError(n)

    with pytest.raises(KeyError) as failure:
        ocs.quantize(net, r=0.1, select=fails)
    assert failure.value.__notes__ == ["in body.0"]


def first(w: Tensor, n: int) -> Tensor:
    """The first channel of each group, as a tensor of indices."""
    assert w.dtype == torch.float32
    assert not w.requires_grad
    return torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("rule", ["error", first], ids=["error", "callable"])
def test_every_kind_of_layer(rule: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    inputs, ours = model.inputs(), {}
    for expand in (True, False):
        ours[expand] = copy.deepcopy(model)
        report = ocs.quantize(
            ours[expand], wbits=4, r=0.2, clip="mse", granularity="channel", select=rule, expand=expand
        )
    for expanded, folded in zip(ours[True](*inputs), ours[False](*inputs), strict=True):
        torch.testing.assert_close(expanded, folded, rtol=1e-4, atol=1e-4)
    lines = {line.label: line for line in report.quantized}
    assert lines["net.body.5"].splits == 0  # depthwise
    assert lines["lstm.weight_hh_l1_reverse"].splits == 3
    if rule is first:
        assert lines["net.body.3"].sources == (0, 4, 8, 12)
        assert lines["up"].sources == (0, 4)
    name = "first" if rule is first else rule
    assert json.loads(report.to_json())["settings"]["select"] == name
    ocs.save(ours[True], tmp_path / "model.safetensors")
    again = ocs.load(tmp_path / "model.safetensors", copy.deepcopy(model))
    assert again.net.head.settings["select"] == name
    torch.testing.assert_close(again(*inputs)[0], ours[True](*inputs)[0], rtol=0, atol=0)


def test_select_of_one_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    report = ocs.quantize(model, r=0.3, overrides={"1": {"select": first}})
    assert report.quantized[1].sources == (0, 0, 0)
    assert report.quantized[0].sources != (0, 0, 0)
    assert report.to_dict()["settings"]["overrides"] == {"1": {"select": "first"}}


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"bits": 99}, ValueError, "bits=99"),
        ({"clip": "foo"}, ValueError, "clip='foo'"),
        ({"granularity": "row"}, ValueError, "granularity='row'"),
        ({"rounding": "gptq"}, ValueError, "rounding='gptq': use 'nearest' or 'squant'"),
        ({"r": 2}, ValueError, "r=2"),
        ({"groups": 3}, ValueError, "groups=3"),
        ({"w": torch.ones(4, 4, dtype=torch.int32)}, TypeError, "w must be"),
    ],
)
def test_bad_plans_are_one_clear_error(how: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        functional.plan_splits(**{"w": torch.randn(4, 4), "r": 0.5, "select": "error", "clip": "mse"} | how)
