"""Quantization-aware and naive splitting: top-1 of ResNet-20 on CIFAR-10, by weight bits and expand ratio.

Weights only, first layer float. Without CIFAR-10 at hand: --dataset fashion-mnist, the bundled network and images.

    python benchmarks/tables/table1.py --data cifar-10-batches-py --weights resnet20.pth
    python benchmarks/tables/table1.py --dataset fashion-mnist
"""

from __future__ import annotations

import argparse

from cells import Cell
from command import PAPER, Table, main

SPLITS = ("qa", "naive")
CURVES = {"qa": "quantization-aware", "naive": "naive"}


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width; without splits, then both ways of splitting at each ratio."""
    found = []
    for bits in args.bits:
        paper = PAPER["table1"]["bits"].get(str(bits), {})
        found.append(
            Cell(f"{bits} bits", "no OCS", {"wbits": bits, "r": 0.0}, axes={"bits": bits, "r": 0.0}, curve="no OCS")
        )
        for r in args.r:
            for split in SPLITS:
                options = {"wbits": bits, "r": r, "split": split}
                axes = {"bits": bits, "r": r}
                theirs = paper.get(f"{r:g}", {}).get(split)
                found.append(
                    Cell(f"{bits} bits", f"r = {r:g} {split}", options, paper=theirs, axes=axes, curve=CURVES[split])
                )
    return found


TABLE = Table(
    name="table1",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: None,  # the paper's table does not give it
    dataset="cifar10",
    models=("ResNet-20",),
    stands_for="ResNet-20",
    defaults={"bits": (6, 5, 4, 3), "r": (0.01, 0.05, 0.1, 0.2)},
    x="r",
    panels="bits",
)

if __name__ == "__main__":
    main(TABLE)
