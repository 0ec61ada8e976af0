"""Thresholds and calibration: the searches in a histogram, and what watching resnet50's inputs costs its forward pass.

    python benchmarks/calibration.py [--json]

A search is in 2048 bins of a Student-t sample at 8 bits, where it is longest. Calibration sees 32 images of 224 x 224,
and takes turns with the plain forward pass and with torch.ao's HistogramObserver on the inputs of the same layers.
Random weights.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from bench import Row, at_most, in_turns, publish
from torch import Tensor, nn
from torch.ao.quantization.observer import HistogramObserver
from zoo import torchvision_models

from ocs import functional
from ocs.calibration.calibrate import watch_input
from ocs.calibration.run import observe
from ocs.model.targets import find_targets
from ocs.nn.convolution import CONVOLUTIONS

BINS = 2048
LIMITS_MS = {"kl": 10.0}  # milliseconds; of the others 2


def searches(rounds: int) -> list[Row]:
    """Each method; the limits are absolute."""
    x = torch.distributions.StudentT(3.0).sample((1_000_000,))
    counts, limit = functional.histogram(x, BINS)
    calls: dict[str, Callable[[], object]] = {
        method: lambda number=number: torch.ops.ocs.clip_threshold(counts, torch.tensor(limit), 8, True, number)
        for number, method in enumerate(functional.CLIP_METHODS)
        if method in functional.METHODS
    }
    times = in_turns(calls, rounds, "searches")
    rows = []
    for method in calls:
        most = LIMITS_MS.get(method, 2.0)
        times["limit"] = [most] * rounds
        rows.append(at_most(f"threshold by {method}, {BINS} bins, 8 bits", times, method, "limit", 1))
    return rows


def watching(model: nn.Module, x: Tensor, *, channels: bool) -> None:
    """One batch through the model with our statistics on the inputs of the layers that quantize() takes."""
    targets = [target for target in find_targets(model) if not target.reason_float]
    first = next(target for target in targets if isinstance(target.module, CONVOLUTIONS))
    watches = [watch_input(target, channels=channels) for target in targets if target is not first]
    observe(model, [x], watches, progress=False)


def watching_torch(model: nn.Module, x: Tensor) -> None:
    """The same with torch.ao's observer."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][1:]
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            handle = layer.register_forward_pre_hook(_hook(HistogramObserver(bins=BINS)))
            hooks.callback(handle.remove)
        model(x)


def _hook(observer: nn.Module) -> Callable[..., None]:
    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        observer(args[0])

    return take


def calibration(rounds: int) -> list[Row]:
    """resnet50 in both memory formats: without and with a histogram for each channel, which act_r needs."""
    rows = []
    for name, memory_format in (("NCHW", torch.contiguous_format), ("channels last", torch.channels_last)):
        model = torchvision_models().resnet50(weights=None).eval().to(memory_format=memory_format)
        x = torch.randn(32, 3, 224, 224).contiguous(memory_format=memory_format)

        def plain(model: nn.Module = model, x: Tensor = x) -> None:
            with torch.no_grad():
                model(x)

        calls = {
            "forward": plain,
            "calibrate": lambda model=model, x=x: watching(model, x, channels=False),
            "calibrate, act_r": lambda model=model, x=x: watching(model, x, channels=True),
            "HistogramObserver": lambda model=model, x=x: watching_torch(model, x),
        }
        times = in_turns(calls, rounds, f"calibrate, {name}")
        rows += [
            at_most(f"calibrate resnet50, {name}", times, "calibrate", "forward", 1.25),
            at_most(f"calibrate resnet50, {name}, act_r", times, "calibrate, act_r", "forward", 1.25),
            at_most(f"calibrate resnet50, {name}", times, "calibrate", "HistogramObserver", 1),
        ]
    return rows


MEMORY = """
import gc, torch, ocs
from pathlib import Path
from zoo import torchvision_models

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

model = torchvision_models().resnet50(weights=None).eval()
x = torch.randn(8, 3, 224, 224)
peaks = []
for run in (lambda: model(x), lambda: ocs.calibrate(model, x)):
    with torch.no_grad():
        run()  # what a first call loads
        for _ in range(3):
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            kept = run()
            peaks.append(kilobytes("VmHWM"))
plain, watched = min(peaks[:3]), min(peaks[3:])
print(1024 * (watched - plain) / 1e6)
"""


def memory() -> str:
    """What calibration adds to the peak of a forward pass, histograms of every channel included."""
    if not Path("/proc/self/clear_refs").exists():
        return "not measured: needs Linux's /proc"
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return f"{float(done.stdout):.0f} MB (target <= 50)"


def main() -> None:
    """Run all and publish."""
    rows = [*searches(100), *calibration(5)]
    publish("calibration", rows, {"peak memory that calibrating resnet50 adds": memory()})


if __name__ == "__main__":
    main()
