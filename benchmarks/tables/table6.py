"""An LSTM language model on WikiText-2: perplexity by weight bits, expand ratio and clip method.

Weights only: two LSTM layers, and the last linear layer unless it is tied to the embedding. The float model comes from
examples/train_language_model.py. Without WikiText-2's training text at hand: --dataset bible, the bundled network.

    python benchmarks/tables/table6.py --data wikitext-2 --weights build/wikitext-2/lstm.safetensors
    python benchmarks/tables/table6.py --dataset bible --bits 6 5 4
"""

from __future__ import annotations

import argparse

from cells import Cell
from command import PAPER, Table, main
from options import number


def cells(args: argparse.Namespace, model: str) -> list[Cell]:
    """A row for each bit-width and ratio, a column for each clip method."""
    found = []
    for bits in args.bits:
        for r in args.r:
            paper = {float(key): row for key, row in PAPER["table6"]["bits"].get(str(bits), {}).items()}.get(r, {})
            for clip in args.clip:
                options = {"wbits": bits, "r": r, "clip": number(clip)}
                row, axes = f"{bits} bits, r = {r:g}", {"bits": bits, "r": r}
                curve = "no clip" if clip == "none" else "best clip"
                found.append(Cell(row, f"clip {clip}", options, paper=paper.get(clip), axes=axes, curve=curve))
    return found


TABLE = Table(
    name="table6",
    doc=__doc__,
    cells=cells,
    paper_float=lambda model: PAPER["table6"]["float"],
    dataset="wikitext-2",
    models=("LSTM",),
    stands_for="LSTM",
    defaults={
        "bits": (6, 5), "r": (0.0, 0.01, 0.02, 0.05), "clip": ("none", "mse", "aciq", "kl"), "streams": 10,
    },
    x="r",
    panels="bits",
)  # fmt: skip

if __name__ == "__main__":
    main(TABLE)
