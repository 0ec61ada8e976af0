"""Beyond the paper: recipe="paper" and recipe="best" by weight bits.

Weights only, first layer float, without data; the last column estimates the norms' statistics again on a few inputs
without labels, where there are BatchNorms.

    python benchmarks/tables/recipes.py --limit 2000
    python benchmarks/tables/recipes.py --limit 2000 --models ViT --out build/tables/vit
    python benchmarks/tables/recipes.py --dataset bible --limit 8000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse

from beyond import beyond
from cells import Cell
from command import main


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width."""
    found = []
    for bits in args.bits:
        for recipe in ("paper", "best"):
            for r in args.r:
                options = {"wbits": bits, "r": r, "recipe": recipe}
                found.append(Cell(f"{bits} bits", f"{recipe}, r = {r:g}", options))
        if args.dataset == "fashion-mnist" and model == "ResNet-20":
            found.append(Cell(f"{bits} bits", "and norms measured", options | {"norms": "measured"}))
    return found


TABLE = beyond("recipes", __doc__, cells, bits=(6, 5, 4, 3, 2), r=(0.0, 0.05), calibration=512)

if __name__ == "__main__":
    main(TABLE)
