"""Beyond the paper: a real sentence encoder with few bits, by how near its embeddings stay to the float model's.

    pip install transformers
    python benchmarks/tables/encoder.py sentence-transformers/all-MiniLM-L6-v2
    python benchmarks/tables/encoder.py sentence-transformers/all-MiniLM-L6-v2 --what inputs both

All layers; 1 - mean cosine, times 100, over 256 verses of the bundled text. What is calibrated sees 32 others. "inputs"
has those of all layers in few bits, with weights of 8, by how many of their channels are split; "both" weights, too,
part by part.
MODEL is a BERT-like encoder in Hugging Face's form: a name, or a folder with its config, weights and tokenizer.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isnan
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
Options = dict[str, Any]
GROUPS: Options = {"granularity": "group", "group": 32}
FEW = 3  # bits, up to which learned rounding is measured
WEIGHTS: dict[str, Options] = {
    "per tensor, nearest": {"r": 0.0},
    "per tensor, OCS (the paper)": {},
    "per channel, nearest": {"r": 0.0, "granularity": "channel"},
    "per channel, OCS, mse clip": {"granularity": "channel", "clip": "mse"},
    "groups of 32, OCS, mse clip": {**GROUPS, "clip": "mse"},
    "recipe best, r = 0": {"r": 0.0, "recipe": "best"},
    "recipe best": {"recipe": "best"},
    "recipe best, nearest": {"recipe": "best", "rounding": "nearest"},
    "recipe best, gptq": {"recipe": "best", "rounding": "gptq"},
    "recipe best, learned": {"recipe": "best", "rounding": "learned"},
    "groups of 32, gptq": {**GROUPS, "recipe": "best", "rounding": "gptq"},
    "groups of 32, learned": {**GROUPS, "recipe": "best", "rounding": "learned"},
}
ROWS: Options = {"act_scale": "dynamic"}
EIGHT: Options = {"wbits": 8, "r": 0.0, "recipe": "best"}
INPUTS: dict[str, Options] = {
    f"{bits} bits, {how}": EIGHT | {"abits": bits} | options
    for bits in (8, 6)
    for how, options in {
        "no clipping": {"act_clip": "none"},
        "mse clip": {"act_clip": "mse"},
        "a scale per row": ROWS,
        "a scale per row, weights by gptq": ROWS | {"rounding": "gptq"},
    }.items()
    if bits == 8 or "gptq" not in how  # weights of 8 bits are not what 6-bit inputs lose by
}
SPLITS: dict[str, Options] = {
    "r = 0": {},
    "0.05, percentile (the paper)": {"act_r": 0.05, "act_select": "percentile"},
    **{f"{r:g}": {"act_r": r, "act_select": "max"} for r in (0.02, 0.05, 0.1)},
}
MAX: Options = {"act_r": 0.05, "act_select": "max"}
BOTH: dict[str, Options] = {
    f"W{wbits}A{abits}{how}": {"wbits": wbits, "abits": abits, "recipe": "best"} | options
    for how, options in {"": {}, ", a scale per row": ROWS}.items()
    for wbits, abits in ((8, 8), (8, 6), (4, 8))
}
PARTS: dict[str, Options] = {
    "r = 0": {"r": 0.0},
    "weights split": {},
    "inputs split": MAX | {"r": 0.0},
    "both": MAX,
    "both, gptq": MAX | {"rounding": "gptq"},
    "both, gptq, no clipping": MAX | {"rounding": "gptq", "act_clip": "none"},
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
    model: nn.Module,
    batches: Sequence[Batch],
    others: Sequence[Batch],
    rows: Mapping[str, Options],
    columns: Mapping[str, Options],
    r: float,
) -> dict[str, list[float]]:
    """100 (1 - mean cosine) for each row and column; NaN where the two do not go together."""
    expected, found = embeddings(model, batches), {}
    seen = ocs.calibrate(model, others, moments=True, progress=False)
    for row, options in tqdm(rows.items(), "settings", leave=False, disable=None):
        found[row] = []
        for name, column in columns.items():
            given = {"r": r, **options, **column}
            nothing_clipped = given.get("act_scale") == "dynamic" and "act_clip" in column
            if nothing_clipped or (given.get("rounding") == "learned" and given["wbits"] > FEW):
                found[row].append(float("nan"))
                continue
            of_input = "abits" in given and ("act_r" in given or given.get("act_scale") != "dynamic")
            if given.get("rounding") == "learned":
                given["calibration"] = others
            elif of_input or given.get("rounding") == "gptq":
                given["calibration"] = seen
            quantized = copy.deepcopy(model)
            try:
                ocs.quantize(quantized, skip=None, expand=False, explain=False, progress=False, **given)
            except ValueError as error:
                tqdm.write(f"{row}: {error}")
                found[row].append(float("nan"))
                continue
            cosine = (embeddings(quantized, batches) * expected).sum(1).mean()
            found[row].append(100 * (1 - float(cosine)))
            tqdm.write(f"{row}; {name}: {found[row][-1]:.3f}")
    return found


def table(found: Mapping[str, Sequence[float]], columns: Sequence[str], *, bold: bool = True) -> str:
    """Markdown; the least of each column is bold where its cells compete."""
    least = [min((x for x in column if not isnan(x)), default=0.0) for column in zip(*found.values(), strict=True)]
    lines = [["", *columns]]
    for row, values in found.items():
        cells = ("" if isnan(x) else f"{x:.2f}" for x in values)
        shown = (
            f"**{cell}**" if bold and x == best else cell for cell, x, best in zip(cells, values, least, strict=True)
        )
        lines.append([row, *shown])
    return aligned(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write encoder.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--what", choices=("weights", "inputs", "both"), nargs="+", default=["weights"])
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
    args.out.mkdir(parents=True, exist_ok=True)
    by_bits = {f"{wbits} bits": {"wbits": wbits} for wbits in args.bits}
    tables = {"weights": (WEIGHTS, by_bits), "inputs": (INPUTS, SPLITS), "both": (BOTH, PARTS)}
    for what in args.what:
        rows, columns = tables[what]
        found = distances(model.eval(), batches, others, rows, columns, args.r)
        measure = f"100 (1 - cosine to the float embeddings); r = {args.r:g} where weights are split"
        heading = f"**{Path(args.model).name}**, {what}; {SENTENCES} verses; {measure}"
        text = f"{heading}\n\n{table(found, list(columns), bold=what == 'weights')}"
        print(text)
        command = f"python benchmarks/tables/encoder.py sentence-transformers/{Path(args.model).name} --what {what}"
        name = "encoder.md" if what == "weights" else f"encoder-{what}.md"
        (args.out / name).write_text(f"{text}\n\n{footnote({'command': command, 'machine': machine()})}\n")


if __name__ == "__main__":
    main()
