"""What the tables beyond the paper share: the bundled networks, and rows by bits, granularity and rounding."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from cells import Cell
from command import Table

BASES = {  # what stands beside the options in question
    "nearest": {"rounding": "nearest", "clip": "none"},
    "squant": {"rounding": "squant", "clip": "auto"},
}


def beyond(
    name: str, doc: str, cells: Callable[[argparse.Namespace, str], list[Cell]], **defaults: tuple | int
) -> Table:
    """A table that the paper does not have, of this module."""
    return Table(
        name=name,
        doc=doc,
        cells=cells,
        paper_float=lambda model: None,
        dataset="fashion-mnist",
        models=("ResNet-20", "ViT"),
        stands_for="ResNet-20",
        defaults={**defaults, "streams": 10},
        datasets=("fashion-mnist", "bible"),
    )


def rows(args: argparse.Namespace, columns: Mapping[str, dict[str, Any]]) -> list[Cell]:
    """For each bit-width, granularity, ratio and base a cell for each column's options."""
    found = []
    for bits, granularity, r, base in itertools.product(args.bits, args.granularity, args.r, BASES):
        at = f", r = {r:g}" if len(args.r) > 1 else ""
        common = {"wbits": bits, "r": r, "granularity": granularity, **BASES[base]}
        row = f"{bits} bits, per {granularity}{at}, {base}"
        found += [Cell(row, column, common | options) for column, options in columns.items()]
    return found
