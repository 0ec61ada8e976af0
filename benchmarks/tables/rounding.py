"""Beyond the paper: rounding that lets errors cancel, with the threshold that suits it, by weight bits.

Weights only, first layer float, no data. Nearest rounding and rounding="squant", with the largest weight as threshold
(none), the least squared error (mse), and the least error of the layer's outputs (auto).

    python benchmarks/tables/rounding.py --limit 2000
    python benchmarks/tables/rounding.py --dataset bible --limit 8000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse

from beyond import beyond
from cells import Cell
from command import main

COLUMNS = [(rounding, clip) for rounding in ("nearest", "squant") for clip in ("none", "mse", "auto")]


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width, granularity and ratio."""
    del model  # the paper has none of this
    found = []
    for bits in args.bits:
        for granularity in args.granularity:
            for r in args.r:
                row = f"{bits} bits, per {granularity}, r = {r:g}"
                for rounding, clip in COLUMNS:
                    options = {"wbits": bits, "r": r, "granularity": granularity, "rounding": rounding, "clip": clip}
                    found.append(Cell(row, f"{rounding}, {clip}", options))
    return found


TABLE = beyond("rounding", __doc__, cells, bits=(8, 7, 6, 5, 4, 3, 2), r=(0.0, 0.05), granularity=("tensor", "channel"))

if __name__ == "__main__":
    main(TABLE)
