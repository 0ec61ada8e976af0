"""What a quantized model's outputs keep of the float one's, in all and layer by layer."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from ocs.report.data import plain, write
from ocs.report.text import WORST, fitted, table, terminal_width
from ocs.report.words import counted, decibels, fine_percent, in_decibels, printable, span


@dataclass(frozen=True)
class Agreement:
    """How far one tensor is from another, over all batches.

    sqnr_db: ratio of the float tensor's power to that of the difference, in dB; inf where there is none. cosine: of the
    angle between the two, 1 at best.
    """

    name: str
    sqnr_db: float
    cosine: float
    kind: str = ""


@dataclass(frozen=True)
class Comparison:
    """A quantized model against the float one, on the same batches; see ocs.compare.

    outputs: of the model, one for each tensor that it returns. top1: share of the positions of the first output at
    which both have the largest value in the same place of the last dimension; None where that has one value. layers: of
    the quantized layers, in running order, with all errors of the layers before them.
    """

    batches: int
    outputs: tuple[Agreement, ...]
    top1: float | None
    layers: tuple[Agreement, ...] = ()

    def worst(self) -> Agreement | None:
        """Find the layer at which most is lost: whose output is furthest below that of the one before it, in dB.

        Where none is below, the first that is not exact. The first whose output is NaN, where one is; None where all
        layers are exact.
        """
        before, found, most = math.inf, None, -math.inf
        for layer in self.layers:
            if math.isnan(layer.sqnr_db):
                return layer
            lost = before - layer.sqnr_db if before < math.inf else min(0.0, 1e3 - layer.sqnr_db)
            if lost > most:
                found, most = layer, lost
            before = layer.sqnr_db
        return found

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, *, all: bool = False, width: int | None = None) -> str:
        """Write it for people: what it sums up to, the outputs, in running order the layers where most is lost.

        Args:
            all: every layer, however many and however wide.
            width: columns of text to fit into otherwise; by default the terminal's, or 80 where none looks on.
        """
        lost = losses(self)
        lines = [row_of(*each) for each in zip((*self.layers, *self.outputs), lost, strict=True)]
        columns, numbers = [*lines[0]], ("SQNR dB", "lost dB", "cosine")
        if all:
            laid_out = table([columns, *([line[name] for name in columns] for line in lines)], numbers)
            return "\n".join([self.summary(), "", *laid_out])
        width = terminal_width() if width is None else width
        shown = [*_folded(self.layers, lost, lines), *lines[len(self.layers) :]]
        laid_out = fitted(shown, columns, width, numbers, ("kind", "cosine", "lost dB"))
        return "\n".join([*textwrap.wrap(self.summary(), width), "", *laid_out])

    def summary(self) -> str:
        """Sum it up in a sentence."""
        first = self.outputs[0]
        text = f"{counted(self.batches, 'batch')}: SQNR {in_decibels(first.sqnr_db)}, cosine {first.cosine:.6f}"
        text = text if self.top1 is None else f"{text}, the same top-1 in {fine_percent(self.top1)}"
        worst = self.worst()
        return text if worst is None else f"{text}; most is lost at {printable(worst.name)}"

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain values."""
        return plain(asdict(self))

    def to_json(self) -> str:
        """Give all of it as JSON; infinite ratios are null."""
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self) -> str:
        """Make a page of its own, which needs nothing else: numbers, the layers as a chart, and a table to sort."""
        from ocs.report.html import comparison_piece, page

        return page("ocs comparison", comparison_piece(self))

    def save(self, path: str | Path) -> None:
        """Write it: JSON where the path ends in .json, a page where it ends in .html."""
        write(path, {".json": self.to_json, ".html": self.to_html})

    def _repr_html_(self) -> str:
        from ocs.report.html import comparison_piece

        return comparison_piece(self)

    def plot(self) -> Any:
        """Draw the SQNR of each layer's output, in running order; a matplotlib Figure (the extra `plot`)."""
        from ocs.report.plot import layer_agreement

        return layer_agreement(self)


def losses(comparison: Comparison) -> list[float | None]:
    """Say for each layer, then each output, how many dB are lost since the layer before it, None of the first."""
    ratios = [min(each.sqnr_db, 1e3) for each in comparison.layers]
    lost = [None, *(before - after for before, after in pairwise(ratios))] if ratios else []
    return [*lost, *(None for _ in comparison.outputs)]


def row_of(each: Agreement, lost: float | None) -> dict[str, str]:
    """Write the cells of a layer or an output, by column."""
    return {
        "output of": printable(each.name),
        "kind": each.kind,
        "SQNR dB": decibels(each.sqnr_db),
        "lost dB": "" if lost is None or math.isnan(lost) else f"{round(lost, 1) + 0.0:.1f}",  # no -0.0
        "cosine": f"{each.cosine:.6f}",
    }


def _folded(
    layers: Sequence[Agreement], losses: Sequence[float | None], lines: Sequence[dict[str, str]]
) -> list[dict[str, str]]:
    """Leave the layers at which most is lost in their order, and fold what lies between them into a line each.

    Few layers are left as they are.
    """
    if len(layers) <= 2 * WORST:
        return [*lines[: len(layers)]]
    lost = [math.inf if each is None else each for each in losses]
    most = set(sorted(range(len(layers)), key=lambda i: -lost[i])[:WORST])
    found = []
    for alone, run in groupby(range(len(layers)), key=lambda i: i in most):
        places = [*run]
        if alone or len(places) == 1:
            found += [lines[i] for i in places]
        else:
            between = dict.fromkeys(lines[0], "")
            ratios = span([layers[i].sqnr_db for i in places])
            found.append(between | {"output of": f"({len(places)} layers)", "SQNR dB": ratios})
    return found
