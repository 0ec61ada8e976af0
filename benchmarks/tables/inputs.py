"""Activation OCS by which channels are split: accuracy under clipping, splits, and both, by bits of the layers' inputs.

As the paper's Table 3, with a row for each rule: "percentile" is the paper's (section 5.3), "max" what it does for
weights, "error" by the estimated error of the layer's outputs. The last columns find the threshold after the splits, by
the method that --clip names last. ViT-called is the ViT as layers that are called: torch's encoder layer reads the
weights of its linear layers itself, so that their inputs stay float. Inputs of recurrent layers are not split.

    python benchmarks/tables/inputs.py --limit 2000
    python benchmarks/tables/inputs.py --models ViT-called --limit 2000 --out build/tables/vit
    python benchmarks/tables/inputs.py --dataset bible --models decoder --limit 8000 --calibration 4000 --bits 8 6 4
    python benchmarks/tables/inputs.py --data imagenet --dataset imagenet --models ResNet-50 --device cuda --workers 8
"""

from __future__ import annotations

import argparse
from typing import get_args

import data
from cells import Cell
from command import Table, main
from options import TEXTS, number
from table2 import clip_cells

from ocs.plan.options import ActSelect


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width and rule; what splits nothing is the same in each row of a bit-width."""
    found = []
    for bits in args.bits:
        fixed = {"wbits": args.wbits, "abits": bits, **({"calibrated": True} if args.dataset in TEXTS else {})}
        unsplit = [cell for cell in clip_cells(bits, args.clip, fixed, "act_clip", {}) if not cell.is_picked]
        for select in get_args(ActSelect):
            row = f"{bits} bits, {select}"
            found += [Cell(row, cell.column, cell.options) for cell in unsplit]
            for clip in dict.fromkeys(("none", args.clip[-1])):
                found += [_split(row, fixed, select, r, clip) for r in args.r]
    return found


def _split(row: str, fixed: dict, select: ActSelect, r: float, clip: str) -> Cell:
    """A cell with splits; where nothing is clipped, "error" is "max"."""
    rule = "max" if (select, clip) == ("error", "none") else select
    beside = "" if clip == "none" else f" + clip {clip}"
    return Cell(row, f"OCS {r:g}{beside}", fixed | {"act_r": r, "act_select": rule, "act_clip": number(clip)})


TABLE = Table(
    name="inputs",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: None,
    dataset="fashion-mnist",
    models=("ResNet-20", "ViT-called"),
    stands_for="ResNet-20",
    defaults={
        "bits": (4, 3), "r": (0.05, 0.1, 0.2), "clip": ("none", "mse"), "wbits": 8, "calibration": 512, "streams": 10,
    },
    datasets=(*data.NAMES, "bible"),
)  # fmt: skip

if __name__ == "__main__":
    main(TABLE)
