"""Beyond the paper: a real sentence encoder with few bits, by how near its embeddings stay to the float model's.

    pip install transformers
    python benchmarks/tables/encoder.py sentence-transformers/all-MiniLM-L6-v2

Weights only, all layers; 1 - mean cosine, times 100, over 256 verses of the bundled text. What is calibrated sees 32
others. MODEL is a BERT-like encoder in Hugging Face's form: a name, or a folder with its config, weights and tokenizer.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import paths  # isort: split

import torch
from bench import machine
from command import footnote
from language_model import ASSETS, UNKNOWN
from layout import aligned
from torch import Tensor, nn
from tqdm import tqdm
from zoo import torchvision_models

import ocs

SENTENCES, OTHERS, BATCH = 256, 32, 32
WORDS = range(8, 40)  # of a verse that is taken
ROWS: dict[str, dict[str, Any]] = {
    "per tensor, nearest": {"r": 0.0},
    "per tensor, OCS (the paper)": {},
    "per channel, nearest": {"r": 0.0, "granularity": "channel"},
    "per channel, OCS": {"granularity": "channel"},
    "per channel, OCS, mse clip": {"granularity": "channel", "clip": "mse"},
    "recipe best, r = 0": {"r": 0.0, "recipe": "best"},
    "recipe best": {"recipe": "best"},
    "recipe best, nearest": {"recipe": "best", "rounding": "nearest"},
    "recipe best, squant": {"recipe": "best", "rounding": "squant"},
    "recipe best, select error": {"recipe": "best", "select": "error"},
    "recipe best, gptq": {"recipe": "best", "rounding": "gptq"},
}
Batch = Mapping[str, Tensor]


def verses(path: Path) -> list[str]:
    """Those of the bundled test text that have no unknown word and are neither short nor long, in order."""
    lines = path.read_text().splitlines()
    return [line for line in lines if UNKNOWN not in line and len(line.split()) in WORDS]


def tokens(tokenizer: Callable[..., Batch], sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """Batches of sentences of about one length, as the encoder takes them."""
    ordered = sorted(sentences, key=len)
    parts = (ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH))
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


@torch.inference_mode()
def embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """The mean of each sentence's states, of length 1: [N, H]."""
    found = []
    for batch in batches:
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append(nn.functional.normalize((states * mask).sum(1), dim=-1))
    return torch.cat(found)


def distances(
    model: nn.Module, batches: Sequence[Batch], others: Sequence[Batch], bits: Sequence[int], r: float
) -> dict[str, list[float]]:
    """100 (1 - mean cosine) for each row and each number of bits."""
    expected, found = embeddings(model, batches), {}
    seen = ocs.calibrate(model, others, moments=True, progress=False)
    for row, options in tqdm(ROWS.items(), "settings", leave=False, disable=None):
        found[row] = []
        for wbits in bits:
            quantized = copy.deepcopy(model)
            given = {"r": r, **options} | ({"calibration": seen} if options.get("rounding") == "gptq" else {})
            ocs.quantize(quantized, wbits=wbits, skip=None, expand=False, explain=False, progress=False, **given)
            cosine = (embeddings(quantized, batches) * expected).sum(1).mean()
            found[row].append(100 * (1 - float(cosine)))
    return found


def table(found: Mapping[str, Sequence[float]], bits: Sequence[int]) -> str:
    """Markdown; the least of each column is bold."""
    least = [min(column) for column in zip(*found.values(), strict=True)]
    lines = [["", *(f"{wbits} bits" for wbits in bits)]]
    for row, values in found.items():
        shown = (f"**{x:.2f}**" if x == best else f"{x:.2f}" for x, best in zip(values, least, strict=True))
        lines.append([row, *shown])
    return aligned(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write encoder.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3])
    parser.add_argument("--r", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=paths.OUT)
    args = parser.parse_args(arguments)
    with suppress(ImportError):
        torchvision_models()  # which transformers imports where it is there
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise SystemExit(f"encoder: {error}; pip install transformers") from None
    model, tokenizer = (kind.from_pretrained(args.model) for kind in (AutoModel, AutoTokenizer))
    sentences = verses(ASSETS / "test.txt")
    batches, others = (tokens(tokenizer, part) for part in (sentences[:SENTENCES], sentences[SENTENCES:][:OTHERS]))
    found = distances(model.eval(), batches, others, args.bits, args.r)
    what = f"100 (1 - cosine to the float embeddings); r = {args.r:g} where split"
    heading = f"**{Path(args.model).name}**; {SENTENCES} verses; {what}"
    text = f"{heading}\n\n{table(found, args.bits)}"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    made = {"command": f"python benchmarks/tables/encoder.py {args.model}", "machine": machine()}
    (args.out / "encoder.md").write_text(f"{text}\n\n{footnote(made)}\n")


if __name__ == "__main__":
    main()
