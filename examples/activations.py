"""Quantized activations on real data: the paper's Table 3 (and 4) for a trained ResNet-20 and Fashion-MNIST.

Weights have 8 bits, the inputs of all layers but the first 8 to 3, with thresholds and splits from 512 training images.
Columns: clipping by method, activation OCS, and Oracle OCS, which chooses its splits for each batch from the batch
itself, by batch size. Also saves histograms of one layer's inputs with every threshold. Finished cells are kept in
build/, so that a second run prints them at once; --fresh measures again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from cells import BUILD, Cache, Cells, fill, shown
from fashion_mnist import load, load_model

import ocs
import ocs.plot

BITS = (8, 7, 6, 5, 4, 3)
CLIPS = ("none", "mse", "aciq", "kl")
RATIOS = (0.01, 0.02, 0.05)
BATCHES = (1, 8, 128)
ORACLE_R = 0.02  # as in the paper's Table 4
PLOTTED = {"name": "layer3.2.conv1", "bits": 4, "r": 0.05}


def columns() -> dict[str, dict[str, Any]]:
    """Settings beside the bits, by heading."""
    found: dict[str, dict[str, Any]] = {f"clip {clip}": {"act_clip": clip} for clip in CLIPS}
    found |= {f"OCS {r:g}": {"act_r": r} for r in RATIOS}
    oracle = {"act_r": ORACLE_R, "act_split": "oracle"}
    return found | {f"oracle, {batch}": oracle | {"batch": batch} for batch in BATCHES}


def settings() -> dict[str, dict[str, Any] | None]:
    """Every cell of the table."""
    todo: dict[str, dict[str, Any] | None] = {"float": None}
    for bits in BITS:
        todo |= {f"{bits} bits, {name}": {"wbits": 8, "abits": bits} | options for name, options in columns().items()}
    return todo


def print_table(cells: Cells, count: int) -> None:
    """One line per bit-width."""
    top1 = cells["float"]["correct"] / count
    error = 100 * math.sqrt(top1 * (1 - top1) / count)
    print(
        f"\nTop-1 %, first {count:,} test images, weights 8 bits, float {100 * top1:.1f} (standard error {error:.1f})"
    )
    print(f"{'':<6}{'clipping':^44}{'activation OCS, r =':^33}{f'Oracle OCS, r = {ORACLE_R:g}, batch':^33}")
    print("bits  " + "".join(f"{name.split()[-1]:>11}" for name in columns()))
    for bits in BITS:
        shares = [cells[f"{bits} bits, {name}"]["correct"] / count for name in columns()]
        print(f"{bits:<6}" + "".join(f"{100 * share:>11.1f}" for share in shares))


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=500, help="how many of the 10,000 test images (500 take two minutes)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--json", action="store_true", help="print the cells as JSON instead of the table")
    parser.add_argument("--out", type=Path, default=BUILD / "inputs.png", help="the picture")
    args = parser.parse_args()
    images, labels = (part[: args.images] for part in load("t10k"))
    count = len(images)
    cache = Cache("activations", count, fresh=args.fresh)
    fill(cache, settings(), images, labels)
    if args.json:
        print(json.dumps({"images": count, "cells": cache.cells}))
        return
    print_table(cache.cells, count)
    statistics = ocs.calibrate(load_model(), load("calibration")[0].split(64))[PLOTTED["name"]]
    figure = ocs.plot.input_histograms(statistics, PLOTTED["bits"], PLOTTED["r"], title=f"Inputs of {PLOTTED['name']}")
    figure.savefig(args.out, dpi=120)
    print(f"\nWhere each method clips the inputs of {PLOTTED['name']}, before and after OCS: {shown(args.out)}")


if __name__ == "__main__":
    main()
