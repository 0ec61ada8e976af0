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

from beyond import beyond, rows
from cells import Cell
from command import main

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
    return rows(args, {column: options for column, options in COLUMNS.items() if suits(options)})


TABLE = beyond(
    "calibrated", __doc__, cells, bits=(6, 5, 4, 3, 2), r=(0.05,), granularity=("tensor", "channel"), calibration=512
)

if __name__ == "__main__":
    main(TABLE)
