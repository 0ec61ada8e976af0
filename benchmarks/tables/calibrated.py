"""Beyond the paper: what a few inputs without labels give, and what the norms' statistics give without any.

Weights only, first layer float. Bias correction by the norms' own statistics or by measured means; the norms'
statistics estimated again on measured inputs, or on inputs synthesized from the float model; rounding by the inputs'
second moments (gptq). Rows: nearest rounding without clipping, and squant with clip="auto", which gptq replaces.

    python benchmarks/tables/calibrated.py --limit 2000
    python benchmarks/tables/calibrated.py --dataset bible --limit 8000 --calibration 4000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse

from cells import Cell
from command import Table, main

BASES = {  # what stands beside the options in question
    "nearest": {"rounding": "nearest", "clip": "none"},
    "squant": {"rounding": "squant", "clip": "auto"},
}
IMAGES = {
    "alone": {},
    "bias, norms": {"correct_bias": True},
    "bias, measured": {"correct_bias": True, "calibrated": True},
    "norms, synthetic": {"norms": "synthetic"},
    "norms, measured": {"norms": "measured"},
    "gptq": {"rounding": "gptq", "calibrated": True},
    "gptq, norms measured": {"rounding": "gptq", "calibrated": True, "norms": "measured"},
}
TEXT = ("alone", "gptq")  # without norms, and biases of recurrent layers stay


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width, granularity and base."""
    del model  # the paper has none of this
    columns = TEXT if args.dataset == "bible" else tuple(IMAGES)
    return [
        Cell(f"{bits} bits, per {granularity}, {base}", column, {"wbits": bits, "r": r, "granularity": granularity,
             **BASES[base], **IMAGES[column]})
        for bits in args.bits for granularity in args.granularity for r in args.r for base in BASES
        for column in columns
    ]  # fmt: skip


TABLE = Table(
    name="calibrated",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: None,
    dataset="fashion-mnist",
    models=("ResNet-20",),
    stands_for="ResNet-20",
    defaults={"bits": (4, 3, 2), "r": (0.05,), "granularity": ("tensor", "channel"), "calibration": 512, "streams": 10},
    datasets=("fashion-mnist", "bible"),
)

if __name__ == "__main__":
    main(TABLE)
