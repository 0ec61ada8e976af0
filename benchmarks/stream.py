"""quantize_file on a model of random bfloat16 weights in files, shaped like a Llama: time and memory.

    python benchmarks/stream.py [--json] [--layers 23] [--rounds 3] [--folder /tmp]
    python benchmarks/stream.py --calibrated --layers 2

23 layers are 1.5 billion weights, 3 GB, which are made in a temporary folder. quantize_file takes turns with reading
these files and writing as many bytes as the result has, to the disk; first with files that the system holds nothing of,
as where they are larger than memory, then with files in its page cache. Then, in a process for each recipe, the
most memory over that after the imports; recipe="best" is timed there.

With --calibrated instead: memory and processor time of gptq with 8-bit inputs, calibrated on a few batches of random
words, by quantize_file and by quantize and save of the model in memory, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench import Row, at_most, in_turns, publish
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ocs
from ocs.formats.source import INDEX

HIDDEN, INNER, HEADS, KEYS, WORDS = 2048, 8192, 32, 512, 32_000
OPTIONS = {"paper": {"wbits": 4, "r": 0.02}, "best": {"wbits": 4, "r": 0.02, "recipe": "best"}}
GPTQ = {"wbits": 4, "r": 0.02, "rounding": "gptq", "abits": 8}
LARGEST = 2 * HIDDEN * WORDS  # bytes of the largest layer
MEMORY, SECONDS = 2 * LARGEST + 500_000_000, 600


class Block(nn.Module):
    """A layer of a decoder; positions are not encoded, which no weight knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(HIDDEN, outputs, bias=False) for outputs in (HIDDEN, KEYS, KEYS, HIDDEN)
        )
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)
        self.input_norm, self.inner_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, HIDDEN] -> the same."""
        y = self.input_norm(x)
        q, k, v = (p(y).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for p in self.projections)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        y = self.inner_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """What gives queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj


class Decoder(nn.Module):
    """A decoder with as many layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, HIDDEN)
        self.layers = nn.Sequential(*(Block() for _ in range(layers)))
        self.norm, self.lm_head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Numbers of words [N, T] -> logits [N, T, WORDS]."""
        return self.lm_head(self.norm(self.layers(self.embed_tokens(words))))


def on_meta(layers: int) -> Decoder:
    """The model without values."""
    with torch.device("meta"):
        return Decoder(layers).bfloat16()


def make_files(folder: Path, layers: int) -> None:
    """Random weights with some outliers, a file for every four layers, and their index."""
    torch.manual_seed(0)
    files: dict[str, dict[str, Tensor]] = {}
    where: dict[str, str] = {}
    for name, tensor in on_meta(layers).state_dict().items():
        number = int(name.split(".")[1]) // 4 + 1 if name.startswith("layers.") else 0
        file = f"model-{number:05d}.safetensors"
        where[name] = file
        files.setdefault(file, {})[name] = tensor
    for file, tensors in files.items():
        made = {name: torch.randn(each.shape, dtype=torch.bfloat16) * 0.02 for name, each in tensors.items()}
        for each in made.values():
            each.view(-1)[::997] *= 5
        save_file(made, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def copy_bytes(source: Path, target: Path, size: int) -> None:
    """Read all of a folder's files, and write so many bytes of what was read, to the disk."""
    buffer = memoryview(bytearray(1 << 24))
    with open(target, "wb") as out:
        for path in sorted(source.glob("*.safetensors")):
            with open(path, "rb") as file:
                while count := file.readinto(buffer):
                    out.write(buffer[: min(count, size - out.tell())])
        out.flush()
        os.fsync(out.fileno())
    target.unlink()


def forget(folder: Path) -> None:
    """Let the system forget files that it holds in memory, as it does with those that are larger."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def quantize(source: Path, out: Path, layers: int, recipe: str, progress: bool | None = False) -> int:
    """Quantize the files, and give the bytes of the result, which goes."""
    ocs.quantize_file(on_meta(layers), out, weights=source, progress=progress, **OPTIONS[recipe])
    size = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    return size


def status(field: str) -> int:
    """Read a size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def watched(source: Path, out: Path, layers: int, recipe: str) -> dict[str, float]:
    """Memory and seconds, in this process."""
    before, begin = status("VmRSS"), time.perf_counter()
    quantize(source, out, layers, recipe, progress=None)
    return {"bytes": status("VmHWM") - before, "seconds": time.perf_counter() - begin}


def calibrated(source: Path, how: str) -> dict[str, float]:
    """Memory and processor seconds with calibration, in this process; how: in "files" or in "memory"."""
    layers = sum(name.count(".q_proj.") for name in json.loads((source / INDEX).read_text())["weight_map"])
    torch.manual_seed(0)
    data = [torch.randint(WORDS, (2, 128)) for _ in range(3)]
    before, begin = status("VmRSS"), time.process_time()
    if how == "files":
        ocs.quantize_file(on_meta(layers), source.with_name("out"), weights=source, calibration=data, **GPTQ)
    else:
        model = on_meta(layers).to_empty(device="cpu")
        for path in source.glob("*.safetensors"):
            model.load_state_dict(load_file(path), strict=False)
        ocs.quantize(model, calibration=data, **GPTQ)
        ocs.save(model, source.with_name("saved"))
    return {"bytes": status("VmHWM") - before, "seconds": time.process_time() - begin}


def in_process(arguments: argparse.Namespace, source: Path, recipe: str) -> dict[str, float]:
    """Memory and seconds, in a process of its own."""
    command = [sys.executable, __file__, "--layers", str(arguments.layers), "--watched", recipe, str(source)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout)


def measure_calibrated(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the files, and compare both ways."""
    (source := folder / "float").mkdir()
    make_files(source, arguments.layers)
    in_files, whole = (in_process(arguments, source, how) for how in ("files", "memory"))
    ratios = {name: in_files[name] / whole[name] for name in whole} | {"bound": in_files["bytes"] / MEMORY}
    rows = [
        Row("MB of memory, gptq", "MB: 2 x largest layer + 500", in_files["bytes"] / 1e6, MEMORY / 1e6,
            ratios["bound"], "<= 1x", ratios["bound"] <= 1),
        Row("MB of memory, gptq", "MB: quantize and save", in_files["bytes"] / 1e6, whole["bytes"] / 1e6,
            ratios["bytes"], "<= 1x", ratios["bytes"] <= 1),
        Row("ms of processor time, gptq", "quantize and save", 1e3 * in_files["seconds"], 1e3 * whole["seconds"],
            ratios["seconds"], "<= 1.5x", ratios["seconds"] <= 1.5),
    ]  # fmt: skip
    publish("stream-calibrated", rows, {"layers": arguments.layers, "bytes of the largest layer": LARGEST})


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the files and time everything."""
    source, out = folder / "float", folder / "out"
    source.mkdir()
    make_files(source, arguments.layers)
    os.sync()
    size = quantize(source, out, arguments.layers, "paper")
    rows = []
    for where, before in (("from the disk", lambda: forget(source)), ("from the page cache", lambda: None)):
        calls = {
            "quantize_file": lambda before=before: (before(), quantize(source, out, arguments.layers, "paper")),
            "copy": lambda before=before: (before(), copy_bytes(source, folder / "copy", size)),
        }
        times = in_turns(calls, arguments.rounds, where)
        times["reading and writing"] = times["copy"]
        rows.append(at_most(f"4 bits, r=0.02, {where}", times, "quantize_file", "reading and writing", 3))
    notes: dict[str, Any] = {
        "weights": sum(p.numel() for p in on_meta(arguments.layers).parameters()),
        "bytes read": sum(path.stat().st_size for path in source.iterdir()),
        "bytes written": size,
    }
    for recipe in OPTIONS:
        found = in_process(arguments, source, recipe)
        ratio = found["bytes"] / MEMORY
        rows.append(Row(f"MB of memory, {recipe}", "MB: 2 x largest layer + 500", found["bytes"] / 1e6, MEMORY / 1e6,
                        ratio, "<= 1x", ratio <= 1))  # fmt: skip
    seconds = found["seconds"]
    rows.append(Row('recipe="best"', "ten minutes", 1e3 * seconds, 1e3 * SECONDS, seconds / SECONDS, "<= 1x",
                    seconds <= SECONDS))  # fmt: skip
    publish("stream", rows, notes)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=23)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--calibrated", action="store_true", help="gptq with calibration instead")
    parser.add_argument("--watched", nargs=2, metavar=("RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watched:
        recipe, source = arguments.watched
        source = Path(source)
        found = watched(source, source.with_name("out"), arguments.layers, recipe) if recipe in OPTIONS else None
        print(json.dumps(found or calibrated(source, recipe)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (measure_calibrated if arguments.calibrated else measure)(arguments, Path(folder))


if __name__ == "__main__":
    main()
