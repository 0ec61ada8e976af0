"""Pictures of what splitting and clipping do; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ocs.calibration.statistics import Statistics
from ocs.kernels import reference
from ocs.kernels.constants import RELEASE_METHODS, SMALLEST, qmax
from ocs.report.words import LARGEST_DB, clip_method, plural
from ocs.weight.arguments import check_array, check_bits, check_choice, check_clip, check_groups, check_ratio
from ocs.weight.entry import plan_splits, quantize_weight
from ocs.weight.error import sqnr_db, weight_error
from ocs.weight.grid import fake_quantize
from ocs.weight.plan import splits_for
from ocs.weight.threshold import METHODS, clip_threshold
from ocs.weight.types import Array, QuantizedWeight, SplitPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import StepPatch

    from ocs.report.comparison import Comparison

BINS = 201
GREY, BLUE, RED = "#9aa0a6", "#1f6fb4", "#c0392b"
PALE, DARK = "#d5d8dc", "#85898e"  # bars behind coloured lines
LINES = ("#000000", "#e69f00", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe and Ito's but yellow
MARKS = "os^DvPX<>ph"
LABELS = 40  # most layers that are named

Methods = Sequence[str | float]


# --- What splitting does to a weight ----------------------------------------------------------------------------------


def weight_histograms(w: np.ndarray | Tensor, bits: int, r: float, *, groups: int = 1, title: str = "") -> Figure:
    """Draw the paper's Figure 1: a weight quantized linearly, clipped, and after outlier channel splitting.

    Each panel shows the histogram of the weights that are rounded, the k-bit grid, and the signal-to-noise ratio of the
    result. Clipping uses the threshold that splitting reaches, so that both have the same grid: clipping saturates the
    outliers, splitting keeps them.

    Args:
        w: float weight [O, C, ...].
        bits: 2 to 8.
        r: expand ratio in [0, 1].
        groups: of a grouped convolution.
        title: above the panels.
    """
    w = _as_floats(check_array("w", w, min_rank=2))
    plan = plan_splits(w, r, groups)
    narrowed = float(plan.split_max.max() / plan.channel_max.max()) if plan.channel_max.max() else 1.0
    split, halved = _halves(w, plan, groups)
    linear = quantize_weight(w, bits, groups=groups)
    clipped = quantize_weight(w, bits, clip=narrowed, groups=groups)
    saturated = np.abs(w) > clipped.threshold * (1 + 1e-6)
    copies = plan.source.size - groups * w.shape[1]
    ours = f"OCS, r = {r:g}, {copies} {plural(copies, 'split')}: outliers halved, the grid narrows as much"
    kept = quantize_weight(w, bits, r, groups=groups)
    panels = (
        ("linear: the grid reaches the largest weight", {"weights": w}, linear),
        ("clipped: outliers saturate", {"weights": w[~saturated], "saturated": w[saturated]}, clipped),
        (ours, {"weights": split[~halved], "of split channels": split[halved]}, kept),
    )
    limit = 1.05 * float(np.abs(w).max(initial=1e-12))
    figure, rows = new_panels(3, 7, "weight", title, sharey=True)
    for axes, (name, parts, quantized) in zip(rows, panels, strict=True):
        sqnr = sqnr_db(*weight_error(w, quantized, groups))
        _draw_bars(axes, parts, np.linspace(-limit, limit, BINS + 1), (GREY, RED))
        _draw_grid(axes, quantized, bits)
        axes.set_title(f"{name}; SQNR {sqnr:.1f} dB", loc="left", fontsize=10)
    return figure


def _draw_grid(axes: Axes, quantized: QuantizedWeight, bits: int) -> None:
    most = qmax(bits)
    grid = np.arange(-most, most + 1) * float(quantized.scale)
    axes.vlines(grid, 0, 1, transform=axes.get_xaxis_transform(), color=BLUE, linewidth=0.6, label=f"{bits}-bit grid")
    axes.legend(loc="upper left", fontsize=8)


# --- Where clipping would cut -----------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    title: str
    parts: Mapping[str, np.ndarray]  # magnitudes by what they are, without zeros
    thresholds: Mapping[str | float, float]  # by method
    sqnr: Mapping[str | float, float]  # dB by method, where it is known
    counts: np.ndarray | None = None  # how often each magnitude of a single part is there; None: once


def clip_thresholds(
    x: Array, bits: int, r: float = 0.0, *, methods: Methods | None = None, groups: int = 1, signed: bool = True,
    title: str = ""
) -> Figure:  # fmt: skip
    """Draw histograms of |x| with the threshold of each clip method, before and after outlier channel splitting.

    The second panel, there unless r is 0, has plain halves (split="naive") of the channels with the largest |x|, halved
    again and again: of a weight what quantize_weight clips, of activations what Oracle OCS makes of a batch. Zeros are
    counted in the titles, not drawn. The legend gives each threshold, and the signal-to-noise ratio of x once rounded
    to the k-bit grid that ends there; halves are rounded one by one, added up, and compared with x.

    Args:
        x: a float weight [O, C, ...], or a batch of activations [N, C, ...].
        bits: 2 to 8.
        r: expand ratio in [0, 1].
        methods: names and fractions as functional.clip_threshold takes them; by default functional.METHODS.
        groups: of a grouped convolution's weight; 1 for activations.
        signed: the grid is -qmax .. qmax, else 0 .. 2^k - 1.
        title: above the panels.

    Raises:
        TypeError: x is no float array or tensor.
        ValueError: x has fewer than two dimensions or holds NaN or Inf, or an option is out of range.
    """
    x = check_array("x", x, min_rank=2)
    methods, r = _check_methods(methods), check_ratio("r", r)
    largest = clip_threshold(x, bits, "none", signed)
    check_groups(groups, x.shape[0])
    x = _as_floats(x)
    panels = [_split_panel(x, bits, ratio, methods, groups, signed) for ratio in ((0.0, r) if r else (0.0,))]
    return _clip_figure(panels, np.linspace(0, 1.05 * largest or 1.0, BINS + 1), title)


def _split_panel(x: np.ndarray, bits: int, r: float, methods: Methods, groups: int, signed: bool) -> _Panel:
    plan = plan_splits(x, r, groups)
    values, halved = _halves(x, plan, groups)
    parts = {"": values[~halved], "of split channels": values[halved]} if r else {"": values}
    of = {method: x if method in RELEASE_METHODS else values for method in methods}  # as split_thresholds
    thresholds = {method: clip_threshold(of[method], bits, method, signed) for method in methods}
    sqnr = {method: _sqnr_db(x, values, plan.source, t, bits, signed) for method, t in thresholds.items()}
    zeros = values.size - int(np.count_nonzero(values))
    title = _panel_title(bits, signed, r, plan.source.size - groups * x.shape[1], zeros)
    return _Panel(title, {name: np.abs(part[part != 0]) for name, part in parts.items()}, thresholds, sqnr)


def input_histograms(
    statistics: Statistics, bits: int, r: float = 0.0, *, methods: Methods | None = None, signed: bool = True,
    groups: int = 1, title: str = "", select: Literal["percentile", "max"] = "percentile"
) -> Figure:  # fmt: skip
    """Draw histograms of what calibration has seen of a layer's inputs, with the threshold of each clip method.

    The second panel, there unless r is 0, is after halving the channels that quantize(act_r=r) splits. Zeros are
    counted in the first title, not drawn.

    Args:
        statistics: of one layer, ocs.calibrate(model, data)["its name"].
        bits: 2 to 8.
        r: expand ratio in [0, 1].
        methods: see clip_thresholds.
        signed: the grid is -qmax .. qmax, else 0 .. 2^k - 1.
        groups: of a grouped convolution.
        title: above the panels.
        select: which channels, see quantize's act_select: "percentile" or "max"; "error" needs the weights, too.

    Raises:
        TypeError: these are no statistics.
        ValueError: an option is out of range, or r is not 0 and channels were not counted one by one.
    """
    if not isinstance(statistics, Statistics):
        kind = type(statistics).__name__
        raise TypeError(f'statistics must be those of one layer, ocs.calibrate(model, data)["its name"], not {kind}')
    bits, methods, r = check_bits("bits", bits), _check_methods(methods), check_ratio("r", r)
    edges = np.linspace(0, statistics.limit or 1.0, statistics.counts.numel() + 1)
    panels = []
    for split in (None, _chosen(statistics, r, groups, select)) if r else (None,):
        if split is None:
            title_of_panel = _panel_title(bits, signed, 0.0, 0, statistics.zeros)
        else:
            title_of_panel = _panel_title(bits, signed, r, split.numel())
        thresholds = {method: statistics.threshold(bits, method, signed, split) for method in methods}
        magnitudes = {"": (edges[:-1] + edges[1:]) / 2}
        panels.append(_Panel(title_of_panel, magnitudes, thresholds, {}, statistics.split_counts(split).numpy()))
    bars = edges[:: edges.size // 256]
    return _clip_figure(panels, bars[: int(np.searchsorted(bars, 1.05 * (statistics.largest or 1.0))) + 1], title)


def _chosen(statistics: Statistics, r: float, groups: int, select: str) -> Tensor:
    """Choose the channels that quantize() splits."""
    check_choice("select", select, ("percentile", "max"))
    if not statistics.channels:
        raise ValueError(f"r={r}: these statistics do not count single channels, which are to be split: use r=0")
    check_groups(groups, statistics.channels)
    splits = splits_for(r, statistics.channels // groups, groups)
    rule = statistics.most_outliers if select == "percentile" else statistics.largest_first
    return rule(splits, groups).flatten()


def _check_methods(methods: Methods | None) -> list[str | float]:
    chosen = METHODS if methods is None else methods
    for method in chosen:
        check_clip("method", method)
    return list(dict.fromkeys(method if isinstance(method, str) else float(method) for method in chosen))


def _sqnr_db(x: np.ndarray, values: np.ndarray, source: np.ndarray, t: float, bits: int, signed: bool) -> float:
    """Measure x [O, C, ...] over what is off once its split values [groups, O / groups, C + n, K] are rounded."""
    C, groups = x.shape[1], values.shape[0]
    scale = max(t / qmax(bits + (not signed)), SMALLEST)
    error = fake_quantize(values, scale, bits, signed).astype(np.float64) - values
    for group, channels in enumerate(source.reshape(groups, -1) - C * np.arange(groups)[:, None]):
        for copy in range(C, channels.size):
            error[group, :, channels[copy]] += error[group, :, copy]
    return sqnr_db(float(np.square(x, dtype=np.float64).sum()), float(np.square(error[:, :, :C]).sum()))


def _panel_title(bits: int, signed: bool, r: float, splits: int, zeros: int = 0) -> str:
    split = f"OCS, r = {r:g}, {splits} {plural(splits, 'split')}" if r else "no splits"
    left_out = f"; {zeros:,} {plural(zeros, 'zero')} not drawn" if zeros else ""
    return f"{bits} bits{'' if signed else ' unsigned'}, {split}{left_out}"


def _clip_figure(panels: Sequence[_Panel], edges: np.ndarray, title: str) -> Figure:
    legend_height = 0.9 + 0.2 * (len(panels[0].thresholds) + 1)  # inches
    figure, rows = new_panels(len(panels), len(panels) * max(3.0, legend_height), "|x|", title, sharey=True)
    legend = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.03), "frameon": False, "alignment": "left"}
    for axes, panel in zip(rows, panels, strict=True):
        bars = _draw_bars(axes, panel.parts, edges, (PALE, DARK), panel.counts)
        lines = _draw_thresholds(axes, panel)
        heading = "method, threshold, SQNR" if panel.sqnr else "method, threshold"
        font = {"prop": {"family": "monospace", "size": 8.5}, "title_fontsize": 8.5}
        axes.legend(handles=[*lines, *bars], title=heading, **legend, **font)
        axes.set_xlim(0, edges[-1])
        axes.set_title(panel.title, loc="left", fontsize=10)
    return figure


def _draw_thresholds(axes: Axes, panel: _Panel) -> list[Line2D]:
    """Draw a line for each method, in ascending order; its mark is as far down as its line in the legend."""
    names = [*map(clip_method, panel.thresholds)]
    numbers = [f"{t:#.3g}".rstrip(".") for t in panel.thresholds.values()]
    widths = [max(map(len, column), default=0) for column in (names, numbers)]
    looks = {"markevery": [1], "markeredgecolor": "white", "markersize": 8, "linewidth": 1.3, "clip_on": False}
    lines = []
    for i, (method, t) in sorted(enumerate(panel.thresholds.items()), key=lambda item: item[1][1]):
        at = [0, 0.94 - 0.8 * len(lines) / max(len(names), 8), 1]
        label = f"{names[i]:<{widths[0]}} {numbers[i]:>{widths[1]}}"
        if method in panel.sqnr:
            label += f" {panel.sqnr[method]:5.1f} dB" if math.isfinite(panel.sqnr[method]) else "    exact"
        looks |= {"color": LINES[i % len(LINES)], "marker": MARKS[i % len(MARKS)], "label": label}
        lines += axes.plot([t] * 3, at, transform=axes.get_xaxis_transform(), zorder=3, **looks)
        looks["label"] = "_mark"  # once more, above every line
        axes.plot([t] * 3, at, transform=axes.get_xaxis_transform(), zorder=4, **looks, linestyle="none")
    return lines


# --- Drawing and splitting, for all pictures --------------------------------------------------------------------------


def _as_floats(x: Array) -> np.ndarray:
    return np.asarray(x.detach().cpu().float() if isinstance(x, Tensor) else x, np.float32)


def _halves(w: np.ndarray, plan: SplitPlan, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a weight, [groups, O / groups, C + n, K] before it is rounded, and say which of it was halved."""
    split = reference.divided(w, plan.source, plan.parts, groups)
    return split, np.broadcast_to(plan.parts.reshape(groups, 1, -1, 1) > 1, split.shape)


def new_figure(height: float) -> Figure:
    """Make an empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("ocs.plot needs matplotlib: pip install torch-ocs[plot]") from None
    return Figure(figsize=(8, height), layout="constrained")


def new_panels(
    rows: int, height: float, xlabel: str, title: str = "", *, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """Make a figure with panels one above the other, over the same places."""
    figure = new_figure(height)
    panels = figure.subplots(rows, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0]
    panels[-1].set_xlabel(xlabel)
    if title:
        figure.suptitle(title)
    return figure, panels


def name_places(axes: Axes, names: Sequence[str]) -> None:
    """Write names below 0, 1, 2 and so on, of many every so-many-th."""
    step = -(-len(names) // LABELS)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right", fontsize=8)


def _draw_bars(
    axes: Axes, parts: Mapping[str, np.ndarray], edges: np.ndarray, colors: tuple[str, str], counts: Any = None
) -> list[StepPatch]:
    """Stack histograms of values by what they are; returns a legend's handles for those that have a name."""
    below, bars = np.zeros(edges.size - 1), []
    for (name, values), color in zip(parts.items(), colors, strict=False):
        above = below + np.histogram(values, edges, weights=counts)[0]
        bars.append(axes.stairs(above, edges, baseline=below, fill=True, color=color, label=name))
        below = above
    axes.set_ylim(0.5, max(axes.get_ylim()[1], 1.5 * below.max(), 2.0))  # before: a log axis warns of no counts at all
    axes.set_yscale("log")
    axes.set_ylabel("count")
    return [bar for bar in bars if bar.get_label()]


# --- A quantized model against the float one --------------------------------------------------------------------------


def layer_agreement(comparison: Comparison) -> Figure:
    """Draw the signal-to-noise ratio of each layer's output, in running order, and that of the model's.

    Args:
        comparison: from ocs.compare, of a model of ocs layers.

    Raises:
        ValueError: it compares no layers.
    """
    if not comparison.layers:
        raise ValueError("comparison has no layers: compare a model of ocs layers, not what was lowered or exported")
    figure, (axes,) = new_panels(1, 0.5 * len(comparison.layers) ** 0.5 + 2, "layer")
    shown = [*comparison.layers, comparison.outputs[0]]
    decibels = [min(each.sqnr_db, LARGEST_DB) for each in shown]
    axes.plot(range(len(decibels) - 1), decibels[:-1], "o-", color=BLUE, markersize=4, label="output of the layer")
    axes.plot([len(decibels) - 1], decibels[-1:], "s", color=RED, label="output of the model")
    name_places(axes, [each.name for each in shown])
    axes.set_ylabel("SQNR, dB")
    axes.set_title(comparison.summary(), loc="left", fontsize=10)
    axes.legend()
    return figure
