"""The main job on real data: OCS on a trained ResNet-20, judged on Fashion-MNIST test images.

Prints top-1 and mean weight SQNR over bits and expand ratio (the form of the paper's Table 1) and the report of one
setting, and saves pictures of the layer with the worst outlier: its histograms (the paper's Figure 1), and where each
clip method cuts them. Weights only, first layer float. Finished cells are kept in build/, so that a second run prints
them at once; --fresh measures again.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import BUILD, Cache, Cells, fill, shown
from fashion_mnist import WEIGHTS, ResNet20, load, load_model
from torch import Tensor, nn

import ocs
import ocs.plot

RATIOS = (0.0, 0.01, 0.05, 0.1, 0.2)
SPLITS = ("qa", "naive")
LOW_BITS, ALL_BITS = (5, 4, 3, 2), (8, 6, 5, 4, 3, 2)
SHOWN = {"wbits": 4, "r": 0.1}  # the setting of the report and of the picture


def key(bits: int, r: float, split: str) -> str:
    """A cell's name; without splits both kinds are the same cell."""
    return f"{bits} bits, r={r:g}, {split if r else 'qa'}"


def settings(bits: tuple[int, ...]) -> dict[str, dict[str, Any] | None]:
    """Every cell of the tables."""
    todo: dict[str, dict[str, Any] | None] = {"float": None}
    for b, r, split in product(bits, RATIOS, SPLITS):
        todo[key(b, r, split)] = {"wbits": b, "r": r, "split": split}
    return todo


def print_table(title: str, cells: Cells, bits: tuple[int, ...], show: Any) -> None:
    """One line per bit-width; a cell is quantization-aware / naive."""
    print(f"\n{title}")
    print("bits " + "".join(f"{f'r = {r:g}':>16}" for r in RATIOS))
    for b in bits:
        row = []
        for r in RATIOS:
            qa, naive = (show(cells[key(b, r, split)]) for split in SPLITS)
            row.append(f"{f'{qa} / {naive}' if r else qa:>16}")
        print(f"{b:<5}" + "".join(row))


def worst_outlier(model: nn.Module) -> tuple[str, Tensor]:
    """The quantizable layer, but for the first, whose largest weight is the most standard deviations out."""
    layers = [(n, m.weight.detach()) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return max(layers[1:], key=lambda layer: float(layer[1].abs().max() / layer[1].std()))


def show_one(out: Path) -> None:
    """The report of one setting, and the picture of its worst layer."""
    model = load_model()
    name, weight = worst_outlier(model)
    sigmas = float(weight.abs().max() / weight.std())
    figure = ocs.plot.weight_histograms(
        weight, SHOWN["wbits"], SHOWN["r"], title=f"{name}: largest weight {sigmas:.0f} standard deviations out"
    )
    figure.savefig(out, dpi=120)
    clips = out.with_name("clips.png")
    ocs.plot.clip_thresholds(weight, SHOWN["wbits"], SHOWN["r"], title=f"{name}: weights").savefig(clips, dpi=120)
    report = ocs.quantize(model, **SHOWN)
    print(f"\nocs.quantize(model, wbits={SHOWN['wbits']}, r={SHOWN['r']})\n{report}")
    saved = BUILD / f"resnet20-{SHOWN['wbits']}bit.safetensors"
    ocs.save(model, saved)
    again = ocs.load(saved, ResNet20().eval().to(memory_format=torch.channels_last))
    images = load("calibration")[0]
    with torch.inference_mode():
        same = torch.equal(again(images), model(images))
    float_kb, saved_kb = (round(path.stat().st_size / 1000) for path in (WEIGHTS, saved))
    outputs = "the same outputs" if same else "OTHER OUTPUTS"
    print(f"\nSaved in {shown(saved)}: {saved_kb} KB, {float_kb} KB as floats; loaded into a fresh network: {outputs}")
    print(f"\nFigure 1 for {name}, the layer with the worst outlier: {shown(out)}")
    print(f"Where each method clips its weights, before and after OCS: {shown(clips)}")


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"all 10,000 images and {ALL_BITS} bits, about ten minutes")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--json", action="store_true", help="print the cells as JSON instead of the tables")
    parser.add_argument("--out", type=Path, default=BUILD / "figure1.png", help="the picture")
    args = parser.parse_args()
    count, bits = (10_000, ALL_BITS) if args.full else (2_000, LOW_BITS)
    images, labels = (part[:count] for part in load("t10k"))
    cache = Cache("demo", count, fresh=args.fresh)
    cells = cache.cells
    fill(cache, settings(bits), images, labels)
    if args.json:
        print(json.dumps({"images": count, "cells": cells}))
        return

    def percent(cell: dict[str, Any]) -> str:
        return f"{100 * cell['correct'] / count:.1f}"

    top1 = cells["float"]["correct"] / count
    error = 100 * math.sqrt(top1 * (1 - top1) / count)
    title = f"Top-1 %, first {count:,} test images, float {percent(cells['float'])} (standard error {error:.1f}):"
    print_table(f"{title} quantization-aware / naive split", cells, bits, percent)
    print_table("Mean weight SQNR in dB", cells, bits, lambda cell: f"{cell['sqnr']:.1f}")
    show_one(args.out)


if __name__ == "__main__":
    main()
