"""What every table's command shares: its options, how networks and data are opened, and what is printed and written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import paths  # isort: split

import numpy as np
from bench import machine
from cells import Cell, Run, Store, say
from data import DataError
from layout import Block, as_csv, markdown, picture, records
from ranks import Ranks
from sources import IMAGES, TEXTS, open_images, open_text
from tasks import Task

import ocs

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
OUT = paths.ROOT / "build" / "tables"
STAND_IN = "ResNet-20"  # trained on Fashion-MNIST, bundled


@dataclass(frozen=True)
class Table:
    """One table of the paper: how it is asked for, and what its cells are."""

    number: int
    doc: str  # the module's
    cells: Callable[[argparse.Namespace, str], list[Cell]]  # for one model, by whose name the paper's numbers are found
    paper_float: Callable[[str], float | None]
    dataset: str  # the paper's
    models: tuple[str, ...]  # likewise
    stands_for: str  # whose numbers stand beside those of a network that the paper does not have
    defaults: dict[str, Any]  # of the options that this table has, the paper's setting
    open: Callable[[argparse.Namespace, str, Ranks], Task] | None = None

    @property
    def name(self) -> str:
        """As the files are called."""
        return f"table{self.number}"

    @property
    def title(self) -> str:
        """The first line of the module's text."""
        return self.doc.splitlines()[0].rstrip(".")


HELP = {
    "bits": (int, "bit-widths"),
    "r": (float, "expand ratios"),
    "clip": (str, "clip methods: none, mse, aciq, kl, percentile, std, sawb, a fraction"),
    "wbits": (int, "bits of the weights"),
    "abits": (int, "bits of the layers' inputs"),
    "batches": (int, "batch sizes"),
    "calibration": (int, "training images for the statistics of layer inputs"),
    "size": (int, "height and width of the image"),
    "streams": (int, "streams that the text is read in, side by side"),
}


def of_model(table: str, model: str) -> dict[str, dict[str, float]]:
    """The paper's Table 2 or 3: by bits, then by column."""
    return PAPER[table]["models"][model]["bits"]


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
        args.models = [STAND_IN] if args.dataset == "fashion-mnist" else list(table.models)
    if args.weights and len(args.weights) not in (1, len(args.models)):
        parser.error(f"--weights: {len(args.weights)} for {len(args.models)} models; give one, or one for each")
    for name in ("limit", "batch_size", "memory", "size", "streams", "calibration"):
        if (value := getattr(args, name, None)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: give more than 0")
    return args


def _add_options(parser: argparse.ArgumentParser, table: Table) -> None:
    is_text, needs_data = table.dataset in TEXTS, table.open is None
    unit = "words" if is_text else "images"
    add = parser.add_argument
    add("--models", nargs="+", help=f"by the paper's or torchvision's name; {' '.join(table.models)}")
    add("--weights", nargs="+", help="torchvision's name of weights, or a file; one, or one per model")
    for name, value in table.defaults.items():
        kind, text = HELP[name]
        several = {"nargs": "+"} if isinstance(value, tuple) else {}
        shown = " ".join(map(str, value)) if several else value
        add(f"--{name}", type=kind, default=value, help=f"{text}; {shown}", **several)
    names = TEXTS if is_text else IMAGES if needs_data else [table.dataset]
    add("--dataset", choices=names, default=table.dataset, help="default: the paper's, %(default)s")
    if needs_data:
        add("--data", type=Path, help="folder in the data set's official layout")
        add("--limit", type=int, help=f"at most so many {unit}")
        together = "streams" if is_text else "images"
        add("--batch-size", type=int, default=128, help=f"{together} that run at once; %(default)s")
    if needs_data and not is_text:
        trained_with = "of each channel that the weights were trained with, pixels in 0 to 1; default: the data set's"
        add("--mean", type=float, nargs="+", help=f"mean {trained_with}")
        add("--std", type=float, nargs="+", help=f"standard deviation {trained_with}")
        add("--workers", type=int, default=0, help="processes that decode images; %(default)s")
        add("--memory", type=float, default=16, help="GB of decoded images to keep; %(default)s")
        add("--seed", type=int, default=0, help="which training images calibrate; %(default)s")
    add("--device", default="cpu", help="cpu, cuda; %(default)s")
    add("--out", type=Path, default=OUT, help="folder for the results")
    add("--fresh", action="store_true", help="measure again what was measured before")
    add("--json", action="store_true", help="print JSON instead of the table")


def main(table: Table, arguments: list[str] | None = None) -> None:
    """Measure every model's cells, print the table, and write it in all its forms."""
    args = parse(table, arguments)
    with Ranks(args.device) as ranks:
        run = Run(Store(args.out / "cells", fresh=args.fresh), ranks)
        try:
            blocks, errors = _blocks(table, args, run)
        except DataError as error:
            raise SystemExit(f"{table.name}: {error}") from None
        except KeyboardInterrupt:
            raise SystemExit(
                f"\n{table.name}: stopped; the same command goes on after {run.measured} new cells"
            ) from None
        if ranks.rank == 0 and blocks:
            publish(table, args, blocks, run)
    failed = [record for record in records(blocks) if record["error"]]
    if errors or failed:
        raise SystemExit(f"{table.name}: {len(errors)} models and {len(failed)} cells failed; see above")


def _blocks(table: Table, args: argparse.Namespace, run: Run) -> tuple[list[Block], list[str]]:
    blocks, errors = [], []
    open_task = table.open or (open_text if table.dataset in TEXTS else open_images)
    for i, name in enumerate(args.models):
        known = name in table.models
        same = known and args.dataset == table.dataset
        paper_name = name if known else table.stands_for
        args.weight = args.weights[i % len(args.weights)] if args.weights else None
        try:
            task = open_task(args, name, run.ranks)
            cells = table.cells(args, paper_name)
            results = run.measure(task, cells)
        except DataError:
            raise  # the same for every model
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            say(f"FAILED: {name}: {error}")
            errors.append(name)
            continue
        source = f"{paper_name} on {(IMAGES | TEXTS)[table.dataset]}"
        blocks.append(
            Block(task.name, task.what, task.metric, cells, results, source, table.paper_float(paper_name), same)
        )
    return blocks, errors


def publish(table: Table, args: argparse.Namespace, blocks: list[Block], run: Run) -> None:
    """Print, and write table2.md, .csv, .json and a picture for each model."""
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("command", "fresh", "json")
    }
    content = {
        "table": table.number,
        "title": table.title,
        "command": args.command,
        "settings": settings,
        "machine": machine() | {"numpy": np.__version__, "ocs": ocs.__version__, "world": run.ranks.world},
        "seconds": {part: round(value, 1) for part, value in run.spent.items()},
        "cells": list(records(blocks)),
    }
    text = markdown(blocks)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / table.name
    base.with_suffix(".json").write_text(json.dumps(content, indent=1))
    base.with_suffix(".csv").write_text(as_csv(blocks))
    base.with_suffix(".md").write_text(f"{text}\n\n{footnote(content)}\n")
    pictures = [_save_picture(table, block, base, len(blocks)) for block in blocks]
    print(json.dumps(content, indent=1) if args.json else f"\nTable {table.number}. {table.title}\n\n{text}")
    say(run.summary())
    say("written: " + ", ".join(paths.shown(p) for p in (base.with_suffix(".md"), *pictures) if p))


def _save_picture(table: Table, block: Block, base: Path, blocks: int) -> Path | None:
    figure = picture(block, f"Table {table.number}")
    if figure is None:
        return None
    path = base.with_name(f"{base.name}-{block.name}.png" if blocks > 1 else f"{base.name}.png")
    figure.savefig(path, dpi=110)
    return path


def footnote(content: dict[str, Any]) -> str:
    """Where, when and how."""
    m = content["machine"]
    return f"`{content['command']}`; {m['cpu']}, {m['cores']} cores, torch {m['torch']}, {date.today().isoformat()}."
