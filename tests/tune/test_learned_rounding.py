"""Learned rounding: better outputs than gptq leaves, on the grid, for every kind of layer; all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import Everything, SmallNet, assert_unchanged, state
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import ocs
from ocs.nn.base import QuantizedLayer
from ocs.tune import learned_rounding
from ocs.tune.learned_rounding import LastIntegers, Learnable, SoftIntegers, blocks_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Residual(nn.Module):
    """A block, which writes to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, groups=2)
        with torch.no_grad():
            self.first.weight[:, 0] *= 4

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(x)
        return x + self.second(torch.relu_(self.norm(self.first(x))))


def residual_net() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 8, 3), Residual(8), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*blocks).eval()


def batches(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(count)]


def quantized(model: nn.Module, calibration: object, **options: object) -> tuple[nn.Module, ocs.Report]:
    ours = copy.deepcopy(model)
    given = {"wbits": 2, "r": 0.2, "recipe": "best", "rounding": "learned", "skip": None} | options
    return ours, ocs.quantize(ours, calibration=calibration, **given)


@torch.no_grad()
def error(model: nn.Module, ours: nn.Module, inputs: list[Tensor]) -> float:
    return float(sum((model(x.clone()) - ours(x.clone())).square().mean() for x in inputs)) / len(inputs)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps: what becomes of them is tested elsewhere."""
    monkeypatch.setattr(learned_rounding, "EPOCHS", 1)
    monkeypatch.setattr(learned_rounding, "STEPS", 25)


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the steps."""
    monkeypatch.setattr(learned_rounding, "EPOCHS", 4)
    monkeypatch.setattr(learned_rounding, "STEPS", 40)


# --- What is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"abits": 4, "act_r": 0.2},
        {"granularity": "tensor", "fold_bn": True},
        {"granularity": "group", "group": 32},
    ],
)
def test_outputs_are_nearer_to_those_of_the_float_model(
    more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On inputs that were never seen, expanded or folded; quantized inputs and folded norms are learned around."""
    model, unseen = residual_net(), batches(6, seed=2)
    before, _ = quantized(model, batches(10), rounding="gptq", **more)
    ours, report = quantized(model, batches(10), **more)
    folded, _ = quantized(model, batches(10), expand=False, **more)
    assert error(model, ours, unseen) < 0.8 * error(model, before, unseen)
    rounded = {line.name: line.rounding for line in report.quantized}
    assert rounded["1.first"] == rounded["2.second"] == "learned" == ours[1].first.settings["rounding"]
    torch.testing.assert_close(ours(unseen[0].clone()), folded(unseen[0].clone()))
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantizedLayer):
            assert layer.expand
            assert layer.weight_int.abs().max() <= 1
            assert torch.equal(layer.source, before.get_submodule(name).source)
            assert torch.equal(layer.scale, before.get_submodule(name).scale)
            line = next(line for line in report.quantized if line.name == name)
            if not more.get("fold_bn"):
                w = model.get_submodule(name).weight.detach()
                noise = (w - layer.weight).square().sum()
                assert line.sqnr_db == pytest.approx(float(10 * (w.square().sum() / noise).log10()), abs=1e-3)
            steps = ["gptq", "clip auto", "learned"] if line.rounding == "learned" else ["gptq", "clip auto"]
            assert [label for label, _ in line.steps][-len(steps) :] == steps


def test_layers_of_several_groups_are_measured_as_they_are(quick: None) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 5)), [torch.randn(64, 70)]
    ours, report = quantized(model, inputs, granularity="group", group=32)
    for line, layer in zip(report.quantized, (0, 2), strict=True):
        w = model[layer].weight.detach()
        noise = (w - ours[layer].weight).square().sum()
        assert line.rounding == "learned"
        assert line.sqnr_db == pytest.approx(float(10 * (w.square().sum() / noise).log10()), abs=1e-3)


@pytest.mark.parametrize("scales", [{}, {"granularity": "group", "group": 32}])
def test_every_kind_of_layer_learns(quick: None, scales: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    data = [model.inputs() for _ in range(3)]

    def run(net: nn.Module) -> None:
        for images, words in data:
            net(images, words)

    before, _ = quantized(model, run, rounding="gptq", wbits=3, **scales)
    after, report = quantized(model, run, wbits=3, **scales)
    changed = {
        name
        for name, tensor in before.state_dict().items()
        if tensor.dtype == torch.int8 and not torch.equal(tensor, after.state_dict()[name])
    }
    assert {name.split(".")[0] for name in changed} - {"again"} == {"net", "up", "lstm", "cell", "attention"}
    assert {f"lstm.weight_{kind}_l{i}_int" for kind in ("ih", "hh") for i in (0, 1)} <= changed
    assert not any("not learned" in line.reason for line in report.quantized)
    with torch.no_grad():
        expected, *found = [net(*data[0]) for net in (model, before, after)]
    off = [sum(float((y - z).square().mean()) for y, z in zip(expected, each, strict=True)) for each in found]
    assert off[1] < off[0]


@pytest.mark.parametrize("input_options", [{"abits": 8, "act_scale": "dynamic"}, {"abits": 5}])
def test_quantized_states_and_inputs_pass_gradients(quick: None, input_options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(6, 8)).eval()
    _, report = quantized(model, [torch.randn(7, 3, 6)], overrides={"0": input_options})
    assert {line.rounding for line in report.quantized} == {"learned"}


def test_only_some_layers_learn_and_the_same_each_time(quick: None) -> None:
    model = residual_net()
    ours, report = quantized(model, iter(batches(3)), overrides={"1.*": {"rounding": "nearest"}}, skip="0")
    again, _ = quantized(
        model, lambda net: [net(x) for x in batches(3)], overrides={"1.*": {"rounding": "nearest"}}, skip="0"
    )
    assert {line.name for line in report.quantized if line.rounding == "learned"} == {"2.first", "2.second", "5"}
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


def test_results_do_not_depend_on_defaults(quick: None) -> None:
    model, inputs, before = residual_net(), batches(2), torch.get_default_dtype()
    expected, _ = quantized(model, inputs)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            ours, _ = quantized(model, inputs)
        finally:
            torch.set_default_dtype(before)
    pairs = zip(expected.state_dict().values(), ours.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns(quick: None, dtype: torch.dtype) -> None:
    model = residual_net().to(dtype)
    ours, report = quantized(model, [x.to(dtype) for x in batches(2)])
    assert "learned" in {line.rounding for line in report.quantized}
    assert ours[1].first.scale.dtype == torch.float32


def test_what_was_made_in_inference_mode(quick: None) -> None:
    """Inputs made there can be learned from, a model made there cannot."""
    model = residual_net()
    with torch.inference_mode():
        inputs, there = batches(2), residual_net()
        ocs.quantize(model, wbits=2, rounding="learned", calibration=inputs)
        with pytest.raises(ValueError, match="was made in inference mode"):
            ocs.quantize(there, wbits=2, rounding="learned", calibration=inputs)


def test_what_left_more_error_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_rounding, "EPOCHS", 1)
    monkeypatch.setattr(learned_rounding, "STEPS", 1)
    monkeypatch.setattr(SoftIntegers, "hard", lambda self: -self.whole)
    model = residual_net()
    before, _ = quantized(model, batches(2), rounding="gptq")
    ours, report = quantized(model, batches(2))
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), ours.state_dict().values(), strict=True))
    assert {line.rounding for line in report.quantized} == {"gptq"} == {ours[5].settings["rounding"]}
    assert all("not learned: what learning gave left more error" in line.reason for line in report.quantized)


def test_what_no_output_depends_on_is_said(quick: None) -> None:
    class Unused(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.body(self.stem(x).relu())
            self.head.weight.sum()
            return x

    _, report = quantized(Unused().eval(), batches(2), rounding="learned")
    reasons = {line.name: line.reason for line in report.quantized}
    assert "exact" not in reasons["stem"]
    assert "not learned: its outputs are exact, or" in reasons["head"]


# --- Its parts --------------------------------------------------------------------------------------------------------


def test_copies_move_where_there_is_room() -> None:
    """Channels split more than once, in groups: the copies' integers add up to what was chosen, all on the grid."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 1, groups=2)
    with torch.no_grad():
        layer.weight[:, 1] *= 20
    ours = nn.Sequential(layer)
    ocs.quantize(ours, wbits=2, r=0.7, skip=None)
    before = ours[0].folded("weight") / ours[0].scale
    integers = SoftIntegers(ours[0], "weight", layer.weight.detach())
    assert torch.equal(integers.whole, before.round())
    most = integers._added_up(torch.ones_like(ours[0].weight_int))
    assert most.max() > 2
    assert (integers.lower >= -most).all()
    assert (integers.lower + 1 <= most).all()
    with torch.no_grad():
        integers.logit.copy_(torch.randn_like(integers.logit))
    chosen = integers.hard()
    assert ((chosen - integers.whole).abs() <= 1).all()
    assert (chosen != integers.whole).any()
    integers.keep()
    assert ours[0].weight_int.abs().max() == 1
    assert torch.equal(ours[0].folded("weight"), chosen * ours[0].scale)


def test_the_last_part_of_each_channel_moves_where_scales_are_of_groups() -> None:
    """In each of two groups with blocks of 32, 8 and 20 parts: all others, scales and sources stay."""
    torch.manual_seed(0)
    layer = nn.Conv2d(80, 12, 1, groups=2)
    with torch.no_grad():
        layer.weight *= torch.linspace(1, 4, 40)[:, None, None]
    ours = nn.Sequential(layer)
    ocs.quantize(ours, wbits=3, r=0.5, granularity="group", group=32, skip=None)
    before, whole = ours[0].weight_int.clone(), ours[0].folded("weight")
    integers = LastIntegers(ours[0], "weight", layer.weight.detach())
    torch.testing.assert_close(integers.whole * integers.scale + integers.rest, whole)
    source = ours[0].source.view(2, 60)
    last = [[max(j for j in range(60) if source[g, j] == 40 * g + c) for c in range(40)] for g in range(2)]
    assert len({*last[0]} - {*range(40)}) > 2
    with torch.no_grad():
        integers.logit.copy_(torch.randn_like(integers.logit))
    chosen = integers.hard()
    assert (chosen != integers.whole).any()
    assert chosen.abs().max() <= 3
    integers.keep()
    torch.testing.assert_close(ours[0].folded("weight"), chosen * integers.scale + integers.rest)
    for g in range(2):
        of_group = slice(6 * g, 6 * g + 6)
        assert torch.equal(ours[0].weight_int[of_group][:, last[g]].float(), chosen[of_group])
        others = [j for j in range(60) if j not in last[g]]
        assert torch.equal(ours[0].weight_int[of_group][:, others], before[of_group][:, others])


def test_blocks_are_the_outermost_repeated_modules() -> None:
    model = residual_net()
    layers = [Learnable(n, m, m, {}) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    found = {block.name: [layer.name for layer in block.layers] for block in blocks_of(model, layers)}
    assert found == {"0": ["0"], "1": ["1.first", "1.second"], "2": ["2.first", "2.second"], "5": ["5"]}


# --- All or nothing ---------------------------------------------------------------------------------------------------


def _interrupt(model: nn.Sequential, after: int) -> RemovableHandle:
    """Interrupt the model in its so many-th call."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    return model[4].register_forward_hook(hook)


@pytest.mark.parametrize("after", [3, 9, 20])
def test_an_interrupt_leaves_the_model_as_it_was(after: int) -> None:
    model = residual_net().train()
    handle = _interrupt(model, after)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        ocs.quantize(model, wbits=2, rounding="learned", calibration=batches(2))
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    handle.remove()


def test_what_cannot_be_learned_from_is_refused() -> None:
    model = residual_net()
    before, seen = state(model), ocs.calibrate(model, batches(1), moments=True)
    rounds = iter(range(99))
    changing = lambda net: [net(x[next(rounds) % 3 :]) for x in batches(1)]  # noqa: E731
    cases = {
        "0: rounding='learned' learns on the inputs themselves": {"calibration": seen},
        "rounding='learned' needs calibration=": {},
        "rounding='learned' with split='naive'": {"calibration": batches(1), "split": "naive"},
        "each time": {"calibration": changing},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            ocs.quantize(model, wbits=2, rounding="learned", skip=None, **options)
    with pytest.raises(ValueError, match="rounding='learned': use"):
        ocs.functional.quantize_weight(torch.ones(2, 2), 4, rounding="learned")
    assert_unchanged(model, before)


def chain(in_place: bool) -> nn.Sequential:
    """Layers that are blocks of their own, each with a norm that changes its scale."""
    torch.manual_seed(0)
    layers = []
    for channels in (3, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(in_place)]
    for norm in layers[1::3]:
        nn.init.uniform_(norm.running_var, 0.01, 0.05)
        nn.init.normal_(norm.bias, 0, 0.3)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, 5)).eval()


def test_layers_are_learned_for_what_they_gave_with_folded_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the output before a norm that is folded, nor what an activation in place made of it."""
    monkeypatch.setattr(learned_rounding, "SMALL", 0)
    data, errors = batches(6), {}
    for fold_bn in (False, True):
        for in_place in (False, True):
            model = chain(in_place)
            ours, _ = quantized(model, data, fold_bn=fold_bn, r=0)
            errors[fold_bn, in_place] = error(model, ours, batches(4, seed=2))
    assert errors[True, True] == errors[True, False]
    assert errors[False, True] == errors[False, False]
    assert errors[True, True] == pytest.approx(errors[False, False], rel=0.1)
