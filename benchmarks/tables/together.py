"""Beyond the paper: weights and inputs with few bits together, by how weights are rounded and inputs are split.

recipe="best" with r = 0.05, thresholds of inputs from images without labels, the first convolution float. ViT-called is
the ViT as layers that are called, whose inputs can all be quantized.

    python benchmarks/tables/together.py
    python benchmarks/tables/together.py --models ViT-called ViT --bits 4 --out build/tables/vit
"""

from __future__ import annotations

import argparse

from cells import Cell
from command import Table, main

ABITS = {4: (8, 4), 3: (3,), 2: (4,)}  # of inputs, by bits of weights
SPLIT = {"act_r": 0.05}
GPTQ = {"rounding": "gptq", "calibrated": True}
LEARNED = {"rounding": "learned", "calibrated": True}
COLUMNS = {
    "best": {},
    "best, inputs split": SPLIT,
    "gptq": GPTQ,
    "gptq, inputs split": GPTQ | SPLIT,
    "learned": LEARNED,
    "learned, inputs split": LEARNED | SPLIT,
}


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each pair of bits."""
    del model  # all networks have the same columns
    return [
        Cell(
            f"{wbits} bits, inputs of {abits}",
            column,
            {"wbits": wbits, "abits": abits, "recipe": "best", "r": 0.05} | more,
        )
        for wbits in args.bits
        for abits in ABITS.get(wbits, (wbits,))
        for column, more in COLUMNS.items()
    ]


TABLE = Table(
    name="together",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: None,
    dataset="fashion-mnist",
    models=("ResNet-20", "ViT-called"),
    stands_for="ResNet-20",
    defaults={"bits": (4, 3, 2), "calibration": 512},
)

if __name__ == "__main__":
    main(TABLE)
