"""ocs.plot of a model, a layer, a report, a comparison: what is drawn is what functional and the report say."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Everything, SmallNet
from matplotlib.axes import Axes
from torch import nn

import ocs
from ocs import functional


def curves(axes: Axes) -> dict[str, list[float]]:
    return {line.get_label(): [*map(float, line.get_ydata())] for line in axes.lines}


def names(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_xticklabels()]


def save(figure: Any) -> None:
    figure.savefig(io.BytesIO())


def test_one_import_is_enough() -> None:
    code = (
        "import ocs, sys; ocs.plot.weight_histograms; assert callable(ocs.plot); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "Draw a model" in ocs.plot.__call__.__doc__


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, net: SmallNet) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for what in (net, net.head, ocs.quantize(copy.deepcopy(net))):
        with pytest.raises(ImportError, match=r"pip install torch-ocs\[plot\]"):
            ocs.plot(what)


def test_a_report(net: SmallNet) -> None:
    report = ocs.quantize(net, wbits=4, r=0.2, clip="mse", explain=True)
    figure = report.plot()
    save(figure)
    top, bottom = figure.axes
    drawn = curves(top)
    assert drawn["weight"] == pytest.approx([layer.sqnr_db for layer in report.quantized])
    assert drawn["outputs"] == pytest.approx([layer.steps[-1][1] for layer in report.quantized])
    (kept,) = curves(bottom).values()
    assert kept == pytest.approx([100 * layer.threshold / layer.max_before for layer in report.quantized])
    assert names(bottom) == [layer.label for layer in report.quantized]
    assert curves(ocs.plot(report).axes[0]) == drawn


def test_a_report_of_whole_ranges_has_one_panel() -> None:
    report = ocs.quantize(nn.Sequential(nn.Linear(4, 4)))
    assert len(report.plot().axes) == 1
    with pytest.raises(ValueError, match="no quantized layer"):
        ocs.Report(()).plot()


@pytest.mark.parametrize("r", [0.0, 0.3])
def test_a_float_model(net: SmallNet, r: float) -> None:
    state = copy.deepcopy(net.state_dict())
    figure = ocs.plot(net, bits=3, r=r)
    save(figure)
    (axes,) = figure.axes
    drawn = curves(axes)
    assert list(drawn) == ["no splits", f"r = {r:g}"][: 1 + (r > 0)]
    assert names(axes) == ["stem", "body.0", "body.3", "body.5", "head"]
    w = net.body[3].weight
    for label, ratio in zip(drawn, (0.0, r), strict=False):
        quantized = functional.quantize_weight(w, 3, ratio, groups=4)
        expected = functional.sqnr_db(*functional.weight_error(w, quantized, 4))
        assert drawn[label][2] == pytest.approx(expected)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())


def test_every_kind_of_layer() -> None:
    model = Everything()
    save(ocs.plot(model, r=0.1))
    report = ocs.quantize(model, wbits=4, r=0.1, embeddings=True, granularity="channel")
    save(report.plot())
    for module in model.modules():
        if isinstance(module, ocs.nn.QuantizedLayer):
            assert len(ocs.plot(module).axes) == len(module.channels)


def test_a_float_layer_is_figure_1() -> None:
    layer = nn.LSTM(8, 6)
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = 9
    figure = ocs.plot(layer, bits=3, r=0.2)
    assert len(figure.axes) == 3
    assert figure.get_suptitle().startswith("LSTM, weight_hh_l0: largest ")


@pytest.mark.parametrize("groups", [1, 4])
def test_a_quantized_layer(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups))
    ocs.quantize(model, wbits=4, r=0.3, skip=None)
    (axes,) = ocs.plot(model[0]).axes
    plain, split = (patch.get_data().values - np.asarray(patch.get_data().baseline) for patch in axes.patches)
    counts = torch.bincount(model[0].weight_int.flatten().long() + 7, minlength=15)
    assert (plain + split).tolist() == counts.tolist()
    copies = len(model[0].source) - 8
    channels = len(set(model[0].source[model[0].channels["weight"] :].tolist())) if groups == 1 else None
    if channels:
        assert split.sum() == (copies + channels) * 8 * 9
    assert f"{copies} channel" in axes.get_title(loc="left")


def test_packed_layers_and_comparisons(net: SmallNet) -> None:
    float_net = copy.deepcopy(net)
    ocs.quantize(net, wbits=4, r=0.2)
    comparison = ocs.compare(float_net, net, torch.randn(2, 3, 8, 8))
    assert ocs.plot(comparison).axes[0].get_ylabel() == "SQNR, dB"
    before = ocs.plot(net.head).axes[0].patches[0].get_data().values
    ocs.pack(net)
    assert np.array_equal(ocs.plot(net.head).axes[0].patches[0].get_data().values, before)


@pytest.mark.parametrize(
    ("what", "options", "error", "message"),
    [
        (3, {}, TypeError, "ocs.plot draws a model, a layer, a Report or a Comparison, not int"),
        (torch.ones(3, 3), {}, TypeError, "not Tensor"),
        (nn.Sequential(nn.ReLU()), {}, ValueError, "no layer that can be quantized"),
        (nn.Linear(2, 2), {"bits": 9}, ValueError, "bits=9"),
        (nn.Linear(2, 2), {"r": 2}, ValueError, "r=2"),
        (nn.LazyLinear(2), {}, ValueError, "holds no values yet"),
        (nn.Sequential(nn.Linear(2, 2, device="meta")), {}, ValueError, "holds no values yet"),
    ],
)
def test_what_cannot_be_drawn(what: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ocs.plot(what, **options)


def test_a_quantized_model_names_the_way_out(net: SmallNet) -> None:
    ocs.quantize(net)
    with pytest.raises(ValueError, match="is quantized: draw its report, one of its layers, or the float model"):
        ocs.plot(net)
