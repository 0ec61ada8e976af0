"""Draw the pictures of the pages in docs/ again, from the tables that stand there: nothing is measured.

The command below each table says what its cells are. Where a picture's looks changed, and the hours of measuring need
not be spent again:

    python benchmarks/tables/redraw.py
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import paths  # isort: split

from cells import FLOAT
from layout import Block
from options import Table, parse
from pictures import picture
from results import MARKER, PAGES
from tasks import PERPLEXITY, SIZE, TOP1

COMMAND = re.compile(r"`python benchmarks/tables/(\w+)\.py ?([^`]*)`")
METRICS = {metric.name: metric for metric in (TOP1, PERPLEXITY, SIZE)}
NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"


def block_of(text: str) -> tuple[Table, Block] | None:
    """Read a table back from a page: what is between its markers; None of what no table's command made."""
    command = COMMAND.search(text)
    heading = re.search(r"^\*\*(.+?)\*\*; (.+)$", text, re.MULTILINE)
    if command is None or heading is None:
        return None
    table = getattr(importlib.import_module(command[1]), "TABLE", None)
    what, metric, *rest = heading[2].split("; ")
    if not isinstance(table, Table) or metric not in METRICS:
        return None
    args = parse(table, shlex.split(command[2]))
    known = heading[1] in table.models
    cells = table.cells(args, heading[1] if known else table.stands_for)
    results = _values(text)
    results[FLOAT.row, FLOAT.column] = _float("; ".join(rest))
    results |= {(cell.row, cell.column): {} for cell in cells if (cell.row, cell.column) not in results}
    same = known and args.dataset == table.dataset
    paper_float = table.paper_float(heading[1] if known else table.stands_for)
    return table, Block(heading[1], what, METRICS[metric], cells, results, "", paper_float, same)


def _float(heading: str) -> dict[str, float]:
    found = re.search(rf"float {NUMBER}(?: \({NUMBER} to {NUMBER}\))?", heading)
    if found is None:
        return {}
    return {key: float(text) for key, text in zip(("value", "low", "high"), found.groups(), strict=True) if text}


def _values(text: str) -> dict[tuple[str, str], dict[str, float]]:
    """Read our numbers from a Markdown table, by row and column."""
    lines = [[part.strip(" *") for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, found = lines[0], {}
    for line in lines[2:]:
        for column, value in zip(head, line, strict=True):
            if line[0] and column and re.fullmatch(NUMBER, value):
                found[line[0], column] = {"value": float(value)}
    return found


def main() -> None:
    """Write every picture that a page shows beside its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    for page in parser.parse_args().pages:
        for match in MARKER.finditer(page.read_text()):
            shown = re.search(r"!\[[^]]*\]\(([^)]+\.png)\)", match[0])
            read = block_of(match[0]) if shown else None
            if read is not None:
                table, block = read
                figure = picture(block, table.label, table.x, table.panels)
                figure.savefig(page.parent / shown[1], dpi=110)
                print(f"drawn: {paths.shown(page.parent / shown[1])}")


if __name__ == "__main__":
    main()
