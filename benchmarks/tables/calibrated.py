"""Beyond the paper: what a few inputs without labels give, and what the norms' statistics give without any.

Weights only, first layer float. Bias correction by the norms' own statistics or by measured means; the norms'
statistics estimated again on measured inputs, or on inputs synthesized from the float model; rounding by the inputs'
second moments (gptq). Rows: nearest rounding without clipping, and squant with clip="auto", which gptq replaces.

    python benchmarks/tables/calibrated.py --limit 2000
    python benchmarks/tables/calibrated.py --limit 2000 --models ViT --out build/tables/vit
    python benchmarks/tables/calibrated.py --dataset bible --limit 8000 --calibration 4000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse
import itertools

from cells import Cell
from command import Table, main

BASES = {  # what stands beside the options in question
    "nearest": {"rounding": "nearest", "clip": "none"},
    "squant": {"rounding": "squant", "clip": "auto"},
}
COLUMNS = {
    "alone": {},
    "bias, norms": {"correct_bias": True},
    "bias, measured": {"correct_bias": True, "calibrated": True},
    "norms, synthetic": {"norms": "synthetic"},
    "norms, measured": {"norms": "measured"},
    "gptq": {"rounding": "gptq", "calibrated": True},
    "gptq, norms measured": {"rounding": "gptq", "calibrated": True, "norms": "measured"},
}
SUITS = {
    "ResNet-20": lambda options: True,
    "ViT": lambda options: "norms" not in options,  # its norms keep no statistics
    "LSTM": lambda options: not {"norms", "correct_bias"} & options.keys(),  # nor do recurrent layers' biases change
}


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width, granularity and base."""
    suits = SUITS["LSTM" if args.dataset == "bible" else model]
    columns = [(column, options) for column, options in COLUMNS.items() if suits(options)]
    found = []
    for bits, granularity, r, base in itertools.product(args.bits, args.granularity, args.r, BASES):
        at = f", r = {r:g}" if len(args.r) > 1 else ""
        common = {"wbits": bits, "r": r, "granularity": granularity, **BASES[base]}
        row = f"{bits} bits, per {granularity}{at}, {base}"
        found += [Cell(row, column, common | options) for column, options in columns]
    return found


TABLE = Table(
    name="calibrated",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: None,
    dataset="fashion-mnist",
    models=("ResNet-20", "ViT"),
    stands_for="ResNet-20",
    defaults={"bits": (4, 3, 2), "r": (0.05,), "granularity": ("tensor", "channel"), "calibration": 512, "streams": 10},
    datasets=("fashion-mnist", "bible"),
)

if __name__ == "__main__":
    main(TABLE)
