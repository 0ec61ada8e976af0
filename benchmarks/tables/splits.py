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

from beyond import beyond, rows
from cells import Cell
from command import main

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
    return rows(args, COLUMNS)


TABLE = beyond(
    "splits", __doc__, cells, bits=(6, 5, 4, 3, 2), r=(0.05,), granularity=("tensor", "channel"), calibration=512
)

if __name__ == "__main__":
    main(TABLE)
