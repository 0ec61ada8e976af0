"""What packed weights are worth: the perplexity of the bundled LSTM packed, beside the simulated model's.

    python benchmarks/tables/packed.py [--bits 8 6 5 4 3] [--r 0.02] [--limit 20000] [--out build/tables]

By the best recipe, embeddings and all: with float inputs, and with 8 bits for each row of inputs and hidden states,
measured as it arrives. "bytes": of parameters and buffers, relative to the float model's.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import paths
from bench import bytes_held, machine
from language_model import ASSETS, encode, load_model, perplexity, read_words
from layout import aligned
from torch import nn
from tqdm import tqdm

import ocs

ROWS: dict[str, Any] = {"abits": 8, "act_scale": "dynamic"}
COLUMNS = ("simulated", "packed", "simulated, 8-bit rows", "packed, 8-bit rows", "bytes")


def row(model: nn.Module, words: Any, **options: Any) -> list[str]:
    """The numbers of one setting."""
    found, size = [], bytes_held(model)
    for inputs in ({}, {**ROWS, "overrides": {"lstm": ROWS}}):
        quantized = copy.deepcopy(model)
        ocs.quantize(quantized, recipe="best", embeddings=True, explain=False, progress=False, **options, **inputs)
        found.append(f"{perplexity(quantized, words):.3f}")
        ocs.pack(quantized)
        found.append(f"{perplexity(quantized, words):.3f}")
    return [*found, f"{bytes_held(quantized) / size:.3f}"]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=(8, 6, 5, 4, 3))
    parser.add_argument("--r", type=float, default=0.02)
    parser.add_argument("--limit", type=int, default=20000, help="words of the test split")
    parser.add_argument("--out", type=Path, default=paths.OUT)
    args = parser.parse_args()
    model, vocabulary = load_model()
    words = encode(read_words(ASSETS, "test"), vocabulary)[: args.limit]
    lines = [["", *COLUMNS], ["float", f"{perplexity(model, words):.3f}", "", "", "", "1"]]
    for bits in tqdm(args.bits, "bits", disable=None):
        lines.append([f"{bits} bits, r = {args.r:g}", *row(model, words, wbits=bits, r=args.r)])
        print(" ".join(lines[-1]), flush=True)
    about = machine()
    text = (
        f"**LSTM**; {len(words):,} words of the bundled text; perplexity\n\n{aligned(lines)}\n\n"
        f"`python benchmarks/tables/packed.py`; {about['cpu']}, {os.cpu_count()} cores, isa {about['isa']}, torch "
        f"{about['torch']}, {about['date']}.\n"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "packed.md").write_text(text)


if __name__ == "__main__":
    main()
