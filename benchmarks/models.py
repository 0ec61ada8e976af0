"""ocs.quantize() on whole networks against the paper's procedure, and quantized networks against the float ones.

    python benchmarks/models.py [--json]

The rival of quantize() is the paper's procedure written literally in numpy, which looks at the whole tensor for every
split and copies it to append a channel. Of vgg16_bn only the splitting of its largest layer is timed, for a few splits,
and scaled to those that the layer gets. Where networks run, a float one and both its quantized forms take turns:
resnet50 on 32 images of 224 x 224, in either memory format, and two LSTM layers of 650 units on 20 sequences of 35
steps, as in the paper. Random weights, wbits=5.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench import Row, at_most, faster, in_turns, publish
from torch import Tensor, nn
from tqdm import tqdm
from zoo import torchvision_models

import ocs
from ocs.functional import splits_for
from ocs.kernels import reference

BITS, QMAX = 5, 15
FEW = 3  # splits timed of a large layer


def weights(model: nn.Module) -> Iterator[np.ndarray]:
    """The weights that quantize() rewrites: all but the first convolution's."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    yield from (layer.weight.detach().numpy() for layer in layers[1:])


def literal(w: np.ndarray, splits: int) -> np.ndarray:
    """Integers of the split weight, as the paper describes them."""
    picks = reference.pick_channels(w, splits)
    scale = np.abs(reference.split_channels(w, picks, False)[0]).max() / np.float32(QMAX)
    u, _ = reference.split_channels(w / scale, picks, True)
    return np.clip(reference.round_half_up(u), -QMAX, QMAX).astype(np.int8)


def literal_ms(model: nn.Module, r: float) -> float:
    """Milliseconds of the literal procedure over a whole network."""
    begin = time.perf_counter()
    for w in weights(model):
        literal(w, splits_for(r, w.shape[1], 1))
    return 1e3 * (time.perf_counter() - begin)


def literal_largest_ms(model: nn.Module, r: float) -> float:
    """Milliseconds that the literal procedure spends on splitting the largest layer alone, from a few of its splits."""
    w = max(weights(model), key=lambda w: w.size)
    begin = time.perf_counter()
    reference.pick_channels(w, FEW)
    return 1e3 * (time.perf_counter() - begin) * splits_for(r, w.shape[1], 1) / FEW


def quantize_times(model: nn.Module, r: float, rounds: int, *, whole: bool) -> dict[str, list[float]]:
    """Milliseconds of quantize(), of cloning and, where `whole`, of the literal procedure, in turns.

    Each round quantizes a fresh copy, which is not timed.
    """
    times: dict[str, list[float]] = {"ocs.quantize": [], "cloning every weight": [], "literal numpy": []}
    for _ in tqdm(range(rounds), f"quantize, r={r:g}", leave=False, delay=2, disable=None):
        fresh = copy.deepcopy(model)
        begin = time.perf_counter()
        clones = [p.detach().clone() for p in model.parameters()]
        times["cloning every weight"].append(1e3 * (time.perf_counter() - begin))
        del clones
        begin = time.perf_counter()
        ocs.quantize(fresh, wbits=BITS, r=r, progress=False)
        times["ocs.quantize"].append(1e3 * (time.perf_counter() - begin))
        if whole:
            times["literal numpy"].append(literal_ms(model, r))
    return times


def compare(name: str, rounds: int, targets: dict[float, float], *, whole: bool) -> list[Row]:
    """Rows of one network: against the literal procedure (at least these factors), and against cloning (at most 8)."""
    model = getattr(torchvision_models(), name)(weights=None).eval()
    rows = []
    for r, factor in targets.items():
        times = quantize_times(model, r, rounds, whole=whole)
        rival = "literal numpy"
        if not whole:
            rival = "literal numpy, its largest layer's splits"
            times[rival] = [literal_largest_ms(model, r)] * rounds
        what = f"quantize {name}, r={r:g}"
        rows.append(faster(what, times, "ocs.quantize", rival, factor))
        rows.append(at_most(what, times, "ocs.quantize", "cloning every weight", 8))
    return rows


def roundings(rounds: int) -> list[Row]:
    """Squant (at most 3) and recipe="best" (seconds: at most 100) against rounding to nearest, over a whole network."""
    model = torchvision_models().resnet50(weights=None).eval()
    settings = {"nearest": {}, "squant": {"rounding": "squant"}, "best": {"recipe": "best", "explain": False}}
    times: dict[str, list[float]] = {name: [] for name in settings}
    for _ in tqdm(range(rounds), "roundings", leave=False, delay=2, disable=None):
        for name, options in settings.items():
            fresh = copy.deepcopy(model)
            begin = time.perf_counter()
            ocs.quantize(fresh, wbits=BITS, r=0.02, **options, progress=False)
            times[name].append(1e3 * (time.perf_counter() - begin))
    limits = {"squant": 3, "best": 100}
    return [at_most(f"quantize resnet50, {name}", times, name, "nearest", limit) for name, limit in limits.items()]


def running(what: str, model: nn.Module, x: Tensor, rounds: int) -> list[Row]:
    """A forward pass of the folded form (at most 1.02 of the float model's time) and of the expanded one (1.15)."""
    folded, expanded = copy.deepcopy(model), copy.deepcopy(model)
    ocs.quantize(folded, wbits=BITS, r=0.02, expand=False)
    ocs.quantize(expanded, wbits=BITS, r=0.02)
    with torch.inference_mode():
        calls = {
            "float": lambda: model(x),
            "folded": lambda: folded(x),
            "expanded": lambda: expanded(x),
        }
        times = in_turns(calls, rounds, f"run {what}")
    limits = {"folded": 1.02, "expanded": 1.15}
    return [at_most(f"run {what}, {form}", times, form, "float", limit) for form, limit in limits.items()]


def all_running() -> list[Row]:
    """Both networks."""
    rows = []
    for name, memory_format in (("NCHW", torch.contiguous_format), ("channels last", torch.channels_last)):
        model = torchvision_models().resnet50(weights=None).eval().to(memory_format=memory_format)
        x = torch.randn(32, 3, 224, 224).contiguous(memory_format=memory_format)
        rows += running(f"resnet50, {name}", model, x, 15)
    lstm = nn.Sequential(nn.LSTM(650, 650, 2)).eval()
    return rows + running("LSTM 2 x 650", lstm, torch.randn(35, 20, 650), 100)


PEAK = """
import gc, torch, ocs
from pathlib import Path
from zoo import torchvision_models

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

model = getattr(torchvision_models(), {name!r})(weights=None).eval()
warm = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
ocs.quantize(warm, wbits=5)  # what a first call loads
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = kilobytes("VmRSS")
originals = list(model.parameters())  # as while quantizing: released after the final swap
report = ocs.quantize(model, wbits=5, r=0.1)
peak = 1024 * (kilobytes("VmHWM") - before)
new = 5 * sum(layer.expanded_weights for layer in report.quantized)  # int8 integers and float32 weights
largest = max(layer.float_bytes for layer in report.quantized)
print((peak - new) / largest)
"""


def peak_memory(name: str) -> str:
    """Memory beyond the model, its integers and the new float weights, in units of the largest layer."""
    if not Path("/proc/self/clear_refs").exists():
        return "not measured: needs Linux's /proc"
    code = PEAK.format(name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return f"{float(done.stdout):.2f} x the largest layer (target <= 2)"


def main() -> None:
    """Run all and publish."""
    rows = compare("resnet50", 7, {0.02: 20, 0.1: 60}, whole=True)
    rows += compare("vgg16_bn", 5, {0.02: 200, 0.1: 200}, whole=False)
    rows += roundings(9)
    rows += all_running()
    notes = {f"peak extra memory, {name}": peak_memory(name) for name in ("resnet50", "vgg16_bn")}
    publish("models", rows, notes)


if __name__ == "__main__":
    main()
