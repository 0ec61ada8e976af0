"""What every table's command shares: its options, how networks and data are opened, and what is printed and written."""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import paths  # isort: split

import data
import numpy as np
from bench import machine
from cells import ModelError, Run, Store, say
from data import DataError
from layout import Block, as_csv, markdown, records
from options import TEXTS, Table, parse
from pictures import picture
from ranks import Ranks
from sources import open_images, open_text

import ocs

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())


def of_model(table: str, model: str) -> dict[str, dict[str, float]]:
    """The paper's Table 2 or 3: by bits, then by column."""
    return PAPER[table]["models"][model]["bits"]


def main(table: Table, arguments: list[str] | None = None) -> None:
    """Measure every model's cells, print the table, and write it in all its forms."""
    args = parse(table, arguments)
    try:
        (args.out / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{table.name}: --out {args.out}: {error.strerror}") from None
    problems: list[str] = []
    with Ranks(args.device) as ranks:
        run, blocks = Run(Store(args.out / "cells", fresh=args.fresh), ranks), []
        try:
            _measure(table, args, run, blocks, problems)
        except DataError as error:
            problems.append(str(error))
            if ranks.world > 1:
                raise SystemExit(f"{table.name}: {error}") from None  # ends the other ranks, too
        except KeyboardInterrupt:
            kept = f"{run.measured} new cells are kept in {paths.shown(args.out)}"
            raise SystemExit(f"\n{table.name}: stopped; {kept}, the same command (less --fresh) goes on") from None
        if ranks.rank == 0 and blocks:
            publish(table, args, blocks, run)
        ranks.any(None)  # a rank that ended before would end rank 0
    problems += [f"{run.failed} cells failed, see above"] if run.failed else []
    if problems and ranks.rank == 0:
        raise SystemExit(f"{table.name}: {'; '.join(problems)}")


def _measure(table: Table, args: argparse.Namespace, run: Run, blocks: list[Block], problems: list[str]) -> None:
    """Every model's block, as far as it goes."""
    open_task = table.open or (open_text if args.dataset in TEXTS else open_images)
    for i, name in enumerate(args.models):
        weights = args.weights[i % len(args.weights)] if args.weights else None
        try:
            task = run.open(lambda name=name, weights=weights: open_task(args, name, weights, run.ranks))
            known = task.name in table.models
            paper_name = task.name if known else table.stands_for
            cells = table.cells(args, paper_name)
            if getattr(args, "clip_as", "ours") == "release":
                cells = [cell.clipped_as_released() for cell in cells]
            results = run.measure(task, cells)
        except ModelError as error:
            problems.append(f"{name}: {error}")
            continue
        source = f"{paper_name} on {(data.NAMES | TEXTS)[table.dataset]}"
        same = known and args.dataset == table.dataset
        of_paper = table.paper_float(paper_name)
        blocks.append(Block(task.name, task.what, task.metric, cells, results, source, of_paper, same))


def publish(table: Table, args: argparse.Namespace, blocks: list[Block], run: Run) -> None:
    """Print, and write table2.md, .csv, .json and a picture for each model."""
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("command", "fresh", "json")
    }
    content = {
        "table": table.name,
        "title": table.title,
        "command": args.command,
        "settings": settings,
        "machine": machine() | {"numpy": np.__version__, "ocs": ocs.__version__, "world": run.ranks.world},
        "seconds": {part: round(value, 1) for part, value in run.spent.items()},
        "cells": list(records(blocks)),
    }
    text = markdown(blocks)
    print(json.dumps(content, indent=1) if args.json else f"\n{table.label}. {table.title}\n\n{text}")
    say(run.summary())
    base = args.out / table.name
    for stale in args.out.glob(f"{table.name}*.png"):
        stale.unlink()
    base.with_suffix(".json").write_text(json.dumps(content, indent=1))
    base.with_suffix(".csv").write_text(as_csv(blocks))
    base.with_suffix(".md").write_text(f"{text}\n\n{footnote(content)}\n")
    pictures = [_save_picture(table, block, base, len(blocks)) for block in blocks]
    written = [base.with_suffix(suffix) for suffix in (".md", ".csv", ".json")] + [path for path in pictures if path]
    say("written: " + ", ".join(map(paths.shown, written)))


def _save_picture(table: Table, block: Block, base: Path, blocks: int) -> Path | None:
    figure = picture(block, table.label, table.x, table.panels)
    if figure is None:
        return None
    path = base.with_name(f"{base.name}-{block.name}.png" if blocks > 1 else f"{base.name}.png")
    figure.savefig(path, dpi=110)
    return path


def footnote(content: dict[str, Any]) -> str:
    """Where, when and how."""
    m = content["machine"]
    return f"`{content['command']}`; {m['cpu']}, {m['cores']} cores, torch {m['torch']}, {date.today().isoformat()}."
