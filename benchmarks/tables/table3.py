"""Activation quantization: top-1 on ImageNet under clipping and activation OCS, by bits of the layers' inputs.

Weights have 8 bits, first layer float; thresholds and splits from 512 training images.

    python benchmarks/tables/table3.py --data imagenet --device cuda --workers 8
    python benchmarks/tables/table3.py --data imagenet --device cuda --workers 8 --clip-as release
    python benchmarks/tables/table3.py --dataset fashion-mnist
"""

from __future__ import annotations

import argparse

from cells import Cell
from command import PAPER, Table, main, of_model
from table2 import clip_cells, split_cells


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width."""
    found = []
    for bits in args.bits:
        paper = of_model("table3", model).get(str(bits), {}) if args.wbits == 8 else {}
        fixed = {"wbits": args.wbits, "abits": bits}
        found += clip_cells(bits, args.clip, fixed, "act_clip", paper) + split_cells(
            bits, args.r, fixed, "act_r", paper
        )
    return found


TABLE = Table(
    name="table3",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: PAPER["table3"]["models"][model]["float"],
    dataset="imagenet",
    models=tuple(PAPER["table3"]["models"]),
    stands_for="ResNet-50",
    defaults={
        "bits": (8, 7, 6, 5, 4), "r": (0.01, 0.02, 0.05), "clip": ("none", "mse", "aciq", "kl"), "wbits": 8,
        "calibration": 512,
    },
)  # fmt: skip

if __name__ == "__main__":
    main(TABLE)
