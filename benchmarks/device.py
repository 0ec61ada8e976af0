"""Models on a device: whether they become what they become on the CPU, and what that takes beside torch's own.

    python benchmarks/device.py [--device cuda] [--rounds 21] [--json]

Kernels on a device are torch operations, one after the other; torch's fake quantization is one kernel. Where
torchvision is not at hand, its models are left out.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator

import torch
from bench import Row, at_most, in_turns, publish
from torch import Tensor, nn
from zoo import torchvision_models

import ocs

SMALLEST = ("squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small", "resnet18")
SIZES = (1 << 18, 1 << 24)


def waiting(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A call that ends when the device is done."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def fake_quantize(device: torch.device, rounds: int) -> Iterator[Row]:
    """8 bits, against torch's own."""
    for size in SIZES:
        x, scale = torch.randn(size, device=device), torch.tensor(0.03, device=device)
        calls = {
            "ours": lambda x=x, scale=scale: torch.ops.ocs.fake_quantize(x, scale, 8, True),
            "torch's": lambda x=x: torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -127, 127),
        }
        times = in_turns({name: waiting(call, device) for name, call in calls.items()}, 5 * rounds, "fake_quantize")
        yield at_most(f"fake_quantize, {size:,} floats", times, "ours", "torch's", 1.5)


def integers(model: nn.Module) -> list[Tensor]:
    """Integers, scales and sources of every quantized weight, on the CPU."""
    layers = [layer for layer in model.modules() if hasattr(layer, "weight_state")]
    return [tensor.cpu() for layer in layers for name in layer.channels for tensor in layer.weight_state(name)]


def same_integers(name: str, device: torch.device) -> str:
    """Quantize a network here and there."""
    torch.manual_seed(0)
    model = getattr(torchvision_models(), name)(weights=None).eval()
    moved, x = copy.deepcopy(model).to(device), torch.randn(2, 3, 224, 224)
    for each in (model, moved):
        ocs.quantize(each, wbits=5, r=0.02, clip="mse", progress=False)
    same = all(torch.equal(a, b) for a, b in zip(integers(model), integers(moved), strict=True))
    with torch.no_grad():
        expected = model(x)
        error = (moved(x.to(device)).cpu() - expected).norm() / expected.norm()
    return f"{'the same integers' if same else 'OTHER INTEGERS'}, outputs differ by {float(error):.1e} of their norm"


def quantize(device: torch.device, rounds: int) -> Iterator[Row]:
    """A ResNet-50, on the device and on the CPU; a calibrated one; and what running it takes."""
    model = torchvision_models().resnet50(weights=None).eval()
    there, x = copy.deepcopy(model).to(device), torch.randn(8, 3, 224, 224, device=device)
    hows = {"nearest": {}, "recipe best": {"recipe": "best", "explain": False}, "8-bit inputs": {"abits": 8}}
    for how, options in hows.items():
        times: dict[str, list[float]] = {"on the device": [], "on the CPU": []}
        for _ in range(max(rounds // 7, 1)):
            for place, original in zip(times, (there, model), strict=True):
                calibration = {"calibration": [x.to(next(original.parameters()).device)]} if "abits" in options else {}
                fresh = copy.deepcopy(original)
                begin = time.perf_counter()
                ocs.quantize(fresh, wbits=5, r=0.02, progress=False, **options, **calibration)
                waiting(list, device)()
                times[place].append(1e3 * (time.perf_counter() - begin))
        yield at_most(f"quantize resnet50, {how}", times, *times, 1)
    ocs.quantize(quantized := copy.deepcopy(there), wbits=5, r=0.02, progress=False)
    with torch.inference_mode():
        calls = {"float": lambda: there(x), "quantized": lambda: quantized(x)}
        times = in_turns({name: waiting(call, device) for name, call in calls.items()}, rounds, "run")
    yield at_most("run resnet50, 8 images, expanded", times, "quantized", "float", 1.15)


def main() -> None:
    """Run all and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = args.device
    rows = list(fake_quantize(device, args.rounds))
    notes = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)}
    try:
        torchvision_models()
    except ImportError:
        notes["networks"] = "left out: pip install torchvision"
    else:
        notes.update({name: same_integers(name, device) for name in SMALLEST})
        rows += quantize(device, args.rounds)
    publish(f"device-{device.type}", rows, notes)


if __name__ == "__main__":
    main()
