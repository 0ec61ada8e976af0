"""Recipes, and what the report says that each option did."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import ocs
from examples import fashion_mnist, language_model
from ocs import functional
from ocs.weight.apply_plan import quantize_plan
from ocs.weight.error import alignment, output_power
from ocs.weight.types import Scheme


class Norms(nn.Module):
    """Layers whose inputs have a mean, or none: of these one of filters and one of single weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.after_relu = nn.Conv2d(8, 8, 3)
        self.second_norm = nn.BatchNorm2d(8)
        self.without_mean = nn.Conv2d(8, 8, 2)
        self.layer_norm = nn.LayerNorm(8)
        self.after_norm = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.after_relu(self.norm(self.first(x)).relu())
        x = self.without_mean(self.second_norm(x))
        return self.after_norm(self.layer_norm(x.mean((2, 3))))


def settings(model: nn.Module, name: str) -> dict[str, object]:
    return model.get_submodule(name).settings


def test_best_chooses_layer_by_layer() -> None:
    model = Norms().eval()
    report = ocs.quantize(model, wbits=3, r=0.1, recipe="best")
    layers = [settings(model, name) for name in ("after_relu", "without_mean", "after_norm")]
    assert [each["rounding"] for each in layers] == ["squant", "nearest", "squant"]
    assert {each["granularity"] for each in layers} == {"channel"}
    assert {each["clip"] for each in layers} == {"auto"}
    assert report.settings["rounding"] == "by layer"
    assert (report.settings["granularity"], report.settings["recipe"]) == ("channel", "best")
    assert [layer.rounding for layer in report.quantized] == ["squant", "nearest", "squant"]
    assert "of its input's power" in report.quantized[0].input_mean


def test_what_is_given_wins() -> None:
    model = Norms().eval()
    given = {"granularity": "tensor", "rounding": "nearest", "clip": "none"}
    best, paper = (copy.deepcopy(model) for _ in range(2))
    ocs.quantize(best, wbits=3, r=0.1, recipe="best", **given)
    ocs.quantize(paper, wbits=3, r=0.1)
    for name in ("after_relu", "without_mean", "after_norm"):
        assert torch.equal(best.get_submodule(name).weight, paper.get_submodule(name).weight)
    overridden = copy.deepcopy(model)
    ocs.quantize(overridden, wbits=3, recipe="best", overrides={"after_relu": {"rounding": "nearest", "wbits": 4}})
    assert settings(overridden, "after_relu")["rounding"] == "nearest"
    assert settings(overridden, "after_relu")["granularity"] == "channel"


def test_naive_splits_are_rounded_to_nearest() -> None:
    model = Norms().eval()
    ocs.quantize(model, wbits=3, r=0.1, split="naive", recipe="best")
    assert settings(model, "after_relu")["rounding"] == "nearest"


def test_overrides_count_as_given() -> None:
    """What the recipe chooses follows from them, as if they were said of all layers."""
    model, same = Norms().eval(), Norms().eval()
    overrides = {"after_relu": {"split": "naive", "abits": 4}}
    batches = [torch.randn(4, 3, 8, 8)]
    report = ocs.quantize(model, wbits=3, r=0.1, recipe="best", overrides=overrides, calibration=batches)
    ocs.quantize(same, wbits=3, r=0.1, recipe="best", split="naive", abits=4, calibration=batches)
    assert settings(model, "after_relu") == settings(same, "after_relu")
    assert settings(model, "after_relu")["rounding"] == "nearest"
    assert settings(model, "after_relu")["act_clip"] == "mse"
    assert settings(model, "after_norm")["act_clip"] == "none"
    assert report.settings["rounding"] == "by layer"


def test_inputs_are_clipped_where_they_are_quantized() -> None:
    model = Norms().eval()
    ocs.quantize(model, wbits=4, abits=4, recipe="best", calibration=[torch.randn(4, 3, 8, 8)])
    assert settings(model, "after_relu")["act_clip"] == "mse"
    assert not model.after_relu.input_grid.signed
    assert model.after_norm.input_grid.signed


def test_inputs_are_split_repeatedly() -> None:
    x = torch.randn(4, 3, 8, 8)
    for options, expected in (
        ({"recipe": "best"}, "max"),
        ({"recipe": "best", "act_select": "percentile"}, "percentile"),
        ({"recipe": "best", "overrides": {"after_relu": {"act_select": "error"}}}, "error"),
        ({}, "percentile"),
    ):
        model = Norms().eval()
        ocs.quantize(model, wbits=4, abits=4, act_r=0.2, calibration=[x], **options)
        assert settings(model, "after_relu")["act_select"] == expected


def test_oracle_splits_need_no_calibration() -> None:
    model = Norms().eval()
    ocs.quantize(model, wbits=4, abits=4, act_r=0.1, act_split="oracle", recipe="best")
    assert settings(model, "after_relu")["act_clip"] == "mse"
    assert settings(model, "after_relu")["act_signed"] is True
    assert settings(model, "after_relu")["act_select"] == "percentile"


def test_the_report_shows_what_quantized_layers_have_in_common() -> None:
    """An embedding is none of them, whatever the recipe would do with it."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    report = ocs.quantize(model, recipe="best", skip=None)
    assert [layer.status for layer in report.layers] == ["float", "quantized"]
    assert report.settings["rounding"] == "squant"


def test_the_paper_is_the_default() -> None:
    model, same = Norms().eval(), Norms().eval()
    report = ocs.quantize(model, wbits=3, r=0.1)
    explicit = ocs.quantize(same, wbits=3, r=0.1, recipe="paper")
    assert report.settings == explicit.settings
    assert (report.settings["rounding"], report.settings["clip"]) == ("nearest", "none")
    assert all(layer.steps == () for layer in report.quantized)
    with pytest.raises(ValueError, match="recipe='beste': use 'paper' or 'best'"):
        ocs.quantize(Norms(), recipe="beste")


def test_recurrent_layers_let_errors_cancel() -> None:
    """Which costs a row of a matrix next to nothing, whatever its inputs are."""
    model, _ = language_model.load_model()
    with pytest.warns(UserWarning, match="only 31% of the matmul weights"):  # its output layer is tied
        report = ocs.quantize(model, wbits=3, r=0.05, recipe="best")
    assert {layer.rounding for layer in report.quantized} == {"squant"}


@pytest.mark.parametrize(("bits", "margin"), [(3, 15), (2, 350)])
def test_best_is_better_than_the_paper(bits: int, margin: int) -> None:
    """Of 500 images 476 against 450 are right at three bits, 466 against 75 at two; float 472."""
    images, labels = (part[:500] for part in fashion_mnist.load("t10k"))
    correct = {}
    for recipe in ("paper", "best"):
        model = fashion_mnist.load_model()
        ocs.quantize(model, wbits=bits, r=0.05, recipe=recipe, expand=False, explain=False)
        correct[recipe] = fashion_mnist.count_correct(model, images, labels)
    assert correct["best"] > correct["paper"] + margin


# --- What each option did ---------------------------------------------------------------------------------------------


def decibels(w: torch.Tensor, q: functional.QuantizedWeight, gain: float) -> float:
    return functional.sqnr_db(float(output_power(w).sum()), float(functional.output_error(w, q, gain=gain).sum()))


def test_steps_are_what_each_option_alone_does() -> None:
    model = Norms().eval()
    w = model.after_relu.weight.detach()
    gain = 1.5 * min(max(2 * (alignment(w) - 1), 0), 1)  # three layers, a LayerNorm
    report = ocs.quantize(model, wbits=3, r=0.2, recipe="best")
    line = next(layer for layer in report.quantized if layer.name == "after_relu")
    expected = [
        functional.quantize_weight(w, 3),
        functional.quantize_weight(w, 3, 0.2),
        functional.quantize_weight(w, 3, 0.2, granularity="channel"),
        functional.quantize_weight(w, 3, 0.2, granularity="channel", rounding="squant"),
    ]
    assert [what for what, _ in line.steps] == ["nearest", "OCS", "channel", "squant", "clip auto"]
    for (_, db), q in zip(line.steps, expected, strict=False):
        assert db == pytest.approx(decibels(w, q, gain=gain))
    held = functional.QuantizedWeight(*model.after_relu.weight_state("weight"), None)
    assert line.steps[-1][1] == pytest.approx(decibels(w, held, gain=gain))
    assert sum(line.gains.values()) == pytest.approx(line.steps[-1][1])


@pytest.mark.parametrize(("norm", "gain"), [(nn.BatchNorm2d(4), 3), (nn.GroupNorm(2, 4), 1.5)])
def test_errors_of_gain_count_up_to_the_next_norm_of_single_inputs(norm: nn.Module, gain: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    w = model[3].weight.detach()
    report = ocs.quantize(model, wbits=3, clip=0.6, explain=True, skip=None)
    held = functional.QuantizedWeight(*model[3].weight_state("weight"), None)
    assert report.quantized[2].steps[-1][1] == pytest.approx(decibels(w, held, gain=gain))


@pytest.mark.parametrize(("rank", "gain"), [(4, 3.0), (None, 0.0)])
def test_the_threshold_heeds_gain_where_weights_agree(rank: int | None, gain: float) -> None:
    """Rows that share few directions pass signals on better than errors; orthogonal ones do not, and errors decide."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    w = (
        torch.nn.init.orthogonal_(torch.empty(64, 64))
        if rank is None
        else torch.randn(64, rank) @ torch.randn(rank, 64)
    )
    model[1].weight = nn.Parameter(w)
    ocs.quantize(model, wbits=2, granularity="channel", clip="auto", explain=False, progress=False)
    ints = {
        weight: quantize_plan(w, functional.plan_splits(w, 0), Scheme(2, "auto", "channel", gain=weight)).quantized.ints
        for weight in (gain, 3.0 - gain)
    }
    assert torch.equal(model[1].weight_state("weight")[0], ints[gain])
    assert not torch.equal(ints[0.0], ints[3.0])


def test_the_report_shows_them() -> None:
    model = Norms().eval()
    report = ocs.quantize(model, wbits=3, r=0.2, recipe="best")
    text = report.to_text(width=200)
    assert re.search(
        r"outputs +SQNR [\d.]+ dB on average, estimated: [\d.]+ rounding to nearest, [+-][\d.]+ by split", text
    )
    assert any(line.startswith("layer ") and "outputs dB" in line for line in text.splitlines())
    assert "outputs dB" in report.to_html()
    content = report.to_dict()
    assert content["layers"][1]["steps"][0][0] == "nearest"
    means = content["totals"]["mean_steps_db"]
    assert list(means) == ["nearest", "OCS", "channel", "squant", "clip auto"]
    assert means["OCS"] == pytest.approx(sum(layer.gains["OCS"] for layer in report.quantized) / 3)


def test_the_report_counts_roundings() -> None:
    model = nn.Sequential(Norms().eval(), nn.Embedding(9, 4), nn.Linear(4, 2))
    report = ocs.quantize(model, wbits=3, recipe="best", explain=False)
    assert "; rounding: 3 squant (1 of them without knowing their inputs), 1 nearest" in repr(report)
    assert "\nrounding  3 squant (1 of them" in str(report)
    assert "\nrounding" not in str(ocs.quantize(Norms().eval(), wbits=3))


def test_what_gptq_measured_is_not_called_unknown() -> None:
    report = ocs.quantize(
        nn.Sequential(nn.Linear(4, 2)), wbits=3, recipe="best", rounding="gptq", calibration=[torch.eye(4)]
    )
    assert "\nrounding  1 gptq\n" in str(report)


def test_steps_are_shown_where_asked_for() -> None:
    model = Norms().eval()
    report = ocs.quantize(model, wbits=3, clip=0.5, explain=True)
    assert [what for what, _ in report.quantized[0].steps] == ["nearest", "clip 0.5"]
    assert all(math.isfinite(db) for layer in report.quantized for _, db in layer.steps)
    silent = ocs.quantize(Norms().eval(), wbits=3, recipe="best", explain=False)
    assert all(layer.steps == () for layer in silent.quantized)
    assert "outputs dB" not in str(silent)


def test_naive_splits_are_a_step_of_their_own() -> None:
    report = ocs.quantize(Norms().eval(), wbits=3, r=0.2, split="naive", explain=True)
    assert [what for what, _ in report.quantized[0].steps] == ["nearest", "OCS", "naive"]


def test_steps_of_gptq_are_measured() -> None:
    """It makes the weights worse, and the outputs for inputs that go together better."""
    torch.manual_seed(0)
    x = torch.randn(200, 4) @ torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(16, 8))
    expected = model(x)
    report = ocs.quantize(model, wbits=3, rounding="gptq", explain=True, calibration=[x])
    (_, nearest), (what, compensated) = report.quantized[0].steps
    assert what == "gptq"
    assert compensated > nearest + 3
    bias = model[0].bias
    noise, signal = (float((a - b).detach().square().sum()) for a, b in ((model(x), expected), (expected, bias)))
    measured = 10 * math.log10(signal / noise)
    assert measured - 1.5 < compensated <= measured + 0.01  # the change of gain counts on top


def test_exact_weights_gain_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    report = ocs.quantize(model, wbits=3, r=0.5, clip="auto", explain=True)
    assert report.quantized[0].gains == {"nearest": math.inf, "OCS": 0.0, "clip auto": 0.0}
    assert "nan" not in str(report)


def test_explain_is_a_flag() -> None:
    with pytest.raises(ValueError, match="explain='yes': use True or False"):
        ocs.quantize(Norms().eval(), explain="yes")
