"""Beyond the paper: outlier channel splitting in training, against training alone at the same bits and the same bytes.

    apt-get install dataset-fashion-mnist
    python benchmarks/tables/training.py --data /usr/share/datasets/fashion-mnist
    python benchmarks/tables/training.py --data ... --bits 2 --epochs 2 --seeds 0

The bundled ResNet-20 is trained further as a quantized network (ocs.training, thresholds learned from where clip="mse"
puts them, splits planned anew every 100 steps) and converted; top-1 on the 10,000 test images. SGD on a one-cycle
schedule whose peak is a tenth of that of the float network, images shifted and mirrored as there, autocast to bfloat16.
Nothing was chosen by the test images. "more bits": no splits, and instead one bit more for as many layers, from the
first on, as fit the bytes of r = 0.05. A run is a JSON file; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import paths  # isort: split

import torch
import torch.nn.functional as F
from bench import machine
from fashion_mnist import count_correct, load, load_model, normalize, read_idx
from layout import aligned
from torch import Tensor, nn
from tqdm import tqdm
from train_fashion_mnist import augment

import ocs
import ocs.training

COLUMNS = {"r = 0": 0.0, "r = 0.02": 0.02, "r = 0.05": 0.05, "more bits": 0.0}
BATCH, RATE, DECAY = 128, 0.02, 5e-4
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile of Student's t for so many values
Run = dict[str, Any]


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """All settings, seed by seed, so that a table that is cut short has fewer seeds and not fewer cells."""
    for seed in range(*args.seeds):
        for bits in args.bits:
            for epochs in args.epochs:
                for granularity in args.granularity:
                    for column in args.columns:
                        yield {
                            "bits": bits, "epochs": epochs, "granularity": granularity, "column": column, "seed": seed,
                        }  # fmt: skip


def options_of(run: Run) -> dict[str, Any]:
    """What ocs.training.prepare is given."""
    options = {"wbits": run["bits"], "r": COLUMNS[run["column"]], "granularity": run["granularity"], "clip": "mse"}
    if run["column"] == "more bits":
        options["overrides"] = more_bits(options)
    return options


def more_bits(options: dict[str, Any]) -> dict[str, dict[str, int]]:
    """One bit more for layers, from the first on, while that takes no more bytes than r = 0.05."""
    budget, overrides = _bytes(options | {"r": 0.05}), {}
    for line in ocs.quantize(load_model(), **options).quantized:
        tried = overrides | {line.name: {"wbits": options["wbits"] + 1}}
        if _bytes(options | {"overrides": tried}) <= budget:
            overrides = tried
    return overrides


def _bytes(options: dict[str, Any]) -> int:
    return ocs.quantize(load_model(), **options).packed_bytes


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: float, seed: int) -> float:
    """Train in place; the mean loss of the last hundred steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scales = [p for name, p in model.named_parameters() if name.endswith("scale")]
    others = [p for name, p in model.named_parameters() if not name.endswith("scale")]
    groups = [{"params": others, "weight_decay": DECAY}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, RATE, momentum=0.9, nesterov=True)
    of_epoch = len(images) // BATCH
    steps = round(epochs * of_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    losses = []
    for step in tqdm(range(steps), "steps", leave=False, mininterval=5, disable=None):
        at = step % of_epoch
        if at == 0:
            order = torch.randperm(len(images), generator=generator)
        picked = order[at * BATCH : (at + 1) * BATCH]
        x = normalize(augment(images[picked], generator))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return statistics.fmean(losses[-100:])


def measure(run: Run, data: Path) -> Run:
    """Prepare, train, convert and judge."""
    begin = time.perf_counter()
    images, labels = read_idx(data / "train-images-idx3-ubyte.gz"), read_idx(data / "train-labels-idx1-ubyte.gz").long()
    test = load("t10k")
    model, options = load_model(), options_of(run)
    ocs.training.prepare(model, **options)
    loss = train(model, images, labels, run["epochs"], run["seed"])
    report = ocs.training.convert(model)
    return run | {
        "right": count_correct(model, *test), "images": len(test[1]),
        "bytes": report.packed_bytes, "loss": loss, "seconds": round(time.perf_counter() - begin), "machine": machine(),
    }  # fmt: skip


def path_of(out: Path, run: Run) -> Path:
    """Where a run's result lies."""
    name = "-".join(str(run[key]).replace(" ", "") for key in ("bits", "epochs", "granularity", "column", "seed"))
    return out / f"{name}.json"


# --- The table --------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Mean and half of its 95 % interval over seeds, where there are two or more."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    half = T95.get(len(values), 2.6) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _accuracy(run: Run) -> float:
    return 100 * run["right"] / run["images"]


def table(found: Sequence[Run]) -> list[list[str]]:
    """A row for bits, epochs and granularity; then what splits and bits give beyond r = 0, seed by seed, and bytes."""
    columns = [column for column in COLUMNS if any(run["column"] == column for run in found)]
    gained = [column for column in columns if column != "r = 0"]
    rows = [["", *columns, *(f"{column}, gain" for column in gained), "bytes"]]
    keys = dict.fromkeys((run["bits"], run["epochs"], run["granularity"]) for run in found)
    for key in sorted(keys, key=lambda key: (-key[0], key[1], key[2] != "tensor")):
        cells: dict[str, dict[int, Run]] = {column: {} for column in columns}
        for run in found:
            if (run["bits"], run["epochs"], run["granularity"]) == key:
                cells[run["column"]][run["seed"]] = run
        bits, epochs, granularity = key
        row = [f"{bits} bits, {epochs:g} epoch{'s' * (epochs != 1)}, per {granularity}"]
        row += [interval([*map(_accuracy, cells[column].values())]) for column in columns]
        row += [interval(_gains(cells[column], cells.get("r = 0", {}))) for column in gained]
        sizes = [str(next(iter(cells[column].values()))["bytes"]) if cells[column] else "-" for column in columns]
        rows.append([*row, " / ".join(sizes)])
    return rows


def _gains(runs: dict[int, Run], plain: dict[int, Run]) -> list[float]:
    return [_accuracy(run) - _accuracy(plain[seed]) for seed, run in runs.items() if seed in plain]


def main() -> None:
    """Parse the options, run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the training images; without, only the table is printed")
    parser.add_argument("--out", type=Path, default=paths.OUT / "training")
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4))
    parser.add_argument("--epochs", type=float, nargs="+", default=(1, 2))
    parser.add_argument("--granularity", nargs="+", choices=("tensor", "channel"), default=("tensor", "channel"))
    parser.add_argument("--columns", nargs="+", choices=[*COLUMNS], default=[*COLUMNS])
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 3), metavar=("FIRST", "END"))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for run in runs(args) if args.data else ():
        path = path_of(args.out, run)
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(measure(run, args.data), indent=1) + "\n")
            partial.replace(path)
            print(path.stem, json.loads(path.read_text())["right"] / 100, flush=True)
    found = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
    if found:
        print(aligned(table(found)))


if __name__ == "__main__":
    main()
