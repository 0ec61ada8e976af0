"""A report as text: what it sums up to, then its worst layers and groups of the rest, as wide as the terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ocs.report.cells import RIGHT_ALIGNED, cells_of, cells_of_all, columns_of
from ocs.report.summary import facts_of, grouped, left_float, left_unfolded, notes_of, what_was_done, worst_first
from ocs.report.words import counted, plural

if TYPE_CHECKING:
    from ocs.report.data import Report

WORST = 10  # layers that are shown one by one
REASONS = 5  # as many reasons are given
GIVES_WAY = (
    "kind",
    "shape",
    "size",
    "input",
    "clipped at",
    "outputs dB",
    "max |w| -> split",
    "channels+copies",
)  # in this order
SHORTEST = 12  # what is left of a name
EVERYTHING = "report.to_text(all=True)"


def report_text(report: Report, *, every: bool = False, width: int | None = None) -> str:
    """Write a report for people: what it sums up to, and its worst layers in `width` columns, or all, in any width."""
    width = terminal_width() if width is None else width
    lines = [what_was_done(report), *facts(facts_of(report), width)]
    lines += facts(_listed("float", left_float(report), every), width)
    lines += facts(_listed("note", [*notes_of(report), *left_unfolded(report)], every), width)
    if every:
        columns = columns_of(report)
        rows = [columns, *([cells_of(layer).get(name, "") for name in columns] for layer in report.layers)]
        return "\n".join([*lines, "", *table(rows, RIGHT_ALIGNED)])
    return "\n".join([*lines, *_worst(report, width)]) if report.quantized else "\n".join(lines)


def _worst(report: Report, width: int) -> list[str]:
    """Lay out the worst layers, and one line for all others of a kind."""
    layers = worst_first(report)
    shown, rest = layers[:WORST], layers[WORST:]
    alike = grouped(rest, lambda layer: (layer.kind, layer.bits))
    lines = [*map(cells_of, shown), *map(cells_of_all, alike)]
    title = f"The {len(shown)} of {counted(len(layers), 'weight')} with the lowest SQNR (all: {EVERYTHING})"
    if not rest:
        title = f"{counted(len(layers), 'weight').capitalize()}, the lowest SQNR first"
    columns = [name for name in columns_of(report) if name != "note"]
    return ["", *textwrap.wrap(title, width), *fitted(lines, columns, width, RIGHT_ALIGNED, GIVES_WAY)]


def _listed(name: str, sentences: list[str], every: bool) -> list[tuple[str, str]]:
    """Put the first sentences under a name, and count the others."""
    more = [] if every else sentences[REASONS:]
    found = [(name, text) for text in sentences[: len(sentences) - len(more)]]
    if more:
        found.append((name, f"for {len(more)} more {plural(len(more), 'reason')}, see {EVERYTHING}"))
    return found


# --- Laying out -------------------------------------------------------------------------------------------------------


def terminal_width() -> int:
    """Say how many columns the terminal has; 80 where nothing looks on."""
    try:
        looks_on = sys.stdout.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        looks_on = False
    return max(shutil.get_terminal_size().columns, 40) if looks_on else 80


def facts(named: dict[str, str] | Sequence[tuple[str, str]], width: int) -> list[str]:
    """Lay out texts behind their names, wrapped."""
    lines = []
    for name, text in named.items() if isinstance(named, dict) else named:
        wrapped = textwrap.wrap(text, max(width - 10, 30), break_on_hyphens=False)
        lines += [f"{'' if i else name:<8}  {line}" for i, line in enumerate(wrapped)]
    return lines


def fitted(
    lines: Sequence[dict[str, str]],
    columns: Sequence[str],
    width: int,
    right_aligned: Collection[str] = (),
    gives_way: Sequence[str] = (),
) -> list[str]:
    """Lay out a table in so many columns of text: some of its columns give way, then names are shortened."""
    columns = list(columns)
    for name in ("", *gives_way):
        columns = [each for each in columns if each != name]
        rows = [columns, *([line.get(each, "") for each in columns] for line in lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = width - sum(widths[1:]) - 2 * (len(widths) - 1)
        if left >= min(widths[0], 2 * SHORTEST):
            break
    names = all_shortened([row[0] for row in rows], max(left, SHORTEST))
    return table([[name, *row[1:]] for name, row in zip(names, rows, strict=True)], right_aligned)


def all_shortened(names: Sequence[str], width: int) -> list[str]:
    """Leave out the middles of names that are too long, or their beginnings where only these keep them apart."""
    found = [shortened(name, width) for name in names]
    ends = [name if len(name) <= width else f"...{name[3 - width :]}" for name in names]
    return ends if len({*ends}) > len({*found}) else found


def shortened(name: str, width: int) -> str:
    """Leave out the middle of a name that is too long."""
    if len(name) <= width:
        return name
    end = (width - 3) * 2 // 3
    return f"{name[: width - 3 - end]}...{name[-end:]}"


def table(rows: Sequence[Sequence[str]], right_aligned: Collection[str] = ()) -> list[str]:
    """Lay out rows of cells, the header first, in columns that are as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if name in right_aligned else str.ljust for name in rows[0]]
    lines = ["  ".join(pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]
