"""Beyond the paper: outlier channel splitting in training, against training alone at the same bits and the same bytes.

    apt-get install dataset-fashion-mnist bible-kjv
    python benchmarks/tables/training.py --data /usr/share/datasets/fashion-mnist
    python benchmarks/tables/training.py --data ... --bits 2 --epochs 2 --seeds 0 1
    python benchmarks/tables/training.py --network LSTM --data build/bible    # the text, see train_language_model.py

A bundled network, ResNet-20 or LSTM, is trained further as a quantized one (ocs.training, thresholds learned from where
clip="mse" puts them, splits planned anew every 100 steps) and converted: top-1 on the 10,000 test images, perplexity
on the test text. Rates fall linearly to 0 from a tenth of the float network's peak, after a rise (ResNet-20: one-cycle,
as there, in bfloat16 by autocast). Nothing was chosen by the test data. "more bits": no splits, and instead one bit
more for as many layers, from the first on, as fit the bytes of r = 0.05. A run is a JSON file; what is there is not run
again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paths  # isort: split

import torch
import torch.nn.functional as F
from bench import machine
from fashion_mnist import count_correct, load, load_model, normalize, read_idx
from language_model import ASSETS as TEXT
from language_model import STEPS, encode, perplexity, read_words, streams, windows
from language_model import load_model as load_lstm
from layout import aligned
from torch import nn
from tqdm import tqdm
from train_fashion_mnist import augment

import ocs
import ocs.training

COLUMNS = {"r = 0": 0.0, "r = 0.02": 0.02, "r = 0.05": 0.05, "more bits": 0.0}
BATCH = 128
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile of Student's t for so many values
Run = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A network and how it is trained further."""

    load: Callable[[], nn.Module]
    skip: Any
    train: Callable[[nn.Module, Path, float, int], float]  # the mean loss of the last hundred steps
    judge: Callable[[nn.Module], float]
    columns: tuple[str, ...] = tuple(COLUMNS)


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """All settings, seed by seed, so that a table that is cut short has fewer seeds and not fewer cells."""
    columns = [column for column in args.columns if column in STUDIES[args.network].columns]
    names = ("network", "seed", "bits", "epochs", "granularity", "column")
    settings = itertools.product([args.network], range(*args.seeds), args.bits, args.epochs, args.granularity, columns)
    return (dict(zip(names, each, strict=True)) for each in settings)


def options_of(run: Run) -> dict[str, Any]:
    """What ocs.training.prepare is given."""
    study, r = STUDIES[run["network"]], COLUMNS[run["column"]]
    options = {"wbits": run["bits"], "r": r, "granularity": run["granularity"], "clip": "mse", "skip": study.skip}
    if run["column"] == "more bits":
        options["overrides"] = more_bits(study, options)
    return options


def more_bits(study: Study, options: dict[str, Any]) -> dict[str, dict[str, int]]:
    """One bit more for layers, from the first on, while that takes no more bytes than r = 0.05."""

    def size(**others: Any) -> int:
        return ocs.quantize(study.load(), **options | others).packed_bytes

    budget, overrides = size(r=0.05), {}
    for line in ocs.quantize(study.load(), **options).quantized:
        tried = overrides | {line.name: {"wbits": options["wbits"] + 1}}
        if size(overrides=tried) <= budget:
            overrides = tried
    return overrides


def groups_of(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The parameters for an optimizer: no weight decay for scales."""
    scales = [p for name, p in model.named_parameters() if "scale" in name]
    others = [p for name, p in model.named_parameters() if "scale" not in name]
    return [{"params": others, "weight_decay": decay}, {"params": scales, "weight_decay": 0.0}]


def train_resnet(model: nn.Module, data: Path, epochs: float, seed: int) -> float:
    """SGD on shifted and mirrored images."""
    images, labels = read_idx(data / "train-images-idx3-ubyte.gz"), read_idx(data / "train-labels-idx1-ubyte.gz").long()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(groups_of(model, 5e-4), 0.02, momentum=0.9, nesterov=True)
    of_epoch = len(images) // BATCH
    steps = round(epochs * of_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
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
    return statistics.fmean(losses[-100:])


def train_lstm(model: nn.Module, data: Path, epochs: float, seed: int) -> float:
    """SGD on 20 streams of the text, which begin at a place of the seed's."""
    torch.manual_seed(seed)
    words = encode(read_words(data, "train"), load_lstm()[1])
    text = streams(words.roll(-int(torch.randint(len(words), ()))), 20)
    of_epoch = math.ceil((len(text) - 1) / STEPS)
    steps, state, losses = round(epochs * of_epoch), None, []
    optimizer = torch.optim.SGD(groups_of(model, 0.0), 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 20, 1) * (1 - step / steps))
    read = itertools.islice(itertools.chain.from_iterable(windows(text) for _ in range(math.ceil(epochs))), steps)
    for inputs, targets in tqdm(read, "steps", steps, leave=False, mininterval=5, disable=None):
        logits, state = model(inputs, state)
        state = tuple(part.detach() for part in state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (loss * len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-100:])


def top1(model: nn.Module) -> float:
    """Percent of the test images."""
    images, labels = load("t10k")
    return 100 * count_correct(model, images, labels) / len(labels)


def test_perplexity(model: nn.Module) -> float:
    """Of the bundled test text."""
    return perplexity(model, encode(read_words(TEXT, "test"), load_lstm()[1]))


STUDIES = {
    "ResNet-20": Study(load_model, ocs.FIRST_LAYER, train_resnet, top1),
    "LSTM": Study(lambda: load_lstm()[0], "decoder", train_lstm, test_perplexity, tuple(COLUMNS)[:3]),
}


def measure(run: Run, data: Path) -> Run:
    """Prepare, train, convert and judge."""
    begin, study = time.perf_counter(), STUDIES[run["network"]]
    model = study.load()
    ocs.training.prepare(model, **options_of(run))
    loss = study.train(model.train(), data, run["epochs"], run["seed"])
    report, seconds = ocs.training.convert(model), round(time.perf_counter() - begin)
    value = study.judge(model.eval())
    return run | {
        "value": value, "loss": loss, "bytes": report.packed_bytes, "seconds": seconds, "machine": machine(),
    }  # fmt: skip


def path_of(out: Path, run: Run) -> Path:
    """Where a run's result lies."""
    name = "-".join(
        str(run[key]).replace(" ", "") for key in ("network", "bits", "epochs", "granularity", "column", "seed")
    )
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
        row += [interval([run["value"] for run in cells[column].values()]) for column in columns]
        row += [interval(_gains(cells[column], cells.get("r = 0", {}))) for column in gained]
        sizes = [str(next(iter(cells[column].values()))["bytes"]) if cells[column] else "-" for column in columns]
        rows.append([*row, " / ".join(sizes)])
    return rows


def _gains(runs: dict[int, Run], plain: dict[int, Run]) -> list[float]:
    return [run["value"] - plain[seed]["value"] for seed, run in runs.items() if seed in plain]


def main() -> None:
    """Parse the options, run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*STUDIES], default="ResNet-20")
    parser.add_argument("--data", type=Path, help="folder with what to train on; without, only the table is printed")
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
            result, partial = measure(run, args.data), path.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(path)
            print(path.stem, result["value"], flush=True)
    found = [json.loads(path.read_text()) for path in sorted(args.out.glob(f"{args.network}-*.json"))]
    if found:
        print(aligned(table(found)))


if __name__ == "__main__":
    main()
