"""Small pictures for pages, drawn from numbers alone; colours and fonts are the page's (page.css)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from ocs.kernels.constants import qmax
from ocs.report.data import LayerReport
from ocs.report.words import LARGEST_DB, printable

WIDTH, HEIGHT, GAP = 360, 74, 16  # of a histogram, and below it
MOST_LINES = 63  # of a grid; finer ones are no lines any more
CHART, LEFT = (720, 180), 34  # width and height, and what numbers take of it


def histogram_pair(layer: LayerReport) -> str:
    """Draw a weight's histograms before and after, one above the other over the grid, counts on a logarithmic scale."""
    histogram, most = layer.histogram, qmax(layer.bits)
    end = max(histogram.reach, most + 0.5)
    if isinstance(layer.scale, float):
        end = max(end, layer.max_before / layer.scale)
    bottom, height = HEIGHT, 2 * HEIGHT + 2 * GAP
    marks = _grid(most, end, height - GAP)
    marks += _bars(histogram.before, histogram.reach, end, bottom, most)
    marks += _bars(histogram.after, most + 0.5, end, height - GAP, most)
    for base in (bottom, height - GAP):
        marks += f'<path class="axis" d="M0 {base + 0.5}H{WIDTH}"/>'
    ticks = sorted({-most, 0, most} | ({-round(end), round(end)} if end > 1.35 * most + 2 else set()))
    for tick in ticks:
        marks += f'<text x="{_x(tick, end):.1f}" y="{height - 4}" text-anchor="middle">{tick}</text>'
    if end > 1.001 * max(histogram.reach, most + 0.5):  # the largest weight is not among those counted
        ends = "".join(f"M{_x(sign * end, end):.1f} {bottom}v-9" for sign in (-0.995, 0.995))
        marks += f'<path class="most" d="{ends}"/>'
        marks += f'<text class="mark" x="{WIDTH}" y="{bottom - 13}" text-anchor="end">&#177; max |w|</text>'
    marks += f'<text x="0" y="9">before</text><text x="0" y="{bottom + GAP + 9}">after</text>'
    label = f"Histograms of {printable(layer.label)} before and after, in steps of its grid"
    return f'<svg viewBox="-8 0 {WIDTH + 16} {height}" role="img" aria-label="{escape(label)}">{marks}</svg>'


def _x(value: float, end: float) -> float:
    return WIDTH / 2 * (1 + value / end)


def _grid(most: int, end: float, bottom: float) -> str:
    """Draw the points of the grid, where they are few, and where it ends."""
    points = range(-most, most + 1) if 2 * most + 1 <= MOST_LINES else ()
    lines = "".join(f"M{_x(point, end):.1f} 0V{bottom}" for point in points)
    ends = "".join(f"M{_x(point, end):.1f} 0V{bottom}" for point in (-most, most))
    return f'<path class="grid" d="{lines}"/><path class="end" d="{ends}"/>'


def _bars(counts: Sequence[int], reach: float, end: float, bottom: int, most: int) -> str:
    """Draw steps over equal parts of -reach .. reach; those beyond the grid in another colour."""
    width, highest, paths = 2 * reach / len(counts), math.log1p(max(counts)), {"counts": "", "beyond": "", "": ""}

    def kind(i: int) -> str:
        beyond = abs(-reach + (i + 0.5) * width) > most + 0.5
        return ("beyond" if beyond else "counts") if counts[i] else ""

    for name, run in groupby(range(len(counts)), kind):
        steps = [*run]
        paths[name] += f"M{_x(-reach + steps[0] * width, end):.1f} {bottom}"
        for i in steps:
            height = max((HEIGHT - 12) * math.log1p(counts[i]) / highest, 1.5)
            paths[name] += f"V{bottom - height:.0f}h{WIDTH / 2 * width / end:.2f}"
        paths[name] += f"V{bottom}"
    return "".join(f'<path class="{name}" d="{paths[name]}"/>' for name in ("counts", "beyond"))


def decibels_by_layer(names: Sequence[str], curves: Sequence[Sequence[float | None]]) -> str:
    """Draw up to two signal-to-noise ratios of each layer, in the order given; the lowest of the first is named.

    Each curve has a ratio in dB for each layer, None where it is not known; exact layers are left out.
    """
    shown = [[_shown(y) for y in ys] for ys in curves]
    if all(y is None for y in shown[0]):
        return ""
    ticks = _ticks([y for ys in shown for y in ys if y is not None])
    step = (CHART[0] - LEFT - 10) / max(len(names) - 1, 1)

    def place(i: int, y: float) -> tuple[float, float]:
        return LEFT + 5 + i * step, CHART[1] * (1 - (y - ticks[0]) / (ticks[-1] - ticks[0]))

    marks = _levels({tick: place(0, tick)[1] for tick in ticks})
    for number, ys in enumerate(shown):
        points = [(*place(i, y), f"{names[i]}: {y:.1f} dB") for i, y in enumerate(ys) if y is not None]
        marks += _curve(points, "second " if number else "")
    lowest = min((i for i, y in enumerate(shown[0]) if y is not None), key=lambda i: shown[0][i])
    marks += _named(f"lowest: {_short(names[lowest])}, {shown[0][lowest]:.1f}", *place(lowest, shown[0][lowest]))
    label = f"Signal-to-noise ratio in dB of {len(names)} layers, in order"
    view = f"0 -10 {CHART[0] + 4} {CHART[1] + 28}"
    return f'<svg class="chart" viewBox="{view}" role="img" aria-label="{label}">{marks}</svg>'


def _shown(db: float | None) -> float | None:
    return None if db is None or not math.isfinite(db) else max(min(db, LARGEST_DB), -LARGEST_DB)


def _levels(heights: Mapping[float, float]) -> str:
    """Draw a line at each of these heights, with its number, and say below where the layers begin and end."""
    lines = "".join(
        f'<path class="axis" d="M{LEFT} {y:.1f}H{CHART[0]}"/>'
        f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{tick:g}</text>'
        for tick, y in heights.items()
    )
    below = CHART[1] + 14
    ends = (
        f'<text x="{LEFT}" y="{below}">first layer</text><text x="{CHART[0]}" y="{below}" text-anchor="end">last</text>'
    )
    return lines + ends


def _ticks(values: Sequence[float]) -> list[float]:
    """Choose round numbers that enclose the values."""
    low, high = min(values), max(values)
    step = next(each for each in (0.5, 1, 2, 5, 10, 20, 50, 100) if (high - low) / each <= 5)
    first, last = math.floor(low / step - 0.4), math.ceil(high / step)  # below the lowest stands its name
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _curve(points: Sequence[tuple[float, float, str]], kind: str) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points) if points else ""
    dots = "".join(
        f'<circle class="{kind}dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(title)}</title></circle>'
        for x, y, title in points
    )
    return f'<path class="{kind}curve" d="{path}"/>{dots}'


def _named(text: str, x: float, y: float) -> str:
    """Write beside a point, so that it stays in the picture."""
    anchor = "start" if x < CHART[0] / 3 else "end" if x > 2 * CHART[0] / 3 else "middle"
    at = y + 14 if y < CHART[1] - 16 else y - 8
    return f'<text class="mark" x="{x:.1f}" y="{at:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:12]}...{name[-25:]}"
