r"""Train the small decoder-only transformer of decoder.py on the King James Bible, on the words that the LSTM reads.

    apt-get install bible-kjv
    python examples/train_decoder.py --out assets/bible

The embedding, which the last layer shares, is the bundled LSTM's and stays as it is: learning it again is what would
take longest. AdamW; the learning rate rises within a hundred steps, stays, and falls to zero over the last --fall. The
last step's weights are the result, as float16: the validation text takes part in no choice. Every hundred steps a
checkpoint is kept in --out, from which a run that was stopped goes on; as the rate stays until it falls, also with
other --steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decoder import Decoder
from language_model import (
    WEIGHTS,
    LanguageModel,
    encode,
    load_model,
    perplexity,
    read_words,
    save_model,
    streams,
)
from torch import Tensor
from train_language_model import SPLITS, write_bible

DECAY, CLIP = 0.1, 1.0  # of weights; the largest norm of a gradient
RISE, EVERY = 100, 100  # steps: until the full rate is reached; between lines of the log


def rate_at(step: int, args: argparse.Namespace) -> float:
    """The learning rate of a step, counted from 0."""
    return args.rate * min((step + 1) / RISE, (args.steps - step) / args.fall, 1.0)


def optimizer_of(model: Decoder) -> torch.optim.Optimizer:
    """AdamW of what learns, which lets matrices decay and the norms' weights not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
              {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def new_model(lstm: LanguageModel, seed: int) -> Decoder:
    """Blocks that start small, between the embedding and the last layer of a trained LSTM."""
    torch.manual_seed(seed)
    model = Decoder(lstm.config["words"], width=lstm.config["hidden"])
    for parameter in model.blocks.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.constant_(model.norm.weight, 0.2)  # an LSTM's outputs lie within 1
    for name in ("embedding", "decoder"):
        model.get_submodule(name).load_state_dict(lstm.get_submodule(name).state_dict())
        model.get_submodule(name).requires_grad_(False)
    return model


def train_step(
    model: Decoder, optimizer: torch.optim.Optimizer, rate: float, window: tuple[Tensor, Tensor], state: Any
) -> tuple[float, Any]:
    """One step on inputs and targets [T, B]: the mean loss, and the state after it."""
    logits, state = model(window[0], state)
    loss = F.cross_entropy(logits.flatten(0, 1), window[1].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item(), tuple(part.detach() for part in state)


def train(args: argparse.Namespace) -> None:
    """All steps that are left, pass after pass over the text."""
    words = {split: read_words(args.data, split) for split in SPLITS}
    lstm, vocabulary = load_model(args.embedding)
    text = {split: encode(part, vocabulary) for split, part in words.items()}
    model = new_model(lstm, args.seed)
    optimizer, checkpoint = optimizer_of(model), args.out / "decoder.partial"
    seen, state, first = streams(text["train"], args.batch), None, 0
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("rate", "batch", "seed", "fall", "steps")}
    log: dict[str, Any] = {"settings": settings, "words": len(vocabulary), "weights": count(model), "steps": []}
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        if other := [name for name in ("rate", "batch", "seed") if kept["settings"][name] != settings[name]]:
            raise SystemExit(f"{checkpoint}: of a run of another {other[0]}; choose another --out, or remove it")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        log["steps"], state = kept["log"], kept["state"]
        first = log["steps"][-1]["step"]
    windows = (len(seen) - 1) // model.steps
    begin, total = time.perf_counter(), 0.0
    for step in range(first, args.steps):
        start = step % windows * model.steps
        window = seen[start : start + model.steps], seen[start + 1 : start + model.steps + 1]
        loss, state = train_step(model, optimizer, rate_at(step, args), window, state if start else None)
        total += loss
        if (step + 1) % EVERY == 0 or step + 1 == args.steps:
            done = step % EVERY + 1
            seconds = round(time.perf_counter() - begin)
            log["steps"].append({"step": step + 1, "train": math.exp(total / done), "seconds": seconds})
            begin, total = time.perf_counter(), 0.0
            print(*log["steps"][-1].values(), f"of {args.steps}", flush=True)
            if step + 1 <= args.steps - args.fall:
                kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(kept | {"settings": settings, "log": log["steps"], "state": state}, checkpoint)
    save_model(model, vocabulary, args.out / "decoder.safetensors", torch.float16)
    model = load_model(args.out / "decoder.safetensors")[0]
    log["perplexity"] = {split: perplexity(model, text[split]) for split in SPLITS[1:]}
    (args.out / "decoder.json").write_text(json.dumps(log, indent=1) + "\n")
    print("perplexity:", ", ".join(f"{split} {found:.2f}" for split, found in log["perplexity"].items()))


def count(model: Decoder) -> int:
    """Of its weights, the tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.txt, valid.txt, test.txt; default: made here")
    parser.add_argument("--out", type=Path, required=True, help="folder for decoder.safetensors and its log")
    parser.add_argument("--embedding", type=Path, default=WEIGHTS, help="file of the LSTM; the bundled one")
    parser.add_argument("--steps", type=int, default=1900, help="of --batch windows each; %(default)s")
    parser.add_argument("--fall", type=int, default=700, help="the last steps, in which the rate falls; %(default)s")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate; %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="streams that are read side by side; %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        args.data = Path("build/bible")
        write_bible(args.data)
    train(args)


if __name__ == "__main__":
    main()
