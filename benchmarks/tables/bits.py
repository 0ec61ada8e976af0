"""Beyond the paper: bits and splits of each layer under one size for the model, wbits="auto".

Weights only, first layer float, recipe="paper" or "best". Uniform: every layer has the bits of the row. Auto: each
layer its own, in the same bytes as uniform; without data, or weighed by what moves the model's outputs on a few inputs
(measured). Where there are BatchNorms, also with biases corrected by what these say (bias), and weighed by, rounded by
(gptq) and with norms measured again on inputs synthesized from them: no data either.

    python benchmarks/tables/bits.py --limit 2000
    python benchmarks/tables/bits.py --dataset bible --limit 8000 --calibration 4000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse

from beyond import beyond
from cells import Cell
from command import main

COLUMNS = {"auto": {}, "auto, measured": {"calibrated": True}}
OF_NORMS = {
    "auto, bias": {"correct_bias": True},
    "auto, gptq, synthetic": {"rounding": "gptq", "calibrated": "synthetic", "norms": "synthetic"},
}


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each size."""
    has_norms = args.dataset == "fashion-mnist" and model == "ResNet-20"
    columns = COLUMNS | (OF_NORMS if has_norms else {})
    found = []
    for recipe in ("paper", "best"):
        for bits in args.bits:
            for r in args.r:
                common, row = {"recipe": recipe, "r": r}, f"{recipe}, size of {bits} bits, r = {r:g}"
                found.append(Cell(row, "uniform", common | {"wbits": bits}))
                found += [Cell(row, column, common | {"size_of": bits} | more) for column, more in columns.items()]
    return found


TABLE = beyond("bits", __doc__, cells, bits=(6, 5, 4, 3, 2), r=(0.0, 0.05), calibration=512)

if __name__ == "__main__":
    main(TABLE)
