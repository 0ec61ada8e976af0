"""Relative size with OCS: weights, and layer inputs at 224 x 224, by expand ratio; needs no data and no weights.

Weights: elements of all quantized layers with their copies over those without (the first layer, which stays float,
counts in neither). Activations: elements of the inputs of all quantized layers with their gathered channels over those
without, for one image.

    python benchmarks/tables/table5.py
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from typing import Any

import torch
from cells import Cell
from command import PAPER, Table, main
from networks import load_network
from ranks import Ranks
from tasks import SIZE, Advance, Measured, Options, Task
from torch import nn

import ocs


class Sizes(Task):
    """A network whose weights and layer inputs are counted, not run for accuracy."""

    metric, unit, count = SIZE, "setting", 1

    def __init__(self, name: str, model: nn.Module, size: int) -> None:
        self.name, self.what, self.model, self.size = name, f"sizes at {size} x {size}", model, size
        shapes = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
        self.identity: list[Any] = [name, size, hashlib.sha256(repr(shapes).encode()).hexdigest()]

    def measure(self, options: Options | None, advance: Advance) -> Measured:
        """Relative size of what options["of"] names, "weights" or "activations"."""
        settings = dict(options or {"of": "weights"})
        of = settings.pop("of")
        model = copy.deepcopy(self.model)
        report = ocs.quantize(model, **settings, progress=False)
        size = report.relative_size if of == "weights" else relative_inputs(model, report, self.size)
        advance(1)
        return torch.tensor([size, 1.0], dtype=torch.float64), {}, {}


@torch.inference_mode()
def relative_inputs(model: nn.Module, report: ocs.Report, size: int) -> float:
    """Elements of the quantized layers' inputs with copies over those without, for one image [1, 3, size, size]."""
    growth = {layer.name: 1 + layer.splits / layer.channels for layer in report.quantized}
    plain = expanded = 0.0

    def count(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal plain, expanded
        plain += inputs[0].numel()
        expanded += inputs[0].numel() * growth[name]

    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_pre_hook(lambda _, x, n=n: count(n, x)) for n in growth]
    model(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return expanded / plain


def open_sizes(args: argparse.Namespace, name: str, weights: str | None, ranks: Ranks) -> Sizes:
    """The architecture alone."""
    del ranks  # every rank counts the same
    network = load_network(name, args.dataset, weights or "random")
    return Sizes(network.name, network.model, args.size)


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for weights, one for activations."""
    paper = PAPER["table5"] if model == "ResNet-50" and args.size == 224 else {}
    return [
        Cell(of, f"r = {r:g}", {"wbits": 8, "r": r, "of": of}, paper=paper.get(of, {}).get(f"{r:g}"), axes={"r": r},
             curve=of)
        for of in ("weights", "activations")
        for r in args.r
    ]  # fmt: skip


TABLE = Table(
    name="table5",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: None,
    dataset="imagenet",
    models=("ResNet-50",),
    stands_for="ResNet-50",
    defaults={"r": (0.01, 0.02, 0.05, 0.1), "size": 224},
    datasets=("imagenet",),
    x="r",
    open=open_sizes,
)

if __name__ == "__main__":
    main(TABLE)
