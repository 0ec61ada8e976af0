"""Pictures of what splitting does; needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ocs import functional, reference
from ocs.functional import QuantizedWeight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 201
GREY, BLUE, RED = "#9aa0a6", "#1f6fb4", "#c0392b"


def weight_histograms(w: np.ndarray | Tensor, bits: int, r: float, *, groups: int = 1, title: str = "") -> Figure:
    """The paper's Figure 1: a weight under linear quantization, under clipping, and after outlier channel splitting.

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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("ocs.plot needs matplotlib: pip install torch-ocs[plot]") from None
    w = np.asarray(w.detach().cpu().float() if isinstance(w, Tensor) else w, np.float32)
    plan = functional.plan_splits(w, r, groups)
    narrowed = float(plan.split_max.max() / plan.channel_max.max()) if plan.channel_max.max() else 1.0
    halvings = plan.depth.reshape(groups, 1, -1, 1)
    split = reference.gather(w, plan.source, groups) * np.ldexp(np.float32(1), -halvings)
    halved = np.broadcast_to(halvings > 0, split.shape)
    clipped = functional.quantize_weight(w, bits, clip=narrowed, groups=groups)
    copies = plan.source.size - groups * w.shape[1]
    panels = (
        (
            "linear: the grid reaches the largest weight",
            w,
            None,
            "",
            functional.quantize_weight(w, bits, groups=groups),
        ),
        ("clipped: outliers saturate", w, np.abs(w) > clipped.threshold * (1 + 1e-6), "saturated", clipped),
        (
            f"OCS, r = {r:g}, {copies} split{'s' * (copies != 1)}: outliers halved, the grid narrows as much",
            split,
            halved,
            "of split channels",
            functional.quantize_weight(w, bits, r, groups=groups),
        ),
    )
    figure = Figure(figsize=(8, 7), layout="constrained")
    limit = 1.05 * float(np.abs(w).max(initial=1e-12))
    rows = figure.subplots(3, 1, sharex=True, sharey=True)
    for axes, (name, values, marked, marked_as, quantized) in zip(rows, panels, strict=True):
        sqnr = functional.sqnr_db(*functional.weight_error(w, quantized, groups))
        _draw(axes, values, marked, marked_as, limit)
        _draw_grid(axes, quantized, bits)
        axes.set_title(f"{name}; SQNR {sqnr:.1f} dB", loc="left", fontsize=10)
    axes.set_xlabel("weight")
    if title:
        figure.suptitle(title)
    return figure


def _draw(axes: Axes, values: np.ndarray, marked: np.ndarray | None, marked_as: str, limit: float) -> None:
    edges = np.linspace(-limit, limit, BINS + 1)
    if marked is None:
        axes.hist(values.ravel(), edges, color=GREY, label="weights")
    else:
        parts = [values[~marked], values[marked]]
        axes.hist(parts, edges, stacked=True, color=[GREY, RED], label=["weights", marked_as])
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_ylabel("count")


def _draw_grid(axes: Axes, quantized: QuantizedWeight, bits: int) -> None:
    most = functional.qmax(bits)
    grid = np.arange(-most, most + 1) * float(quantized.scale)
    axes.vlines(grid, 0, 1, transform=axes.get_xaxis_transform(), color=BLUE, linewidth=0.6, label=f"{bits}-bit grid")
    axes.legend(loc="upper left", fontsize=8)
