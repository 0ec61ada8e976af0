"""What a table looks like: Markdown as in the paper with ours, the paper's and the difference; CSV; JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cells import FLOAT, Cell, Result
from tasks import Metric

FAILED = "failed"


@dataclass(frozen=True)
class Block:
    """One model's part of a table."""

    name: str
    what: str  # the data
    metric: Metric
    cells: list[Cell]
    results: Mapping[tuple[str, str], Result]
    paper_name: str = ""  # whose numbers stand beside ours
    paper_float: float | None = None
    same: bool = False  # it is the paper's network on the paper's data

    def result(self, cell: Cell) -> Result:
        """Of one cell."""
        return self.results[cell.row, cell.column]

    @property
    def float_value(self) -> float | None:
        """Of the float model."""
        return self.result(FLOAT).get("value")

    def difference(self, cell: Cell) -> float | None:
        """Ours minus the paper's; between other networks or data, of how far each is from its float model.

        That distance is in points, or in percent where the metric is one that grows with the data (perplexity).
        """
        ours = self.result(cell).get("value")
        if ours is None or cell.paper is None:
            return None
        if self.same or self.paper_float is None or self.float_value is None:
            return ours - cell.paper
        return self._change(ours, self.float_value) - self._change(cell.paper, self.paper_float)

    def _change(self, value: float, of_float: float) -> float:
        return value - of_float if self.metric.higher_is_better else 100 * (value / of_float - 1)

    @property
    def difference_name(self) -> str:
        """What difference() is, in the fewest words."""
        if self.same or self.paper_float is None:
            return "difference"
        return "difference of changes" if self.metric.higher_is_better else "difference of changes, %"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(blocks: list[Block]) -> str:
    """Every block under a line that says what it is; the best of each row is bold."""
    return "\n\n".join(f"{_heading(block)}\n\n{_table(block)}" for block in blocks)


def _heading(block: Block) -> str:
    digits, of_float = block.metric.digits, block.result(FLOAT)
    parts = [f"**{block.name}**", block.what, block.metric.name]
    if "value" in of_float and not block.metric.relative:
        value, low, high = (of_float[key] for key in ("value", "low", "high"))
        interval = f" ({low:.{digits}f} to {high:.{digits}f})" if low < high else ""
        parts.append(f"float {value:.{digits}f}{interval}")
    if halves := [
        (r["high"] - r["low"]) / 2 for r in map(block.result, block.cells) if r.get("high", 0) > r.get("low", 0)
    ]:
        parts.append(f"95 % interval of a cell ± {min(halves):.{digits}f} to {max(halves):.{digits}f}")
    if any(cell.paper is not None for cell in block.cells):
        of_paper = f", float {block.paper_float:g}" if block.paper_float is not None else ""
        parts.append(f"the paper's: {block.paper_name}{of_paper}")
    return "; ".join(parts)


def _table(block: Block) -> str:
    rows = list(dict.fromkeys(cell.row for cell in block.cells))
    columns = list(dict.fromkeys(cell.column for cell in block.cells))
    by_place = {(cell.row, cell.column): cell for cell in block.cells}
    compared = any(cell.paper is not None for cell in block.cells)
    lines = [["", *([""] if compared else []), *columns]]
    for row in rows:
        cells = [by_place.get((row, column)) for column in columns]
        ours = _bold([cell and block.result(cell).get("value", FAILED) for cell in cells], block.metric)
        lines.append([row, *(["ours"] if compared else []), *ours])
        theirs = [cell and cell.paper for cell in cells]
        if any(value is not None for value in theirs):
            lines.append(["", "paper", *_bold(theirs, block.metric, max(1, block.metric.digits - 1))])
            changes = [cell and block.difference(cell) for cell in cells]
            shown = ("" if x is None else f"{x:+.{block.metric.digits}f}" for x in changes)
            lines.append(["", block.difference_name, *shown])
    return aligned(lines)


def _bold(values: list[float | str | None], metric: Metric, digits: int | None = None) -> list[str]:
    """The numbers of a row; those that show as the best are bold."""
    digits = metric.digits if digits is None else digits
    shown = ["" if v is None else v if isinstance(v, str) else _number(v, digits) for v in values]
    numbers = [v for v in values if isinstance(v, float | int)]
    if len(numbers) < 2 or metric.relative:
        return shown
    best = _number(max(numbers) if metric.higher_is_better else min(numbers), digits)
    return [f"**{text}**" if text == best else text for text in shown]


def _number(value: float, digits: int) -> str:
    """Perplexities without bound get an exponent."""
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.0e}"


def aligned(lines: list[list[str]]) -> str:
    """A Markdown table that is readable as text, too; the first line is its head."""
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    labels = next((i for i, text in enumerate(lines[0]) if text), 1)  # columns of words
    rule = ["-" * width if i < labels else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [
            text.ljust(width) if i < labels else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


# --- For machines -----------------------------------------------------------------------------------------------------


def records(blocks: list[Block]) -> Iterator[dict[str, Any]]:
    """A flat record for every cell, the float models' too."""
    for block in blocks:
        for cell in (FLOAT, *block.cells):
            result = block.result(cell)
            yield {
                "model": block.name, "data": block.what, "metric": block.metric.name, "row": cell.row,
                "column": cell.column, **cell.axes, "value": result.get("value"), "low": result.get("low"),
                "high": result.get("high"), "float": block.float_value, "paper": cell.paper,
                "paper_model": block.paper_name if cell.paper is not None else None,
                "difference": block.difference(cell), "error": result.get("error"),
                "mean_sqnr_db": result.get("mean_sqnr_db"), "options": result.get("options"),
                "sums": result.get("sums"), "seconds": result.get("seconds"),
            }  # fmt: skip


def as_csv(blocks: list[Block]) -> str:
    """The records without what is nested."""
    rows = [{k: v for k, v in record.items() if k not in ("options", "sums", "seconds")} for record in records(blocks)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
