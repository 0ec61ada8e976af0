"""Splits and bits under one size for the whole model, and what calibration says of the layers' weight."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, outlier_weight, state
from torch import Tensor, nn

import ocs
from examples import fashion_mnist
from ocs import functional
from ocs.calibration.run import outputs_of
from ocs.model.targets import Target, find_targets
from ocs.nn.base import QuantizedLayer
from ocs.plan import allocate, knapsack
from ocs.plan.knapsack import Candidate, solve_knapsack
from ocs.plan.sensitivity import sensitivities
from ocs.weight.error import remaining_error
from ocs.weight.types import Quantization


def total_error(model: nn.Module, ours: nn.Module, rounding: str = "nearest") -> float:
    """The sum over weights of the error that is left."""
    total = 0.0
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantizedLayer):
            for weight in layer.channels:
                w = layer.layout(model.get_submodule(name)._parameters[weight].detach(), layer.groups).contiguous()
                quantized = functional.QuantizedWeight(*layer.weight_state(weight), None)
                step = Quantization(quantized, "none", functional.weight_error(w, quantized, layer.groups))
                how = functional.Scheme(layer.bits, rounding=rounding, groups=layer.groups)
                total += remaining_error(w, step, how)
    return total


# --- Spending ---------------------------------------------------------------------------------------------------------


def ways(*points: tuple[int, float]) -> list[Candidate]:
    return [Candidate(size, error, i) for i, (size, error) in enumerate(points)]


def best(items: list[list[Candidate]], budget: int) -> float:
    """By trying all."""
    fitting = (each for each in itertools.product(*items) if sum(way.packed_bytes for way in each) <= budget)
    return min(sum(way.error for way in each) for each in fitting)


def random_items(count: int, most: int, seed: int) -> list[list[Candidate]]:
    rng = np.random.default_rng(seed)
    return [ways(*zip(rng.integers(1, most, 5).tolist(), rng.random(5), strict=True)) for _ in range(count)]


@pytest.mark.parametrize("most", [20, 2000])
def test_the_budget_is_spent_as_well_as_can_be(most: int) -> None:
    for seed in range(20):
        items = random_items(4, most, seed)
        for budget in np.linspace(sum(min(way.packed_bytes for way in each) for each in items), 4 * most, 5).astype(
            int
        ):
            chosen = solve_knapsack(items, int(budget))
            assert sum(way.packed_bytes for way in chosen) <= budget
            assert sum(way.error for way in chosen) == pytest.approx(best(items, budget))


def test_sizes_beyond_the_units_are_spent_on_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that would still fit is left to take."""
    monkeypatch.setattr(knapsack, "UNITS", 200)
    for seed in range(20):
        items = random_items(4, 10**7, seed)
        budget = 2 * 10**7
        chosen = solve_knapsack(items, budget)
        assert sum(way.packed_bytes for way in chosen) <= budget
        assert sum(way.error for way in chosen) <= best(items, budget) + 0.05
        for item, way in zip(items, chosen, strict=True):
            left = budget - sum(each.packed_bytes for each in chosen) + way.packed_bytes
            assert all(other.error >= way.error for other in item if other.packed_bytes <= left)


@pytest.mark.parametrize("core", [1, 8])
def test_of_many_items_the_nearest_to_choosing_otherwise_are_chosen_together(
    core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All fits, nothing that would still fit is left, and at most one step's error is lost."""
    items = random_items(60, 200, 0)
    for budget in np.linspace(sum(min(way.packed_bytes for way in each) for each in items), 6000, 7).astype(int):
        monkeypatch.setattr(knapsack, "CORE", 128)
        exact = sum(way.error for way in solve_knapsack(items, int(budget)))
        monkeypatch.setattr(knapsack, "CORE", core)
        chosen = solve_knapsack(items, int(budget))
        assert sum(way.packed_bytes for way in chosen) <= budget
        assert exact - 1e-9 <= sum(way.error for way in chosen) <= exact + (0.2 if core == 1 else 0.05)


def test_the_table_is_of_few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that time and memory grow with the number of items, and no faster."""
    sizes, together = [], knapsack._together
    monkeypatch.setattr(
        knapsack, "_together", lambda items, budget: sizes.append(len(items)) or together(items, budget)
    )
    assert len(solve_knapsack(random_items(1000, 2000, 0), 400_000)) == 1000
    assert sizes == [knapsack.CORE]


def test_nothing_to_spend_on() -> None:
    assert solve_knapsack([], 5) == []
    assert [way.what for way in solve_knapsack([ways((3, 1.0)), ways((2, 1.0), (3, 0.0))], 5)] == [0, 0]


# --- Splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["knapsack", "error"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_splits_of_every_kind_of_layer(by: str, granularity: str) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    inputs, ours, reports = model.inputs(), {}, {}
    how = {"wbits": 4, "r": 0.2, "granularity": granularity, "overrides": {"net.head": {"r": 0.0}}}
    for name, more in {
        "uniform": {},
        "allocated": {"allocate": by},
        "folded": {"allocate": by, "expand": False},
    }.items():
        ours[name] = copy.deepcopy(model)
        reports[name] = ocs.quantize(ours[name], **how, **more)
    for expanded, folded in zip(ours["allocated"](*inputs), ours["folded"](*inputs), strict=True):
        torch.testing.assert_close(expanded, folded, rtol=1e-4, atol=1e-4)
    uniform, allocated = ({line.label: line for line in reports[each].quantized} for each in ("uniform", "allocated"))
    assert reports["allocated"].packed_bytes <= reports["uniform"].packed_bytes
    assert {name: line.splits for name, line in allocated.items()} != {n: line.splits for n, line in uniform.items()}
    assert allocated["net.head"].splits == allocated["net.body.5"].splits == 0
    for weight in ("weight_hh_l0", "weight_hh_l1"):
        assert allocated[f"lstm.{weight}"].splits == allocated[f"lstm.{weight}_reverse"].splits
    if by == "error":
        assert total_error(model, ours["allocated"]) < total_error(model, ours["uniform"])
    else:
        left = [sum(line.max_after / line.max_before for line in each.values()) for each in (allocated, uniform)]
        assert left[0] < left[1]


def test_splits_go_where_the_outliers_are() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        model[1].weight[:, :4] *= torch.tensor([30.0, 20, 25, 28])
    report = ocs.quantize(model, wbits=4, r=0.05, allocate="error")
    assert [line.splits for line in report.quantized] == [0, 4]


def test_ladders() -> None:
    assert allocate._ladder(0, 50) == [0]
    assert allocate._ladder(1, 50) == [0, 1, 2, 4, 8]
    assert allocate._ladder(41, 100) == [0, 10, 20, 40, 41, 80]
    assert allocate._ladder(3, 3) == [0, 1, 2, 3]


# --- Bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"r": 0.2, "granularity": "channel", "clip": "mse"},
        {
            "r": 0.2,
            "rounding": "squant",
            "select": "error",
            "overrides": {"lstm": {"wbits": 5}, "net.head": {"r": 0.0}},
        },
    ],
)
def test_bits_of_every_kind_of_layer(how: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    uniform, ours, rounding = copy.deepcopy(model), copy.deepcopy(model), how.get("rounding", "nearest")
    budget = ocs.quantize(uniform, wbits=4, **how).packed_bytes
    report = ocs.quantize(ours, wbits="auto", budget=budget, **how)
    assert 0.9 * budget < report.packed_bytes <= budget
    errors = [total_error(model, each, rounding) for each in (ours, uniform)]
    assert errors[0] < errors[1] if how else errors[0] <= errors[1]  # the LSTM's next bit takes more than all others
    bits = {line.name: set() for line in report.quantized}
    for line in report.quantized:
        bits[line.name].add(line.bits)
    assert {len(each) for each in bits.values()} == {1}
    assert len(set.union(*bits.values())) > bool(how)
    assert all(ours.get_submodule(name).bits == each for name, (each,) in bits.items())
    if "overrides" in how:
        assert bits["lstm"] == {5}
        assert ours.net.head.splits == 0
    assert (report.settings["wbits"], report.settings["budget"]) == ("auto", budget)
    ocs.save(ours, tmp_path / "model.safetensors")
    again, inputs = ocs.load(tmp_path / "model.safetensors", copy.deepcopy(model)), model.inputs()
    torch.testing.assert_close(again(*inputs)[0], ours(*inputs)[0], rtol=0, atol=0)


def test_mean_bits() -> None:
    layers = find_targets(nn.Sequential(nn.Linear(10, 10), nn.LSTM(5, 5)))
    assert [allocate.mean_bits(layers, budget) for budget in (20, 150, 10**6)] == [2, 4, 8]


def test_a_budget_of_numpy(net: SmallNet) -> None:
    report = ocs.quantize(net, wbits="auto", budget=np.int64(2000))
    assert json.loads(report.to_json())["settings"]["budget"] == 2000
    assert type(report.settings["budget"]) is int


def test_one_layer_alone_may_choose(net: SmallNet) -> None:
    fixed = ocs.quantize(copy.deepcopy(net), wbits=4).packed_bytes
    report = ocs.quantize(net, wbits=4, overrides={"head": {"wbits": "auto"}}, budget=fixed + 20)
    assert {line.name: line.bits for line in report.quantized} == {"body.0": 4, "body.3": 4, "body.5": 4, "head": 6}


@pytest.mark.parametrize("act_r", [0.0, 0.3])
def test_quantized_inputs_count_as_in_the_report(net: SmallNet, act_r: float) -> None:
    """At the size that uniform 2 bits need, there is no other choice; a byte less is too little."""
    how = {"abits": 8, "act_r": act_r, "calibration": [torch.randn(2, 3, 8, 8)]}
    least = ocs.quantize(copy.deepcopy(net), wbits=2, **how).packed_bytes
    with pytest.raises(ValueError, match=f"budget={least - 1}: {least} bytes are the least"):
        ocs.quantize(net, wbits="auto", budget=least - 1, **how)
    assert ocs.quantize(net, wbits="auto", budget=least, **how).packed_bytes == least


def test_batch_norms_are_folded_first(net: SmallNet) -> None:
    """One that turns its layer off leaves nothing to spend bits on."""
    nn.init.zeros_(net.body[1].weight)
    ours = {fold: copy.deepcopy(net) for fold in (False, True)}
    budget = ocs.quantize(copy.deepcopy(net), wbits=6).packed_bytes
    bits = {f: ocs.quantize(m, wbits="auto", budget=budget, fold_bn=f).quantized[0].bits for f, m in ours.items()}
    assert bits[True] == 2 < bits[False]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_trained_network_at_the_size_of_uniform_bits(granularity: str, bits: int) -> None:
    model = fashion_mnist.load_model()
    ours, uniform = copy.deepcopy(model), copy.deepcopy(model)
    budget = ocs.quantize(uniform, wbits=bits, r=0.05, granularity=granularity).packed_bytes
    report = ocs.quantize(ours, wbits="auto", budget=budget, r=0.05, granularity=granularity)
    assert report.packed_bytes <= budget
    assert total_error(model, ours) < 0.95 * total_error(model, uniform)


# --- How much layers count --------------------------------------------------------------------------------------------


class Two(nn.Module):
    """One layer's output is hardly looked at, another's not at all; what is returned varies."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.heard, self.faint, self.unheard = (nn.Linear(20, 20, bias=False) for _ in range(3))
        for layer in (self.heard, self.faint, self.unheard):
            layer.weight.data = torch.from_numpy(outlier_weight((20, 20)))

    def forward(self, x: Tensor) -> object:
        """x [N, 20] -> [N, 20] in some form."""
        y = self.heard(x) + 0.01 * self.faint(x)
        forms = {"tensor": y, "tuple": (y, 3), "dict": {"a": [y]}, "text": "y", "nan": y / 0 * 0, "pair": (y, y.sum())}
        return forms[self.form]


def batches(count: int = 1) -> list[Tensor]:
    return list(torch.randn(count, 8, 20, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict", "pair"])
@pytest.mark.parametrize("give", [batches, lambda: iter(batches(2)), lambda: lambda model: model(batches()[0])])
def test_bits_go_where_outputs_move(form: str, give: object) -> None:
    model = Two(form)
    budget = ocs.quantize(copy.deepcopy(model), wbits=4).packed_bytes
    report = ocs.quantize(copy.deepcopy(model), wbits="auto", budget=budget)
    assert [line.bits for line in report.quantized] == [4, 4, 4]
    report = ocs.quantize(model, wbits="auto", budget=budget, calibration=give())
    bits = {line.name: line.bits for line in report.quantized}
    assert bits["heard"] > bits["faint"] == bits["unheard"]


def test_splits_go_where_outputs_move() -> None:
    report = ocs.quantize(Two(), wbits=4, r=0.1, allocate="error", calibration=batches())
    splits = {line.name: line.splits for line in report.quantized}
    assert splits["heard"] > 2 > splits["faint"]


def test_sensitivities_are_per_error_of_the_weights() -> None:
    """Outputs of a linear model are off as much as its weights are: every layer counts 1, at whatever error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    for noise in (0.01, 0.1):

        @torch.no_grad()
        def probe(layer: Target, noise: float = noise) -> tuple[nn.Module, float]:
            other = copy.deepcopy(layer.module)
            off = noise * torch.randn(64, 64) * other.weight.std()
            other.weight.data += off
            return other, float(off.square().sum() / layer.module.weight.square().sum())

        found = sensitivities(model, find_targets(model), [torch.randn(512, 64)], probe)
        assert list(found.values()) == pytest.approx([1, 1], rel=0.1)


def test_all_batches_are_left_for_the_inputs() -> None:
    """An iterator's first batch serves both."""
    first, second = torch.ones(4, 20), 5 * torch.ones(4, 20)
    budget = 2000
    report = ocs.quantize(Two(), wbits="auto", budget=budget, abits=8, calibration=iter([second, first]))
    assert report.quantized[0].act_threshold == pytest.approx(5)


def test_the_model_runs_undisturbed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9), nn.Linear(8, 8))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(model[1].training))
    ocs.quantize(model, wbits="auto", budget=200, calibration=[torch.randn(4, 8)])
    assert seen == [False] * 3
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks


def test_outputs_are_found_in_order() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> object:
            return {"a": (x, [2 * x.half()]), "b": None, "c": x.long()}

    outputs = outputs_of(Nested(), [torch.ones(2), torch.zeros(2)])
    assert [y.tolist() for y in outputs] == [[1, 1], [2, 2], [0, 0], [0, 0]]


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def spent() -> Iterator[Tensor]:
    return iter(())


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"allocate": "best", "r": 0.1}, "allocate='best': use 'uniform' or 'knapsack' or 'error'"),
        ({"allocate": "error"}, "allocate='error' without r has no effect: set r"),
        ({"allocate": "error", "overrides": {"faint": {"r": 0.5}}, "skip": "faint"}, "without r has no effect"),
        ({"select": "error"}, "select='error' without r has no effect: set r"),
        ({"wbits": "auto"}, 'heard: wbits="auto" needs budget='),
        ({"wbits": "best"}, "wbits='best': use an integer from 2 to 8"),
        ({"budget": 1000}, 'budget=1000 without wbits="auto" has no effect'),
        ({"wbits": "auto", "budget": 1e3}, "budget=1000.0: use a positive integer"),
        ({"wbits": "auto", "budget": True}, "budget=True: use a positive integer"),
        ({"wbits": "auto", "budget": 0}, "budget=0: use a positive integer"),
        ({"wbits": "auto", "budget": 200}, 'budget=200: 312 bytes are the least, with 2 bits where wbits="auto"'),
        ({"wbits": "auto", "budget": 999, "allocate": "error", "r": 0.1}, "allocate='error' with wbits=\"auto\""),
        ({"wbits": "auto", "budget": 999, "calibration": spent()}, "calibration is empty"),
        ({"wbits": 4, "calibration": batches()}, "calibration= has no effect on these options: add"),
        (
            {"wbits": 4, "r": 0.1, "allocate": "knapsack", "calibration": batches()},
            "calibration= has no effect on these options: add",
        ),
    ],
)
def test_what_does_not_go_together(how: dict, match: str) -> None:
    model = Two()
    before = state(model)
    with pytest.raises(ValueError, match=match):
        ocs.quantize(model, **how)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("form", "match"), [("text", "returns no float tensor"), ("nan", "hold NaN or Inf")])
def test_outputs_that_tell_nothing(form: str, match: str) -> None:
    model = Two(form)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        ocs.quantize(model, wbits="auto", budget=999, calibration=batches())
    assert_unchanged(model, before)


def test_a_failure_while_another_layer_stands_in(net: SmallNet) -> None:
    runs = []

    def fails(model: nn.Module) -> None:
        runs.append(model(torch.randn(2, 3, 8, 8)))
        if len(runs) == 3:
            raise RuntimeError("out of memory")

    before = state(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        ocs.quantize(net, wbits="auto", budget=2000, calibration=fails)
    assert_unchanged(net, before)


def test_statistics_hold_no_batch_to_run() -> None:
    model = Two()
    calibration = ocs.calibrate(model, batches())
    with pytest.raises(ValueError, match="has no effect"):
        ocs.quantize(model, wbits="auto", budget=999, calibration=calibration)
    report = ocs.quantize(model, wbits="auto", budget=999, calibration=calibration, abits=8)
    assert math.isfinite(report.mean_sqnr_db)


@pytest.mark.parametrize("how", [{"allocate": "error"}, {"allocate": "knapsack"}, {"wbits": "auto", "budget": 99}])
def test_layers_without_values(how: dict) -> None:
    """Not even where a batch would give them their shape."""
    for calibration in ({}, {"calibration": batches()} if how.get("allocate") != "knapsack" else {}):
        model = nn.Sequential(nn.Linear(20, 20), nn.LazyLinear(4))
        with pytest.raises(ValueError, match="1: its weight holds no values yet"):
            ocs.quantize(model, r=0.1, **how, **calibration)
        assert type(model[1]) is nn.LazyLinear
