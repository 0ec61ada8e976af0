"""Pictures of clip thresholds: what is drawn is what functional and Statistics say (Figure 1: test_fashion_mnist).

Figures are read back from matplotlib's own objects, and saved, as some warnings come only then.
"""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from conftest import SmallNet, outlier_weight
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ocs
from ocs import functional
from ocs.calibration.statistics import Statistics
from ocs.kernels import reference
from ocs.report.plot import LINES, clip_thresholds, input_histograms

METHODS = ["none", "mse", "aciq", "aciq-release", "kl", "percentile", "std", "sawb", 0.5]


def drawn(axes: Axes) -> dict[str, float]:
    """Thresholds by method, each from a vertical line, in the order of the legend."""
    found = {}
    for line in axes.get_legend().get_lines():
        same = [own for own in axes.get_lines() if own.get_label() == line.get_label()]
        assert len(same) == 1
        (place,) = set(same[0].get_xdata())
        assert same[0].get_color() == line.get_color()
        found[line.get_label().split()[0]] = float(place)
    assert list(found.values()) == sorted(found.values())
    return found


def written(figure: Figure) -> list[list[str]]:
    """The text of each panel's legend."""
    return [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.get_axes()]


def counts(axes: Axes) -> list[np.ndarray]:
    """Of the histograms stacked in a panel."""
    return [data.values - data.baseline for data in (patch.get_data() for patch in axes.patches)]


def bars(axes: Axes) -> float:
    """All that is counted in a panel."""
    return sum(counted.sum() for counted in counts(axes))


def places(axes: Axes) -> dict[float, tuple[float, float]]:
    """Of the last histogram, by their heights, where the bars begin and end."""
    edges, heights = axes.patches[-1].get_data().edges, counts(axes)[-1]
    return {heights[i]: (edges[i], edges[i + 1]) for i in heights.nonzero()[0]}


def save(figure: Figure) -> None:
    file = io.BytesIO()
    figure.savefig(file)
    assert file.tell() > 5_000


def split_values(x: np.ndarray, r: float, groups: int = 1) -> tuple[np.ndarray, functional.SplitPlan]:
    """The halves, by the paper's procedure where there is one group."""
    plan = functional.plan_splits(x, r, groups)
    halves = reference.gather(x, plan.source, groups) * 0.5 ** plan.depth.reshape(groups, 1, -1, 1)
    return halves.astype(np.float32), plan


def seen(*inputs: torch.Tensor, channels: int | None = 4, axis: int = -1) -> Statistics:
    statistics = Statistics(axis, channels)
    for x in inputs:
        statistics.update(x)
    return statistics


# --- Weights and activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "r", "groups", "signed"), [(4, 0.0, 1, True), (2, 0.1, 1, True), (4, 0.3, 4, True), (8, 0.3, 1, False)]
)
def test_lines_are_at_the_thresholds(bits: int, r: float, groups: int, signed: bool) -> None:
    x = outlier_weight((16, 12, 3, 3))
    figure = clip_thresholds(x, bits, r, methods=METHODS, groups=groups, signed=signed, title="a layer")
    panels = figure.get_axes()
    assert len(panels) == (2 if r else 1)
    for axes, values in zip(panels, [x, split_values(x, r, groups)[0]], strict=False):
        of = {method: x if method == "aciq-release" else values for method in METHODS}  # the release clips, then splits
        want = {str(method): functional.clip_threshold(of[method], bits, method, signed) for method in METHODS}
        assert drawn(axes) == want
        assert bars(axes) == np.count_nonzero(values)


def test_the_panels_say_what_they_are() -> None:
    figure = clip_thresholds(outlier_weight((8, 10)), 4, 0.2, title="a layer")
    assert figure.get_suptitle() == "a layer"
    assert [axes.get_title(loc="left") for axes in figure.get_axes()] == [
        "4 bits, no splits", "4 bits, OCS, r = 0.2, 2 splits"
    ]  # fmt: skip
    first, second = written(figure)
    assert sorted(label.split()[0] for label in first) == sorted(functional.METHODS)
    assert second[-1] == "of split channels"
    a, b = figure.get_axes()
    assert (a.get_xlim(), a.get_ylim()) == (b.get_xlim(), b.get_ylim())
    assert a.get_yscale() == "log"


def test_marks_and_colours_tell_methods_apart() -> None:
    figure = clip_thresholds(outlier_weight((8, 10)), 4, 0.2)
    looks = [
        {line.get_label().split()[0]: (line.get_color(), line.get_marker()) for line in axes.get_legend().get_lines()}
        for axes in figure.get_axes()
    ]
    assert looks[0] == looks[1]
    for column in zip(*looks[0].values(), strict=True):
        assert len(set(column)) == len(functional.METHODS) == len(LINES)


def test_the_second_panel_holds_halves() -> None:
    x = np.full((4, 5), 0.5, np.float32)
    x[:, 2] = 8
    figure = clip_thresholds(x, 4, 0.2, methods=["none"])
    before, after = figure.get_axes()
    assert (drawn(before), drawn(after)) == ({"none": 8}, {"none": 4})
    assert [counted.sum() for counted in counts(after)] == [16, 8]
    ((height, (begin, end)),) = places(after).items()
    assert height == 8
    assert begin <= 4 <= end


@pytest.mark.parametrize(("r", "groups"), [(0.0, 1), (0.2, 1), (0.7, 1), (0.5, 4)])
def test_sqnr_is_that_of_the_quantized_weight(r: float, groups: int) -> None:
    w = outlier_weight((16, 8, 3))
    labels = written(clip_thresholds(w, 4, r, methods=["none", "mse"], groups=groups))[-1]
    for label in labels[:2]:
        method, _, sqnr, unit = label.split()
        quantized = functional.quantize_weight(w, 4, r, clip=method, split="naive", groups=groups)
        assert unit == "dB"
        assert float(sqnr) == pytest.approx(functional.sqnr_db(*functional.weight_error(w, quantized, groups)), abs=0.1)


def test_unsigned_grids_have_twice_the_points() -> None:
    x = np.abs(outlier_weight((64, 6, 5, 5)))
    (label,) = written(clip_thresholds(x, 4, methods=["none"], signed=False))[0]
    rounded = functional.fake_quantize(x, float(x.max()) / 15, 4, signed=False)
    assert float(label.split()[2]) == pytest.approx(
        functional.sqnr_db(np.sum(x**2), np.sum((x - rounded) ** 2)), abs=0.1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_drawn_as_arrays_are(dtype: torch.dtype) -> None:
    w = torch.from_numpy(outlier_weight((8, 6, 3))).to(dtype).requires_grad_()
    figure = clip_thresholds(w, 5, 0.3)
    assert written(figure) == written(clip_thresholds(w.detach().float().numpy(), 5, 0.3))


def test_zeros_are_counted_not_drawn() -> None:
    x = outlier_weight((100, 5)).clip(min=0)
    x[:, 1] = 0
    zeros = int((x == 0).sum())
    figure = clip_thresholds(x, 4, 0.2)
    before, after = figure.get_axes()
    assert before.get_title(loc="left").endswith(f"; {zeros} zeros not drawn")
    assert bars(before) == x.size - zeros
    split = split_values(x, 0.2)[0]
    assert after.get_title(loc="left").endswith(f"; {int((split == 0).sum())} zeros not drawn")


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 6), np.float32),
        np.full((4, 6, 2), 0.25, np.float32),
        (1 + 1e-6 * outlier_weight((40, 6))).astype(np.float32),
        np.pad(outlier_weight((40, 3)), ((0, 0), (0, 3))),
        np.zeros((0, 6), np.float32),
        np.zeros((4, 0), np.float32),
        np.float32([[3]]),
        np.float32([[1e-30, 0], [0, -1e-30]]),
        np.float32([[1e38, 1], [-1, 1e-30]]),
    ],
    ids=["zeros", "constant", "nearly constant", "empty channels", "no rows", "no channels", "one", "tiny", "huge"],
)
def test_edges(x: np.ndarray) -> None:
    figure = clip_thresholds(x, 4, 0.5)
    save(figure)
    for axes in figure.get_axes():
        assert len(drawn(axes)) == len(functional.METHODS)
        assert 0 < axes.get_ylim()[0] < 1 < axes.get_ylim()[1]
        labels = [line.get_label() for line in axes.get_legend().get_lines()]
        assert all((label.endswith(" dB") and "nan" not in label) or label.endswith(" exact") for label in labels)
        assert all(label.endswith("0.00    exact") for label in labels) or x.any()


def test_many_methods_fit() -> None:
    figure = clip_thresholds(outlier_weight((8, 10)), 4, 0.2, methods=[*METHODS, *np.arange(1, 17) / 17])
    save(figure)
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [axes.get_legend().get_window_extent() for axes in figure.get_axes()]
    assert all(box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert boxes[0].y0 >= boxes[1].y1
    assert all(box.x0 >= axes.get_window_extent().x1 for box, axes in zip(boxes, figure.get_axes(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a numpy array or torch tensor of float16, .*, not list"),
        ({"x": np.ones((2, 2), int)}, TypeError, "not ndarray of int"),
        ({"x": np.ones(3, np.float32)}, ValueError, "x has shape .*at least 2 dimensions"),
        ({"x": np.float32([[1, math.nan]])}, ValueError, "x holds NaN or Inf"),
        ({"x": torch.ones(2, 2, device="meta")}, ValueError, "meta"),
        ({"bits": 9}, ValueError, "bits=9: use an integer from 2 to 8"),
        ({"r": 1.5}, ValueError, "r=1.5: use a number from 0"),
        ({"groups": 3}, ValueError, "groups=3: use a positive integer that divides the 4"),
        ({"groups": 0}, ValueError, "groups=0"),
        ({"methods": ["mse", "best"]}, ValueError, "method='best': use \"none\""),
        ({"methods": [0.0]}, ValueError, r"method=0.0: .*number in \(0, 1\]"),
    ],
)
def test_errors(change: dict, error: type, message: str) -> None:
    options = {"x": np.ones((4, 4), np.float32), "bits": 4} | change
    with pytest.raises(error, match=message):
        clip_thresholds(**options)


# --- What calibration has seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("r", "groups"), [(0.0, 1), (0.25, 1), (0.25, 2)])
def test_lines_are_at_the_calibrated_thresholds(r: float, groups: int, signed: bool) -> None:
    x = torch.from_numpy(outlier_weight((500, 4))).abs() * torch.tensor([1.0, 1, 4, 1])
    x[:100] = 0
    statistics = seen(x[:200], x[200:])
    figure = input_histograms(statistics, 4, r, methods=METHODS, signed=signed, groups=groups, title="a layer")
    panels = figure.get_axes()
    assert len(panels) == (2 if r else 1)
    order = statistics.outliers().view(groups, -1).argmax(1) + torch.arange(groups) * (4 // groups)
    assert 2 in order
    for axes, split in zip(panels, [None, order], strict=False):
        assert drawn(axes) == {str(method): statistics.threshold(4, method, signed, split) for method in METHODS}
    assert bars(panels[0]) == 1600
    assert panels[0].get_title(loc="left").endswith("no splits; 400 zeros not drawn")
    if r:
        assert bars(panels[1]) == pytest.approx(1600 + 400 * groups, rel=0.02)
        assert f"OCS, r = 0.25, {groups} split" in panels[1].get_title(loc="left")


@pytest.mark.parametrize("select", ["percentile", "max"])
def test_it_splits_what_quantize_splits(net: SmallNet, select: str) -> None:
    data = [torch.randn(4, 3, 8, 8)]
    calibration = ocs.calibrate(net, data)
    figure = input_histograms(calibration["body.3"], 4, 0.3, methods=["mse"], groups=4, title="body.3", select=select)
    report = ocs.quantize(net, abits=4, act_r=0.3, act_select=select, act_clip="mse", calibration=calibration)
    layer = next(layer for layer in report.layers if layer.name == "body.3")
    assert layer.act_splits == 8
    assert drawn(figure.get_axes()[1])["mse"] == pytest.approx(layer.act_threshold, rel=1e-6)
    assert drawn(figure.get_axes()[1]) != drawn(figure.get_axes()[0])


def test_bars_are_where_the_values_were() -> None:
    x = torch.tensor([[0.5, 0, 3, 0.5]]).repeat(10, 1)
    (axes,) = input_histograms(seen(x), 4).get_axes()
    found = places(axes)
    assert set(found) == {10, 20}
    assert found[20][0] <= 0.5 <= found[20][1]
    assert found[10][0] <= 3 <= found[10][1]
    assert 3 < axes.get_xlim()[1] < 3.3


@pytest.mark.parametrize(
    "x",
    [torch.zeros(5, 4), torch.full((5, 4), 0.25), torch.eye(4)[:1].repeat(9, 1), torch.full((5, 4), 1e-38), None],
    ids=["zeros", "constant", "empty channels", "tiny", "nothing"],
)
def test_edges_of_statistics(x: torch.Tensor | None) -> None:
    figure = input_histograms(seen() if x is None else seen(x), 4, 0.5)
    save(figure)
    for axes in figure.get_axes():
        assert len(drawn(axes)) == len(functional.METHODS)
        assert axes.get_xlim()[1] > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"statistics": {}}, TypeError, "statistics must be those of one layer, .*, not dict"),
        ({"bits": 1}, ValueError, "bits=1"),
        ({"r": -1}, ValueError, "r=-1"),
        ({"r": 0.5, "select": "error"}, ValueError, "select='error': use 'percentile' or 'max'"),
        ({"methods": ["auto"]}, ValueError, "method='auto'"),
        ({"r": 0.5, "groups": 3}, ValueError, "groups=3: use a positive integer that divides the 4"),
        ({"statistics": seen(channels=None), "r": 0.5}, ValueError, "do not count single channels.*use r=0"),
    ],
)
def test_errors_of_statistics(change: dict, error: type, message: str) -> None:
    options = {"statistics": seen(torch.ones(2, 4)), "bits": 4} | change
    with pytest.raises(error, match=message):
        input_histograms(**options)
