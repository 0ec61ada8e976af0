"""Oracle OCS on activations: top-1 on ImageNet by batch size, as splits are chosen from each batch itself.

Inputs at 6 bits, r = 0.02, weights at 8 bits, first layer float; beside it no OCS and the best clip method, whose
thresholds come from 512 training images.

    python benchmarks/tables/table4.py --data imagenet --device cuda --workers 8
    python benchmarks/tables/table4.py --dataset fashion-mnist --bits 6 5 4 3
"""

from __future__ import annotations

import argparse

from cells import Cell
from command import PAPER, Table, main
from table2 import clip_cells


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width; the paper has one, 6."""
    found = []
    for bits in args.bits:
        theirs = (bits, args.wbits, args.r) == (6, 8, 0.02)
        paper = PAPER["table4"] if theirs else {"batch": {}, "no_ocs": {}, "clip_best": {}}
        columns = {"clip_none": paper["no_ocs"].get(model), "clip_best": paper["clip_best"].get(model)}
        fixed = {"wbits": args.wbits, "abits": bits}
        for cell in clip_cells(bits, args.clip, fixed, "act_clip", columns):
            found.append(
                Cell(cell.row, cell.column, cell.options, cell.best_of, cell.paper, {"bits": bits}, cell.curve)
            )
        for size in args.batches:
            options = fixed | {"act_r": args.r, "act_split": "oracle", "batch": size}
            paper_value = paper["batch"].get(str(size), {}).get(model)
            axes = {"bits": bits, "batch size": size}
            found.append(Cell(f"{bits} bits", f"batch {size}", options, (), paper_value, axes, "Oracle OCS"))
    return found


TABLE = Table(
    name="table4",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: PAPER["table3"]["models"][model]["float"],
    dataset="imagenet",
    models=tuple(PAPER["table4"]["no_ocs"]),
    stands_for="ResNet-50",
    defaults={
        "bits": (6,), "r": 0.02, "batches": (1, 2, 4, 8, 32, 128), "clip": ("none", "mse", "aciq", "kl"), "wbits": 8,
        "calibration": 512,
    },
    x="batch size",
    panels="bits",
)  # fmt: skip

if __name__ == "__main__":
    main(TABLE)
