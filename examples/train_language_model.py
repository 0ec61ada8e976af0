r"""Train an LSTM language model as Zaremba, Sutskever and Vinyals do (arXiv 1409.2329), by default their medium one.

The float model of the paper's Table 6, from WikiText-2's three token files (on a GPU):

    python examples/train_language_model.py --data wikitext-2 --out build/wikitext-2 --device cuda

The bundled one, from Debian's text of the King James Bible (two cores, about half an hour):

    apt-get install bible-kjv
    python examples/train_language_model.py --bible --hidden 200 --tied --dropout 0.2 --init 0.1 \
        --epochs 9 --constant 4 --decay 2 --out assets/bible --half

Each epoch's weights are kept in --out, so that a run that was stopped goes on with the next epoch. The last epoch's are
the result: the validation text takes part in no choice.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from language_model import (
    STEPS,
    UNKNOWN,
    LanguageModel,
    encode,
    load_model,
    perplexity,
    read_words,
    save_model,
    streams,
    vocabulary_of,
    windows,
)
from torch import Tensor
from tqdm import tqdm

SPLITS = ("train", "valid", "test")
RARE = 3  # words that the training text has less often become <unk>
EVERY = 20  # one chapter of so many is validation text, one is test text


def write_bible(folder: Path) -> None:
    """The King James Bible as three files of words, a verse a line, punctuation apart; whole chapters to each split."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    verses = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    chapters: dict[str, list[list[str]]] = {}
    for verse in verses:
        place, text = verse.split(" ", 1)
        chapters.setdefault(place.split(":")[0], []).append(re.findall(r"[\w']+|[^\w\s]", text))
    parts: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for i, lines in enumerate(chapters.values()):
        parts[{0: "valid", EVERY // 2: "test"}.get(i % EVERY, "train")] += lines
    counts = Counter(word for line in parts["train"] for word in line)
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in parts.items():
        known = [" ".join(w if counts[w] >= RARE else UNKNOWN for w in line) for line in lines]
        (folder / f"{split}.txt").write_text("\n".join(known) + "\n")


def train_epoch(model: LanguageModel, text: Tensor, rate: float, clip: float, title: str) -> float:
    """One pass of SGD over streams [T, B], states carried over; the loss is a sum over steps, a mean over streams."""
    model.train()
    state, total = None, 0.0
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, rate)
    bar = tqdm(windows(text), title, total=math.ceil((len(text) - 1) / STEPS), mininterval=5, leave=False, disable=None)
    for inputs, targets in bar:
        logits, state = model(inputs, state)
        state = tuple(part.detach() for part in state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / text.shape[1]
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        total += loss.item()
    return math.exp(total / (len(text) - 1))


def start(args: argparse.Namespace, vocabulary: list[str], out: Path) -> tuple[LanguageModel, list[dict[str, Any]]]:
    """A new model, or the one that an earlier run left in `out`, with the log of its epochs."""
    log = out.with_suffix(".json")
    if out.exists() and log.exists():
        model, words = load_model(out)
        left = json.loads(log.read_text())
        other = [name for name, value in settings(args).items() if left["settings"].get(name) != value]
        other += ["text"] if words != vocabulary else []
        if other or (left["half"] and args.epochs > len(left["epochs"])):
            reason = f"another {' and '.join(other)}" if other else "a float16 model"
            raise SystemExit(f"{out.parent}: there lies the run of {reason}; choose another --out, or remove it")
        return model.to(args.device), left["epochs"]
    model = LanguageModel(len(vocabulary), hidden=args.hidden, layers=args.layers, dropout=args.dropout, tied=args.tied)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -args.init, args.init)
    return model.to(args.device), []


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a run that goes on must have in common with the one before."""
    others = ("data", "bible", "out", "device", "epochs", "half")
    return {name: value for name, value in vars(args).items() if name not in others}


def train(args: argparse.Namespace) -> None:
    """All epochs that are left."""
    words = {split: read_words(args.data, split) for split in dict.fromkeys((args.train, *SPLITS[1:]))}
    words["train"] = words[args.train]
    vocabulary = vocabulary_of(words["train"])
    text = {split: encode(part, vocabulary).to(args.device) for split, part in words.items()}
    print(
        f"{sum(map(len, words.values())):,} words, {len(words['train']):,} to train on; {len(vocabulary):,} different"
    )
    torch.manual_seed(args.seed)
    weights = args.out / "lstm.safetensors"
    model, epochs = start(args, vocabulary, weights)
    for epoch in range(len(epochs) + 1, args.epochs + 1):
        torch.manual_seed(args.seed + epoch)
        begin, rate = time.perf_counter(), args.rate / args.decay ** max(epoch - args.constant, 0)
        seen = train_epoch(model, streams(text["train"], args.batch), rate, args.clip, f"epoch {epoch}/{args.epochs}")
        model.eval()
        line = {"epoch": epoch, "rate": rate, "train": seen, "valid": perplexity(model, text["valid"])}
        epochs.append(line | {"seconds": round(time.perf_counter() - begin)})
        print(" ".join(f"{name} {value:.6g}" for name, value in epochs[-1].items()), flush=True)
        keep(args, model, vocabulary, epochs, weights)
    if args.half:
        keep(args, model, vocabulary, epochs, weights, half=True)
        model = load_model(weights)[0].to(args.device)
    print(f"perplexity: valid {perplexity(model, text['valid']):.2f}, test {perplexity(model, text['test']):.2f}")


def keep(
    args: argparse.Namespace, model: LanguageModel, vocabulary: list[str], epochs: list[dict[str, Any]], path: Path,
    half: bool = False,
) -> None:  # fmt: skip
    """Weights and log, each whole or not at all."""
    log = {"settings": settings(args), "half": half, "words": len(vocabulary), "epochs": epochs}
    partial = path.with_suffix(".partial")
    save_model(model, vocabulary, partial, torch.float16 if half else torch.float32)
    partial.replace(path)
    partial.write_text(json.dumps(log, indent=1) + "\n")
    partial.replace(path.with_suffix(".json"))


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with wiki.train.tokens (or train.txt), and valid, test")
    parser.add_argument("--bible", action="store_true", help="write the King James Bible to --data first")
    parser.add_argument("--train", choices=SPLITS, default="train", help="another split where that one is not at hand")
    parser.add_argument("--out", type=Path, required=True, help="folder for lstm.safetensors and its log")
    parser.add_argument("--hidden", type=int, default=650, help="LSTM units, and size of the embedding")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tied", action="store_true", help="the last layer shares the embedding's weight")
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--init", type=float, default=0.05, help="weights start uniform in [-init, init]")
    parser.add_argument("--epochs", type=int, default=39)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--constant", type=int, default=6, help="epochs at the full rate")
    parser.add_argument("--decay", type=float, default=1.2, help="divides the rate at each epoch after them")
    parser.add_argument("--clip", type=float, default=5.0, help="largest norm of the gradient")
    parser.add_argument("--batch", type=int, default=20, help="streams that are read side by side")
    parser.add_argument("--half", action="store_true", help="keep the result as float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data is None and not args.bible:
        parser.error("--data is missing: the folder with the text; or --bible")
    args.data = args.data or Path("build/bible")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.bible:
            write_bible(args.data)
        train(args)
    except FileNotFoundError as error:
        hint = "; --bible needs Debian's package bible-kjv" if error.filename == "bible" else ""
        raise SystemExit(f"{error}{hint}") from None


if __name__ == "__main__":
    main()
