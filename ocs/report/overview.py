"""One picture of a whole thing: a float model, a quantized one's report, a layer before or after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ocs.kernels.constants import qmax
from ocs.model.targets import find_targets
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.nn.registry import is_quantizable
from ocs.nn.weights import Weight, check_values, weights_of
from ocs.report.cells import largest_threshold, outputs_db
from ocs.report.comparison import Comparison
from ocs.report.data import LayerReport, Report
from ocs.report.plot import (
    BLUE,
    GREY,
    LINES,
    layer_agreement,
    name_places,
    new_figure,
    new_panels,
    weight_histograms,
)
from ocs.report.words import LARGEST_DB, counted, in_decibels
from ocs.weight.arguments import check_bits, check_ratio
from ocs.weight.entry import quantize_weight
from ocs.weight.error import sqnr_db, weight_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORANGE = LINES[4]
Ratios = Sequence[float | None]


def draw(what: Any, *, bits: int = 4, r: float = 0.05) -> Figure:
    """Draw a model, one of its layers, or what quantize() said of it: one picture that shows what matters most.

    A float model: what each layer keeps at so many bits, without splits and with them, one scale per tensor: where its
    outliers are. A float layer: the paper's Figure 1 of its weight, of several the one whose largest value is the most
    standard deviations out. A quantized layer: its integers on their grid, those of split channels apart. A Report: the
    error of each weight, and how far its range was narrowed. A Comparison: its plot().

        ocs.plot(model, bits=4, r=0.05)
        ocs.plot(ocs.quantize(model, wbits=4, r=0.05)).savefig("report.png")

    Args:
        what: one of these.
        bits: 2 to 8, of a float model or layer.
        r: expand ratio in [0, 1], of a float model or layer.

    Returns:
        A matplotlib Figure (the extra `plot`).

    Raises:
        TypeError: it is none of these.
        ValueError: an option is out of range, a model is quantized or has no layer to quantize, or weights have no
            values yet.
    """
    if isinstance(what, Report):
        return report_overview(what)
    if isinstance(what, Comparison):
        return layer_agreement(what)
    if not isinstance(what, nn.Module):
        kind = type(what).__name__
        raise TypeError(f"ocs.plot draws a model, a layer, a Report or a Comparison, not {kind}")
    bits, r = check_bits("bits", bits), check_ratio("r", r)
    if isinstance(what, QuantizedLayer):
        return _quantized_layer(what)
    return _float_layer(what, bits, r) if is_quantizable(what) else _float_model(what, bits, r)


# --- A whole model, layer by layer ------------------------------------------------------------------------------------


def report_overview(report: Report) -> Figure:
    """Draw the error of each quantized weight of a report, and how far its range was narrowed.

    Raises:
        ValueError: nothing was quantized.
    """
    layers = report.quantized
    if not layers:
        raise ValueError("the report has no quantized layer to draw")
    names, curves = [layer.label for layer in layers], {"weight": [layer.sqnr_db for layer in layers]}
    if any(layer.steps for layer in layers):
        curves["outputs"] = [outputs_db(layer) for layer in layers]
    kept = [_kept(layer) for layer in layers]
    panels = 2 if any(each is not None and each < 1 for each in kept) else 1
    figure, rows = new_panels(panels, 2.4 * panels + 1, "weight")
    _by_layer(rows[0], names, curves, "SQNR, dB")
    rows[0].set_title(f"{counted(len(layers), 'weight')}: {in_decibels(report.mean_sqnr_db)} on average", loc="left")
    if panels == 2:
        _by_layer(rows[1], names, {"": [None if each is None else 100 * each for each in kept]}, "% of max|w|")
        rows[1].set_title("what the grid still spans, after splitting and clipping", loc="left")
        rows[1].set_ylim(0, 105)
    return figure


def _kept(layer: LayerReport) -> float | None:
    """Divide the largest threshold of a weight by its largest value."""
    return min(largest_threshold(layer) / layer.max_before, 1.0) if layer.max_before else None


def _float_model(model: nn.Module, bits: int, r: float) -> Figure:
    model = unwrapped(model)
    if any(isinstance(module, QuantizedLayer) for _, module in named_modules(model)):
        raise ValueError("the model is quantized: draw its report, one of its layers, or the float model")
    names, before, after = [], [], []
    for target in find_targets(model):
        if not target.reason_float:
            for weight in weights_of(target.layer):
                w = _values(weight)
                names.append(target.name if weight.name == "weight" else f"{target.name}.{weight.name}")
                before.append(_decibels(w, bits, 0.0, weight.groups))
                after.append(_decibels(w, bits, r, weight.groups) if r else None)
    if not names:
        raise ValueError("the model has no layer that can be quantized")
    curves = {"no splits": before, f"r = {r:g}": after} if r else {"no splits": before}
    figure, (axes,) = new_panels(1, 3.4, "weight")
    _by_layer(axes, names, curves, "SQNR, dB")
    axes.set_title(
        f"{counted(len(names), 'weight')} at {bits} bits, one scale per tensor: higher is better", loc="left"
    )
    return figure


def _values(weight: Weight) -> Tensor:
    check_values(weight.tensor)
    return weight.tensor.float()


def _decibels(w: Tensor, bits: int, r: float, groups: int) -> float:
    return sqnr_db(*weight_error(w, quantize_weight(w, bits, r, groups=groups), groups))


def _by_layer(axes: Axes, names: Sequence[str], curves: Mapping[str, Ratios], ylabel: str) -> None:
    """Draw a line for each curve, named where it ends, over the names of the layers."""
    last = len(names) - 1
    for (label, ys), color in zip(curves.items(), (BLUE, ORANGE), strict=False):
        shown = [math.nan if y is None else min(y, LARGEST_DB) for y in ys]
        axes.plot(range(len(shown)), shown, "o-", color=color, markersize=4, linewidth=1.2, label=label)
        others = [other[last] for name, other in curves.items() if name != label and other[last] is not None]
        away = (-5 if shown[last] < others[0] else 5) if others else 0  # points, lest two names meet
        axes.annotate(
            label, (last, shown[last]), (8, away), textcoords="offset points", color=color, va="center"
        )  # fmt: skip
    name_places(axes, names)
    axes.margins(y=0.2)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# --- One layer --------------------------------------------------------------------------------------------------------


def _float_layer(layer: nn.Module, bits: int, r: float) -> Figure:
    weights = weights_of(layer)
    values = {weight.name: _values(weight) for weight in weights}
    worst = max(weights, key=lambda weight: _outlier(values[weight.name]))
    title = f"{type(layer).__name__}, {worst.name}: largest {_outlier(values[worst.name]):.0f} standard deviations out"
    return weight_histograms(values[worst.name], bits, r, groups=worst.groups, title=title)


def _outlier(w: Tensor) -> float:
    """Count how many standard deviations the largest value is out."""
    spread = float(w.std(correction=0)) if w.numel() else 0.0
    return float(w.abs().max()) / spread if spread else 0.0


def _quantized_layer(layer: QuantizedLayer) -> Figure:
    """Draw the integers of each weight, counted on a logarithmic scale; those of split channels and copies apart."""
    figure = new_figure(1.0 + 2.0 * len(layer.channels))
    rows = figure.subplots(len(layer.channels), 1, squeeze=False)[:, 0]
    most = qmax(layer.bits)
    edges = np.arange(-most - 0.5, most + 1)
    for axes, name in zip(rows, layer.channels, strict=True):
        ints, scale, source = layer.weight_state(name)
        split = _split_channels(ints, source, layer.groups)
        parts = [np.histogram(part.cpu().numpy(), edges)[0] for part in split]
        axes.stairs(parts[0] + 0.0, edges, fill=True, color=GREY, label="integers")
        if parts[1].any():
            axes.stairs(parts[0] + parts[1], edges, baseline=parts[0], fill=True, color=BLUE, label="of split channels")
            axes.legend(fontsize=8)
        axes.set_ylim(0.5, 2 * max(sum(parts).max(), 1))
        axes.set_yscale("log")
        axes.set_ylabel("count")
        copies = len(layer.source_of(name)) - layer.groups * layer.channels[name]
        step = f"one step is {float(scale):.3g}" if not scale.dim() else "a step for each output channel"
        axes.set_title(
            f"{name}: {layer.bits} bits, {counted(copies, 'channel')} added, {step}", loc="left", fontsize=10
        )
    rows[-1].set_xlabel("integer")
    return figure


def _split_channels(ints: Tensor, source: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Part integers [O, C + n, ...] into those of channels that were not split, and those of split ones and copies."""
    grouped = ints.reshape(groups, len(ints) // groups, ints.shape[1], -1)
    source = source.view(groups, -1).to(ints.device)
    split = (source.unsqueeze(2) == source.unsqueeze(1)).sum(2) > 1
    chosen = split[:, None, :, None].expand_as(grouped)
    return grouped[~chosen], grouped[chosen]
