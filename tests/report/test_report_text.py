"""Reports and comparisons as text: they fit the terminal, summary first, the worst layers, and groups of the rest."""

from __future__ import annotations

import copy
import math
import re
import sys
import warnings

import pytest
import torch
from torch import nn

import ocs
from ocs.report.comparison import Agreement, Comparison
from ocs.report.text import all_shortened, shortened, terminal_width

LONG = "model.decoder.layers.{}.encoder_attention.output_projection"


@pytest.fixture(scope="module")
def report() -> ocs.Report:
    """Thirty linear layers of long names and a convolution, some with other bits."""
    torch.manual_seed(0)
    layers = {LONG.format(i).replace(".", "_"): nn.Linear(40, 16) for i in range(30)}
    model = nn.Sequential(nn.ModuleDict(layers), nn.Conv2d(8, 4, 3))
    return ocs.quantize(model, wbits=4, r=0.05, clip="mse", overrides={"1": {"wbits": 6}, "*_layers_7_*": {"wbits": 2}})


def blocks(text: str) -> tuple[list[str], list[str]]:
    """The lines before and after the first empty one."""
    lines = text.splitlines()
    return lines[: lines.index("")], lines[lines.index("") + 1 :]


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_it_fits(report: ocs.Report, width: int) -> None:
    assert max(map(len, report.to_text(width=width).splitlines())) <= width


def test_the_summary_comes_first(report: ocs.Report) -> None:
    above = blocks(report.to_text(width=200))[0]
    assert above[0].startswith("31 layers quantized, 0 left float")
    facts = {line[:8].strip(): line[10:] for line in above[1:]}
    assert list(facts) == ["bits", "size", "splits", "error"]
    assert facts["bits"] == "2 (1 weight), 4 (29 weights), 6 (1 weight), one scale per tensor"
    splits, channels = 30 * 2 + 1, 30 * 40 + 8
    assert facts["splits"] == f"{splits} copies added to {channels} channels; the weights that run are x1.051"
    assert f"{report.mean_sqnr_db:.1f} dB on average" in facts["error"]
    worst = min(report.layers, key=lambda layer: layer.sqnr_db)
    assert f"{worst.sqnr_db:.1f} at worst ({worst.label})" in facts["error"]
    assert worst.bits == 2


def test_the_worst_layers_and_groups_of_the_rest(report: ocs.Report) -> None:
    title, head, *rows = blocks(report.to_text(width=300))[1]
    assert title == "The 10 of 31 weights with the lowest SQNR (all: report.to_text(all=True))"
    expected = sorted(report.layers, key=lambda layer: layer.sqnr_db)
    assert [row.split()[0] for row in rows[:10]] == [layer.label for layer in expected[:10]]
    assert head.split()[:2] == ["layer", "kind"]
    rest = [layer for layer in expected[10:] if layer.bits == 4]
    low, high = rest[0].sqnr_db, rest[-1].sqnr_db
    assert re.fullmatch(rf"20 more Linear .*4 +800\+40 +{low:.1f} to {high:.1f} .*KB", rows[10])
    assert rows[11].startswith("1 more Conv2d")
    assert len(rows) == 12


def test_all_are_in_the_models_order(report: ocs.Report) -> None:
    rows = blocks(report.to_text(all=True))[1]
    assert [row.split()[0] for row in rows[1:]] == [layer.label for layer in report.layers]
    first = report.layers[0]
    numbers = rf"{first.max_before:.3g} -> {first.max_after:.3g} +{first.threshold:.3g} \(mse\) +{first.sqnr_db:.1f} "
    assert re.search(rf" 40\+2 +{numbers}", rows[1])


def test_few_layers_are_all_shown() -> None:
    text = str(ocs.quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
    assert "more Linear" not in text
    assert blocks(text)[1][0] == "2 weights, the lowest SQNR first"


def test_many_reasons_are_counted() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    report = ocs.quantize(model, skip=[str(i) for i in range(8)])
    assert "for 3 more reasons, see report.to_text(all=True)" in str(report)
    assert report.to_text(all=True).count("\nfloat ") == 8
    assert report.to_text(all=True).count("(skipped)") == 8


def test_eighty_columns_where_no_terminal_looks_on(report: ocs.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert str(report) == report.to_text(width=80)
    monkeypatch.setattr(sys, "stdout", None)
    assert terminal_width() == 80


def test_a_terminals_width(report: ocs.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    assert str(report) == report.to_text(width=150) != report.to_text(width=80)


def test_names_lose_their_middle() -> None:
    name = LONG.format(11)
    short = shortened(name, 30)
    assert len(short) == 30
    assert name.startswith(short.split("...")[0])
    assert name.endswith(short.split("...")[1])
    assert shortened(name, len(name)) == name


def test_names_that_differ_in_the_middle_stay_different() -> None:
    names = [f"model.encoder.layer.{i}.attention.self.{kind}" for i in (0, 1) for kind in ("key", "value")]
    assert len({shortened(name, 25) for name in names}) == 2
    assert all_shortened(names, 25) == [f"...{name[-22:]}" for name in names]
    assert all_shortened(["a", names[0]], 25) == ["a", shortened(names[0], 25)]
    assert all_shortened(names, 99) == names


@pytest.mark.parametrize("values", [torch.zeros(3, 4), torch.full((3, 4), 7.0)], ids=["zeros", "exact"])
def test_exact_weights(values: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data = values
    report = ocs.quantize(model, wbits=4, r=0.5, explain=True)
    assert report.layers[0].sqnr_db == math.inf
    assert "exact" in str(report)
    assert not re.search(r"\b(nan|inf)\b", str(report) + report.to_text(all=True))


# --- The histograms of each weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_histograms_count_every_weight_of_a_small_layer(bits: int, granularity: str) -> None:
    torch.manual_seed(0)
    model, most = nn.Sequential(nn.Conv2d(6, 8, 3)), 2 ** (bits - 1) - 1
    with torch.no_grad():
        model[0].weight[:, 2] *= 5
    w = model[0].weight.detach().clone()
    (layer,) = ocs.quantize(model, wbits=bits, r=0.3, granularity=granularity, skip=None).layers
    found, ints = layer.histogram, model[0].weight_int
    assert found.channels == 8
    assert sum(found.before) == w.numel()
    steps = w / torch.tensor(layer.scale).reshape(-1, *[1] * 3 if granularity == "channel" else [])
    assert found.reach == pytest.approx(max(float(steps.abs().max()), most + 0.5))
    before = torch.histc(steps.double(), len(found.before), -found.reach, found.reach)
    assert (before - torch.tensor(found.before)).abs().sum() <= 4  # a value on an edge may fall to either side
    counts = torch.bincount(ints.flatten().long() + most, minlength=2 * most + 1)
    width = 3 if bits == 8 else 1
    assert list(found.after) == counts.reshape(-1, width).sum(1).tolist()


def test_large_weights_are_sampled() -> None:
    model = nn.Sequential(nn.Linear(300, 1000))
    (layer,) = ocs.quantize(model, r=0.01).layers
    assert sum(layer.histogram.before) == 300 * layer.histogram.channels
    assert sum(layer.histogram.after) == 303 * layer.histogram.channels
    assert 10 <= layer.histogram.channels <= 20


def test_no_weights_have_no_histogram() -> None:
    with warnings.catch_warnings(action="ignore"):  # torch's, of weights without elements
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(0, 3))
    assert [layer.histogram is None for layer in ocs.quantize(model).layers] == [False, True]


# --- Comparisons ------------------------------------------------------------------------------------------------------


def agreement(name: str, db: float) -> Agreement:
    return Agreement(name, db, 0.9, "Linear")


def test_layers_between_are_folded() -> None:
    ratios = [50.0 - i - (10 if i >= 20 else 0) for i in range(40)]
    layers = tuple(agreement(f"layers.{i}", db) for i, db in enumerate(ratios))
    comparison = Comparison(3, (agreement("the model", 1.0),), 0.5, layers)
    rows = [row.split() for row in blocks(str(comparison))[1][1:]]
    shown = [row[0] for row in rows]
    assert shown[0] == "layers.0"
    assert "layers.20" in shown
    assert shown[-1] == "the"
    assert sum(name.startswith("layers.") for name in shown) == 10
    assert sum(int(row[0][1:]) for row in rows if row[0].startswith("(")) == 30
    assert next(row[3] for row in rows if row[0] == "layers.20") == "11.0"
    assert len(blocks(comparison.to_text(all=True))[1]) == 1 + 40 + 1


def test_a_model_without_layers_is_compared() -> None:
    float_model = nn.Sequential(nn.Linear(3, 2))
    model = copy.deepcopy(float_model)
    ocs.quantize(model)
    text = str(ocs.compare(float_model, lambda x: model(x), torch.randn(4, 3)))
    assert text.startswith("1 batch: SQNR ")
    assert len(blocks(text)[1]) == 2


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([math.inf, math.inf], "SQNR exact, cosine 0.900000"),
        ([math.nan], "SQNR NaN, cosine 0.900000; most is lost at layers.0"),
        ([math.inf, 20.0, 30.0, math.inf], "SQNR exact, cosine 0.900000; most is lost at layers.1"),
        ([20.0, 30.0, 25.0, 24.0], "SQNR 24.0 dB, cosine 0.900000; most is lost at layers.2"),
        ([math.inf, math.nan, 2.0], "SQNR 2.0 dB, cosine 0.900000; most is lost at layers.1"),
    ],
)
def test_exact_outputs_and_nan(ratios: list[float], said: str) -> None:
    layers = tuple(agreement(f"layers.{i}", db) for i, db in enumerate(ratios))
    comparison = Comparison(1, (agreement("the model", ratios[-1]),), None, layers)
    assert comparison.summary() == f"1 batch: {said}"
    assert "\n".join(blocks(str(comparison))[0]) == comparison.summary()
    assert "most is lost at" not in comparison.to_html() or "most is lost" in said
    comparison.plot()


def test_names_stay_in_their_line() -> None:
    model = nn.ModuleDict({"two\nlines": nn.Linear(3, 3), "\x1b[31mred": nn.Linear(3, 3)})
    comparison = Comparison(1, (agreement("the model", 3.0),), None, (agreement("two\nlines", 3.0),))
    for text in (str(ocs.quantize(model)), str(comparison)):
        assert "two\\nlines" in text
        assert all(line.isprintable() for line in text.splitlines())
