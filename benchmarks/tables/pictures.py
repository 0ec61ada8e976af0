"""A table as a picture: how far below the float model its curves are, and from where on it is no chance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cells import FLOAT, Cell
from layout import Block

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's but yellow
MARKS = "os^Dv<p"
NAMES = {"r": "expand ratio r", "bits": "bits"}
TICKS = (-2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
LEAST_GAP = 0.065  # between two names beside a panel, of its height
Curves = Mapping[str, Mapping[float, float]]


def picture(block: Block, title: str, x: str = "bits", panels: str = "") -> Figure | None:
    """Draw the distance to float over x, a panel for each value of another axis; None where there is nothing to see.

    A cell belongs to the curve that it names, of several at one place the best; one without a name is not drawn. What a
    curve has only one value of is a level line. Names stand where the curves end, so these should be few.
    """
    from matplotlib.figure import Figure

    cells = [cell for cell in block.cells if cell.curve and "value" in block.result(cell)]
    if len({cell.axes[x] for cell in cells if x in cell.axes}) < 2:
        return None
    values = sorted({cell.axes[panels] for cell in cells if panels in cell.axes}, reverse=True) or [None]
    figure = Figure(figsize=(3.6 * len(values) + 3.4, 4.4), layout="constrained")
    rows = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(cell.curve for cell in cells))
    looks = {name: (COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}
    drawn = []
    for value, axes in zip(values, rows, strict=True):
        inside = [cell for cell in cells if value is None or cell.axes.get(panels) == value]
        drawn.append(_curves(block, inside, x))
        _draw(axes, block, inside, x, drawn[-1], looks)
        if value is not None:
            axes.set_title(f"{value:g} {panels}" if panels == "bits" else f"{panels} = {value:g}", loc="left")
    _scale(rows, linear=block.metric.relative)
    if any(axes.patches for axes in rows):
        note = "grey: 95 % interval of the float model"
        rows[0].text(0.01, 0.01, note, transform=rows[0].transAxes, fontsize=8, color="#555555")
    _name(rows[-1], drawn[-1], looks, x)
    rows[0].set_ylabel(_meaning(block))
    figure.suptitle(f"{title}: {block.name}, {block.what}", fontsize=11, wrap=True)
    return figure


def _meaning(block: Block) -> str:
    if block.metric.relative:
        return "% larger"
    if block.float_value is None:
        return block.metric.name
    of = re.sub(r" %$", "", block.metric.name)
    if block.metric.higher_is_better:
        return f"points of {of} lost (0: the float model)"
    return f"% of {of} added (0: the float model)"


def _distance(block: Block, value: float, of_float: float | None) -> float:
    """How far a value is from the float model's, to the worse: in points, or in percent of what grows with the data."""
    if block.metric.relative:
        return 100 * (value - 1)
    if of_float is None:
        return value
    return of_float - value if block.metric.higher_is_better else 100 * (value / of_float - 1)


def _curves(block: Block, cells: list[Cell], x: str) -> dict[str, dict[float, float]]:
    """Distances of each curve by place; what has no place of its own has the first."""
    places = [cell.axes[x] for cell in cells if x in cell.axes]
    found: dict[str, dict[float, list[dict]]] = {}
    for cell in cells:
        found.setdefault(cell.curve, {}).setdefault(cell.axes.get(x, min(places)), []).append(block.result(cell))
    return {
        name: {
            at: _distance(block, block.metric.best(results)["value"], block.float_value)
            for at, results in sorted(curve.items())
        }
        for name, curve in found.items()
    }


def _draw(
    axes: Axes, block: Block, cells: list[Cell], x: str, curves: Curves, looks: Mapping[str, tuple[str, str]]
) -> None:
    of_float = block.result(FLOAT)
    if block.metric.higher_is_better and of_float.get("high", 0) > of_float.get("low", 0):
        low, high = (of_float["value"] - of_float[end] for end in ("high", "low"))
        axes.axhspan(low, high, color="#000000", alpha=0.07, linewidth=0)
    axes.axhline(0, color="#666666", linewidth=1)
    for name, curve in curves.items():
        color, mark = looks[name]
        if len(curve) == 1:
            axes.axhline(*curve.values(), color=color, linewidth=1.3, linestyle="--")
        else:
            axes.plot([*curve], [*curve.values()], color=color, marker=mark, markersize=5, linewidth=1.6)
    theirs = [cell for cell in cells if block.same and cell.paper is not None and x in cell.axes]
    for cell in theirs:
        y = _distance(block, cell.paper, block.paper_float if block.paper_float is not None else block.float_value)
        axes.plot(cell.axes[x], y, looks[cell.curve][1], color=looks[cell.curve][0], fillstyle="none", markersize=9)
    if x == "batch size":
        axes.set_xscale("log", base=2)
    places = sorted({place for curve in curves.values() if len(curve) > 1 for place in curve})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.margins(x=0.08)
    axes.minorticks_off()
    axes.set_xlabel(NAMES.get(x, x) + (" (hollow: the paper's)" if theirs else ""))
    if x == "bits":
        axes.invert_xaxis()  # fewer to the right, where curves part
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(panels: Sequence[Axes], *, linear: bool) -> None:
    """Show both what is lost of a point and what is lost of all: linear to 1, logarithmic beyond."""
    values = [float(y) for axes in panels for line in axes.lines for y in line.get_ydata()]
    axes, low, high = panels[0], min(values), max(values)
    if high > 6 and not linear:
        axes.set_yscale("symlog", linthresh=1, linscale=0.7)
        axes.set_ylim(min(1.3 * low, -0.3), 1.35 * high)
        ticks = [tick for tick in TICKS if low - 0.3 <= tick <= 1.35 * high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        room = 0.07 * (high - low) or 0.5
        axes.set_ylim(low - room, high + room)


def _name(axes: Axes, curves: Curves, looks: Mapping[str, tuple[str, str]], x: str) -> None:
    """Write each curve's name beside its end, none over another."""
    ends = {name: curve[min(curve) if x == "bits" else max(curve)] for name, curve in curves.items()}
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: to_axes.transform((axes.get_xlim()[1], y))[1] for name, y in ends.items()}
    order = sorted(heights, key=heights.__getitem__)
    at = [heights[name] for name in order]
    for _ in range(200):  # until none is too near
        for i in range(len(at) - 1):
            missing = LEAST_GAP - (at[i + 1] - at[i])
            if missing > 1e-6:
                at[i], at[i + 1] = max(at[i] - missing / 2, 0), at[i + 1] + missing / 2
    for name, height in zip(order, at, strict=True):
        axes.annotate(
            name, (1, heights[name]), (1.06, height), "axes fraction", "axes fraction", color=looks[name][0],
            va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": looks[name][0], "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip
