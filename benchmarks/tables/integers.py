"""What integers that run are worth: top-1 of the bundled ResNet-20 in each engine, beside the simulated model's.

    python benchmarks/tables/integers.py [--bits 8 6 5] [--r 0 0.05] [--limit 10000] [--out build/tables]

Weights and inputs of as many bits (inputs of at least 6), thresholds from 512 training images, the first layer float,
batch norms folded. "additions": the terms of residual additions are rounded to 8 bits, too, and what is averaged at the
end; without it engines compute what the simulated model does.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import paths
import torch
from bench import machine
from command import footnote
from fashion_mnist import load, load_model
from layout import aligned
from torch import Tensor, nn
from tqdm import tqdm

import ocs

Run = Callable[[Tensor], Tensor]
BATCH = 500
COLUMNS = (
    "simulated", "inductor", "package", "onnxruntime", "openvino", "inductor, additions", "onnxruntime, additions",
    "openvino, additions", "same top-1",
)  # fmt: skip


def engines(model: nn.Module, example: Tensor, folder: Path) -> Iterator[tuple[str, Run]]:
    """The model in each engine, one after the other."""
    yield "simulated", model
    ocs.export(model, folder / "model.pt2", example, additions=False)
    yield "package", torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    for engine in ("inductor", "onnxruntime", "openvino"):
        yield engine, ocs.compile(model, example, engine=engine, additions=False)
        yield f"{engine}, additions", ocs.compile(model, example, engine=engine)


def row(options: dict[str, Any], images: Tensor, labels: Tensor, calibration: Tensor) -> dict[str, float]:
    """Top-1 in percent by engine, and how often ONNX Runtime's is the simulated model's."""
    model, classes = load_model(), {}
    settings = {"fold_bn": True, "act_signed": "auto", "expand": False, "progress": False}
    ocs.quantize(model, calibration=[calibration], **settings, **options)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, run in engines(model, images[:BATCH], Path(folder)):
            classes[name] = torch.cat([run(batch).argmax(1) for batch in images.split(BATCH)])
    found = {name: 100 * float((each == labels).double().mean()) for name, each in classes.items()}
    same = classes["simulated"] == classes["onnxruntime"]
    return found | {"same top-1": 100 * float(same.double().mean())}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=(8, 6, 5))
    parser.add_argument("--r", nargs="+", type=float, default=(0.0, 0.05))
    parser.add_argument("--granularity", nargs="+", default=("tensor", "channel"))
    parser.add_argument("--limit", type=int, default=10000, help="images; a multiple of 500")
    parser.add_argument("--out", type=Path, default=paths.OUT)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    images, labels = (each[: args.limit] for each in load("t10k"))
    calibration, _ = load("calibration")
    settings = [*product(args.bits, args.r, args.granularity)]
    lines = [["", *COLUMNS]]
    for bits, r, granularity in tqdm(settings, "settings", disable=None):
        options = {"wbits": bits, "r": r, "granularity": granularity, "abits": max(bits, 6)}
        found = row(options, images, labels, calibration)
        lines.append([f"{bits} bits, r = {r:g}, {granularity}", *(f"{found[name]:.2f}" for name in COLUMNS)])
        print(" ".join(lines[-1]), flush=True)
    heading = f"**ResNet-20**; {len(labels):,} images of Fashion-MNIST; top-1 %"
    made = {"command": "python benchmarks/tables/integers.py", "machine": machine()}
    text = f"{heading}\n\n{aligned(lines)}\n\n{footnote(made)}\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "integers.md").write_text(text)


if __name__ == "__main__":
    main()
