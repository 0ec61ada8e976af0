"""The main job on real data: OCS on a trained ResNet-20, judged on Fashion-MNIST test images.

Prints top-1 and mean weight SQNR over bits and expand ratio (the form of the paper's Table 1) and the report of one
setting, and saves the weight histograms of the layer with the worst outlier (the paper's Figure 1). Weights only, first
layer float. Finished cells are kept in build/, so that a second run prints them at once; --fresh measures again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import WEIGHTS, ResNet20, count_correct, load, load_model
from torch import Tensor, nn
from tqdm import tqdm

import ocs
import ocs.plot

BUILD = Path(__file__).resolve().parent.parent / "build"
RATIOS = (0.0, 0.01, 0.05, 0.1, 0.2)
SPLITS = ("qa", "naive")
LOW_BITS, ALL_BITS = (5, 4, 3, 2), (8, 6, 5, 4, 3, 2)
SHOWN = {"wbits": 4, "r": 0.1}  # the setting of the report and of the picture

Cells = dict[str, dict[str, Any]]


def key(bits: int, r: float, split: str) -> str:
    """A cell's name; without splits both kinds are the same cell."""
    return f"{bits} bits, r={r:g}, {split if r else 'qa'}"


def fingerprint(images: int) -> str:
    """Changes with the package, the weights and the number of images, so that stale cells are never shown."""
    digest = hashlib.sha256(f"{images} {torch.__version__}".encode())
    package = sorted(path for path in Path(ocs.__file__).parent.iterdir() if path.suffix in (".py", ".so"))
    for path in (*package, WEIGHTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Cache:
    """Finished cells on disk, valid as long as the fingerprint is the same."""

    def __init__(self, images: int, *, fresh: bool) -> None:
        self.path = BUILD / f"demo-{images}.json"
        self.stamp = fingerprint(images)
        self.cells: Cells = {}
        if self.path.exists() and not fresh:
            self.cells = json.loads(self.path.read_text()).get(self.stamp, {})

    def add(self, name: str, cell: dict[str, Any]) -> None:
        """Keep one more cell."""
        self.cells[name] = cell
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps({self.stamp: self.cells}, indent=1))


def measure(model: nn.Module, settings: dict[str, Any] | None, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Quantize a copy of the float model (folded: same values, no extra cost), and count the right answers."""
    begin = time.perf_counter()
    model = copy.deepcopy(model)
    sqnr = None
    if settings is not None:
        sqnr = ocs.quantize(model, **settings, expand=False, progress=False).mean_sqnr_db
    ready = time.perf_counter()
    correct = count_correct(model, images, labels)
    end = time.perf_counter()
    return {"correct": correct, "sqnr": sqnr, "planning": ready - begin, "forward": end - ready}


def fill(cache: Cache, bits: tuple[int, ...], images: Tensor, labels: Tensor) -> None:
    """Measure what is missing, from one float model that is loaded once."""
    todo: dict[str, dict[str, Any] | None] = {"float": None}
    for b, r, split in product(bits, RATIOS, SPLITS):
        todo[key(b, r, split)] = {"wbits": b, "r": r, "split": split}
    missing = [name for name in todo if name not in cache.cells]
    if not missing:
        return
    model = load_model()
    count_correct(model, images[:500], labels[:500])  # the first forward pass of a process also sets the library up
    bar = tqdm(missing, unit="setting", mininterval=1, leave=False, disable=None)
    for name in bar:
        bar.set_description(name)
        cache.add(name, measure(model, todo[name], images, labels))
    spent = {part: sum(cache.cells[name][part] for name in missing) for part in ("planning", "forward")}
    share = 100 * spent["planning"] / sum(spent.values())
    say(f"{len(missing)} settings in {sum(spent.values()):.0f} s, {share:.1f} % of it outside forward passes")


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


def say(text: str) -> None:
    """To standard error: about the run, not its result."""
    print(text, file=sys.stderr)


def shown(path: Path) -> str:
    """The path as a reader in this folder would type it."""
    return os.path.relpath(path)


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
    cache = Cache(count, fresh=args.fresh)
    cells = cache.cells
    if cells:
        say(f"{len(cells)} settings measured before, in {shown(cache.path)}; --fresh measures again")
    fill(cache, bits, images, labels)
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
