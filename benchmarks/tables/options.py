"""A table, as its module describes it, and the options of its command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import torch
from cells import Cell
from networks import RESNET20
from paths import OUT, shown
from ranks import Ranks
from tasks import Task

from ocs.weight.arguments import check_bits, check_clip, check_ratio

TEXTS = {"wikitext-2": "WikiText-2", "bible": "the King James Bible"}
NETWORKS = {"cifar10": RESNET20, "fashion-mnist": RESNET20, "wikitext-2": "LSTM", "bible": "LSTM"}  # where there is one


@dataclass(frozen=True)
class Table:
    """One table of the paper, or beyond it: how it is asked for, and what its cells are."""

    name: str  # as its files are called
    doc: str  # the module's
    cells: Callable[[argparse.Namespace, str], list[Cell]]  # for one model, by whose name the paper's numbers are found
    paper_float: Callable[[str], float | None]
    dataset: str  # the paper's
    models: tuple[str, ...]  # likewise
    stands_for: str  # whose numbers stand beside those of a network that the paper does not have
    defaults: dict[str, Any]  # of the options that this table has, the paper's setting
    datasets: tuple[str, ...] = ()  # on which it can be run; by default on all of the same kind
    x: str = "bits"  # the axis of its picture
    panels: str = ""  # and the axis that has a panel for each value
    open: Callable[[argparse.Namespace, str, str | None, Ranks], Task] | None = None  # name, weights

    @property
    def label(self) -> str:
        """As people call it."""
        return self.name.replace("table", "Table ").capitalize()

    @property
    def title(self) -> str:
        """The first line of the module's text."""
        return self.doc.splitlines()[0].rstrip(".")


HELP = {
    "bits": (int, "bit-widths"),
    "r": (float, "expand ratios"),
    "clip": (str, "clip methods: none, mse, aciq, kl, percentile, std, sawb, a fraction, mse-release ..."),
    "wbits": (int, "bits of the weights"),
    "abits": (int, "bits of the layers' inputs"),
    "batches": (int, "batch sizes"),
    "calibration": (int, "training images, or words beyond --limit, that calibrate"),
    "size": (int, "height and width of the image"),
    "granularity": (str, "tensor, channel, or both: one scale each"),
    "streams": (int, "streams that the text is read in, side by side"),
}


def parse(table: Table, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options that the table has, with the paper's setting as defaults."""
    parser = argparse.ArgumentParser(
        prog=f"{table.name}.py", description=table.doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_options(parser, table)
    args = parser.parse_args(arguments)
    typed = sys.argv[1:] if arguments is None else arguments
    args.command = " ".join([f"python benchmarks/tables/{table.name}.py", *typed])
    if args.models is None:
        args.models = [NETWORKS[args.dataset]] if args.dataset in NETWORKS else list(table.models)
    _check(args, parser.error)
    return args


def _add_options(parser: argparse.ArgumentParser, table: Table) -> None:
    names = table.datasets or (TEXTS if table.dataset in TEXTS else data.NAMES)
    has_text, has_images = (any((name in TEXTS) == is_text for name in names) for is_text in (True, False))
    units = " or ".join(["images"] * has_images + ["words"] * has_text)
    together = " or ".join(["images"] * has_images + ["streams"] * has_text)
    needs_data, add = table.open is None, parser.add_argument
    add("--models", nargs="+", help=f"by the paper's or torchvision's name; {' '.join(table.models)}")
    add("--weights", nargs="+", help="torchvision's name of weights, or a file; one, or one per model")
    for name, value in table.defaults.items():
        kind, text = HELP[name]
        several = {"nargs": "+"} if isinstance(value, tuple) else {}
        defaults = " ".join(map(str, value)) if several else value
        add(f"--{name}", type=kind, default=value, help=f"{text}; {defaults}", **several)
    if "clip" in table.defaults:
        text = "what clip mse, aciq and kl are: our methods, or as the paper's release has them"
        add("--clip-as", choices=("ours", "release"), default="ours", help=f"{text}; %(default)s")
    add("--dataset", choices=list(names), default=table.dataset, help="%(default)s")
    if needs_data:
        add("--data", type=Path, help="folder in the data set's official layout; Fashion-MNIST's calibrates")
        add("--limit", type=int, help=f"at most so many {units}")
        add("--batch-size", type=int, default=128, help=f"{together} that run at once; %(default)s")
    if needs_data and has_images:
        trained_with = "of each channel that the weights were trained with, pixels in 0 to 1; default: the data set's"
        add("--mean", type=float, nargs="+", help=f"mean {trained_with}")
        add("--std", type=float, nargs="+", help=f"standard deviation {trained_with}")
        add("--workers", type=int, default=0, help="processes that decode images; %(default)s")
        add("--memory", type=float, default=16, help="GB of decoded images that each rank keeps; %(default)s")
        add("--seed", type=int, default=0, help="which training images calibrate; %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s")
    add("--out", type=Path, default=OUT, help=f"folder for the results; {shown(OUT)}")
    add("--fresh", action="store_true", help="measure again what was measured before")
    add("--json", action="store_true", help="print JSON instead of the table")


def _check(args: argparse.Namespace, error: Callable[[str], object]) -> None:
    """Before anything is opened: error() does not return."""
    if args.weights and len(args.weights) not in (1, len(args.models)):
        error(f"--weights: {len(args.weights)} for {len(args.models)} models; give one, or one for each")
    for name in ("limit", "batch_size", "size", "streams", "calibration"):
        if (value := getattr(args, name, None)) is not None and value <= 0:
            error(f"--{name.replace('_', '-')} {value}: give more than 0")
    for name, check in _CHECKS.items():
        values = getattr(args, name, ())
        for value in values if isinstance(values, list | tuple) else [values]:
            try:
                check(f"--{name}", number(value) if name == "clip" else value)
            except ValueError as wrong:
                error(str(wrong))
    for size in getattr(args, "batches", ()):
        if size <= 0 or args.batch_size % size:
            error(f"--batches {size}: give numbers that divide --batch-size {args.batch_size}")
    if args.device != "cpu" and not torch.cuda.is_available():
        error(f"--device {args.device}: this torch has no CUDA device; use cpu")


def number(method: str) -> str | float:
    """A clip method by name, or a fraction of the largest value."""
    try:
        return float(method)
    except ValueError:
        return method


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "bits": check_bits,
    "wbits": check_bits,
    "abits": check_bits,
    "r": check_ratio,
    "clip": check_clip,
}
