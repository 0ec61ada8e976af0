"""Beyond the paper: integers that are learned, block by block, and those of gptq that they start from.

Weights only, first layer float, recipe="best" with r = 0.05. On inputs without labels, and where there are BatchNorms
on inputs synthesized from their statistics, which needs no data. --seed draws other inputs.

    python benchmarks/tables/learned.py
    python benchmarks/tables/learned.py --models ViT --out build/tables/vit
    python benchmarks/tables/learned.py --dataset bible --limit 8000 --calibration 4000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse

from beyond import beyond
from cells import Cell
from command import main


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width, a column for each way to round and the inputs that it knows."""
    has_norms = args.dataset == "fashion-mnist" and model == "ResNet-20"
    known = {"": True, ", synthetic": "synthetic"} if has_norms else {"": True}
    return [
        Cell(
            f"{bits} bits",
            f"{rounding}{name}",
            {"wbits": bits, "r": 0.05, "recipe": "best", "rounding": rounding, "calibrated": inputs},
        )
        for bits in args.bits
        for name, inputs in known.items()
        for rounding in ("gptq", "learned")
    ]


TABLE = beyond("learned", __doc__, cells, bits=(3, 2), calibration=512)

if __name__ == "__main__":
    main(TABLE)
