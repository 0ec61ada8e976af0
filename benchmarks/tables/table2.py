"""Weight quantization: top-1 on ImageNet under clipping, OCS, and both, by weight bits.

First layer float, inputs of all others at 8 bits from 512 training images. "best" is the best of the clip methods,
none included; OCS is combined with the best method other than none at that bit-width, which is what the paper's numbers
show it did (Inception-V3 at 7 bits: none is best, and OCS with clipping is worse than without).

    python benchmarks/tables/table2.py --data imagenet --device cuda --workers 8
    python benchmarks/tables/table2.py --data imagenet --device cuda --workers 8 --clip-as release
    torchrun --nproc-per-node 8 -- benchmarks/tables/table2.py --data imagenet --device cuda --workers 8
    python benchmarks/tables/table2.py --dataset fashion-mnist
"""

from __future__ import annotations

import argparse

from cells import Cell
from command import PAPER, Table, main, of_model
from options import number


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width."""
    found = []
    for bits in args.bits:
        paper = of_model("table2", model).get(str(bits), {}) if args.abits == 8 else {}
        fixed = {"wbits": bits, "abits": args.abits}
        found += clip_cells(bits, args.clip, fixed, "clip", paper, best={"r": 0.0})
        found += split_cells(bits, args.r, fixed, "r", paper)
        methods = tuple(f"clip {clip}" for clip in args.clip if clip != "none")
        for r in args.r if methods else ():
            found.append(
                Cell(
                    f"{bits} bits", f"OCS {r:g} + best clip", fixed | {"r": r}, best_of=methods,
                    paper=paper.get(f"ocs_{r:g}+best_clip"), axes={"bits": bits, "r": r},
                    curve=f"OCS {r:g} + best clip" if r == max(args.r) else "",
                )
            )  # fmt: skip
    return found


def clip_cells(
    bits: int, methods: list[str], fixed: dict, option: str, paper: dict, best: dict | None = None
) -> list[Cell]:
    """A cell for each clip method, and their best, which is drawn, and where that is besides bits."""
    row, names = f"{bits} bits", tuple(f"clip {method}" for method in methods)
    found = []
    for method, name in zip(methods, names, strict=True):
        axes, curve = ({"bits": bits, "r": 0.0}, "no OCS, no clip") if method == "none" else ({"bits": bits}, "")
        theirs = paper.get(f"clip_{method}")
        found.append(Cell(row, name, fixed | {option: number(method)}, paper=theirs, axes=axes, curve=curve))
    axes = {"bits": bits, **(best or {})}
    return [*found, Cell(row, "best", best_of=names, paper=paper.get("clip_best"), axes=axes, curve="best clip")]


def split_cells(bits: int, ratios: list[float], fixed: dict, option: str, paper: dict) -> list[Cell]:
    """A cell for each expand ratio, without clipping."""
    return [
        Cell(f"{bits} bits", f"OCS {r:g}", fixed | {option: r}, paper=paper.get(f"ocs_{r:g}"),
             axes={"bits": bits, "r": r}, curve=f"OCS {r:g}" if r == max(ratios) else "")
        for r in ratios
    ]  # fmt: skip


TABLE = Table(
    name="table2",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: PAPER["table2"]["models"][model]["float"],
    dataset="imagenet",
    models=tuple(PAPER["table2"]["models"]),
    stands_for="ResNet-50",
    defaults={
        "bits": (8, 7, 6, 5, 4), "r": (0.01, 0.02, 0.05), "clip": ("none", "mse", "aciq", "kl"), "abits": 8,
        "calibration": 512,
    },
)  # fmt: skip

if __name__ == "__main__":
    main(TABLE)
