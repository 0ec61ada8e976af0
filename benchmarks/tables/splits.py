"""Beyond the paper: which channels are split, and which layers get the splits, by weight bits.

Weights only, first layer float. Channels by the largest weight (max, the paper's) or by the error that is left (error);
splits uniform, by the paper's knapsack, or where they lower the model's error most per byte, without data or weighed
by what moves the model's outputs on a few inputs (measured). All columns have the same size. Rows: nearest rounding
without clipping, and squant with clip="auto".

    python benchmarks/tables/splits.py --limit 2000
    python benchmarks/tables/splits.py --dataset bible --limit 8000 --calibration 4000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse
import itertools

from cells import Cell
from command import Table, main

BASES = {  # what stands beside the options in question
    "nearest": {"rounding": "nearest", "clip": "none"},
    "squant": {"rounding": "squant", "clip": "auto"},
}
COLUMNS = {
    "max": {},
    "select error": {"select": "error"},
    "knapsack": {"allocate": "knapsack"},
    "allocate error": {"allocate": "error"},
    "both error": {"select": "error", "allocate": "error"},
    "both, measured": {"select": "error", "allocate": "error", "calibrated": True},
}


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width, granularity and base."""
    del model  # the paper has none of this
    found = []
    for bits, granularity, r, base in itertools.product(args.bits, args.granularity, args.r, BASES):
        at = f", r = {r:g}" if len(args.r) > 1 else ""
        common = {"wbits": bits, "r": r, "granularity": granularity, **BASES[base]}
        row = f"{bits} bits, per {granularity}{at}, {base}"
        found += [Cell(row, column, common | options) for column, options in COLUMNS.items()]
    return found


TABLE = Table(
    name="splits",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: None,
    dataset="fashion-mnist",
    models=("ResNet-20", "ViT"),
    stands_for="ResNet-20",
    defaults={"bits": (4, 3, 2), "r": (0.05,), "granularity": ("tensor", "channel"), "calibration": 512, "streams": 10},
    datasets=("fashion-mnist", "bible"),
)

if __name__ == "__main__":
    main(TABLE)
