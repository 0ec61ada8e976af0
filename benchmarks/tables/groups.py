"""Beyond the paper: do splits pay where a group of input channels has its own scale? Compared at equal bytes.

Weights only, first layer float. A row is a size: that of the model with so many bits and a scale for each group of
input channels, nothing split. A column has no more scales than that, and splits as many channels as the same bytes
hold: r is the largest that fits. By recipe="best", and with gptq by a few inputs without labels.

    python benchmarks/tables/groups.py --models ViT --limit 2000
    python benchmarks/tables/groups.py --dataset bible --limit 20000 --calibration 4000 --out build/tables/lstm
"""

from __future__ import annotations

import argparse
import itertools

from beyond import beyond
from cells import Cell
from command import main

GROUPS = (128, 64, 32)
METHODS = {"best": {}, "gptq": {"rounding": "gptq", "calibrated": True}}


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width, size and method, a column for each granularity that has no more scales than fit."""
    del model  # the paper has none of this
    found = []
    for bits, method, size in itertools.product(args.bits, METHODS, GROUPS):
        row, common = f"{bits} bits, {method}, size of groups of {size}", {"wbits": bits, "recipe": "best"}
        scales = {"per channel": {"granularity": "channel"}}
        scales |= {f"groups of {group}": {"granularity": "group", "group": group} for group in GROUPS if group >= size}
        found += [
            Cell(row, f"{column} + OCS", common | METHODS[method] | given | {"within_group": size})
            for column, given in scales.items()
        ]
    return found


TABLE = beyond("groups", __doc__, cells, bits=(4, 3, 2), calibration=512)

if __name__ == "__main__":
    main(TABLE)
