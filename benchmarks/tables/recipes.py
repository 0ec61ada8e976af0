"""Beyond the paper: recipe="paper" and recipe="best" by weight bits, and what more a few inputs give.

Weights only, first layer float, without data. The last columns go on from recipe="best" at the largest ratio: where
there are BatchNorms, their statistics are estimated again, or rounding is by the second moments of inputs (gptq), both
on inputs synthesized from these statistics, which needs no data; the same, and both together, on a few measured inputs
without labels.

    python benchmarks/tables/recipes.py --limit 2000
    python benchmarks/tables/recipes.py --limit 2000 --models ViT --out build/tables/vit
    python benchmarks/tables/recipes.py --dataset bible --limit 8000 --calibration 4000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse

from beyond import beyond
from cells import Cell
from command import main

GPTQ = {"rounding": "gptq", "calibrated": True}
MORE = {
    "norms, synthetic": {"norms": "synthetic"},
    "gptq, synthetic": GPTQ | {"calibrated": "synthetic"},
    "norms, measured": {"norms": "measured"},
    "gptq": GPTQ,
    "gptq, norms measured": GPTQ | {"norms": "measured"},
}


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width."""
    found, has_norms = [], args.dataset == "fashion-mnist" and model == "ResNet-20"
    for bits in args.bits:
        columns = {}
        for recipe in ("paper", "best"):
            for r in args.r:
                options = {"wbits": bits, "r": r, "recipe": recipe}
                columns[f"{recipe}, r = {r:g}"] = options
        columns |= {column: options | given for column, given in MORE.items() if has_norms or given == GPTQ}
        found += [
            Cell(f"{bits} bits", column, given, axes={"bits": bits}, curve=_curve(column))
            for column, given in columns.items()
        ]
    return found


def _curve(column: str) -> str:
    """Name what is drawn: the recipes, and the best that little data gives."""
    return "" if "norms" in column or column == "gptq, synthetic" else column


TABLE = beyond("recipes", __doc__, cells, bits=(6, 5, 4, 3, 2), r=(0.0, 0.05), calibration=512)

if __name__ == "__main__":
    main(TABLE)
