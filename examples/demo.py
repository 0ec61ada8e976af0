"""From a float network to integers that run, in two minutes: the bundled ResNet-20, on real images.

Float against plain rounding, the paper's recipe and the best one; what is lost, without labels; the file; the integers
compiled and timed. `make demo` runs it; the report and a picture are left in build/demo.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from fashion_mnist import WEIGHTS, ResNet20, count_correct, load, load_model
from torch import Tensor, nn

import ocs

BUILD = Path(__file__).resolve().parent.parent / "build"
RECIPES: dict[str, dict[str, object]] = {
    "plain rounding": {},
    "the paper's OCS": {"r": 0.05},
    "best, no data": {"r": 0.05, "recipe": "best"},
    "best + gptq": {"r": 0.05, "recipe": "best", "rounding": "gptq"},
}
DEPLOYED = {"wbits": 4, "r": 0.05, "recipe": "best", "rounding": "gptq", "abits": 8, "fold_bn": True}


def heading(text: str) -> None:
    """Say what comes next."""
    print(f"\n\033[1m{text}\033[0m" if os.isatty(1) else f"\n{text}", flush=True)


def recipes(
    model: nn.Module, images: Tensor, labels: Tensor, calibration: list[Tensor], widths: list[int]
) -> dict[str, list[float]]:
    """Print and return top-1 in percent of each recipe, by bits."""
    print(f"{'top-1 %':>16} " + "".join(f"{bits:>8} bits" for bits in widths))
    rows: dict[str, list[float]] = {}
    for name, options in RECIPES.items():
        rows[name] = []
        print(f"{name:>16} ", end="", flush=True)
        for bits in widths:
            quantized = copy.deepcopy(model)
            given = {"calibration": calibration} if options.get("rounding") == "gptq" else {}
            ocs.quantize(quantized, wbits=bits, expand=False, progress=False, **options, **given)
            rows[name].append(100 * count_correct(quantized, images, labels) / len(images))
            print(f"{rows[name][-1]:13.1f}", end="", flush=True)
        print()
    return rows


def draw(rows: dict[str, list[float]], widths: list[int], float_accuracy: float, path: Path) -> None:
    """Draw what each recipe loses."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, values), color in zip(rows.items(), ("#999999", "#E69F00", "#0072B2", "#009E73"), strict=True):
        lost = [float_accuracy - value for value in values]
        axes.plot(range(len(widths)), lost, "o-", color=color)
        axes.annotate(name, (len(widths) - 1, lost[-1]), (8, -3), textcoords="offset points", color=color)
    axes.set_xticks(range(len(widths)), [f"{bits} bits" for bits in widths])
    axes.set(xlim=(-0.2, len(widths) - 0.2), ylabel="points below float", title="What few bits cost a ResNet-20")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 10, 50], ["0", "1", "10", "50"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def save_and_load(model: nn.Module, images: Tensor, path: Path) -> None:
    """Save the quantized network, load it into a fresh float one, and compare what the two compute."""
    ocs.save(model, path)
    again = ocs.load(path, ResNet20().eval().to(memory_format=torch.channels_last))
    with torch.inference_mode():
        same = torch.equal(again(images), model(images))
    float_kb, saved_kb = (file.stat().st_size / 1000 for file in (WEIGHTS, path))
    print(f"{shown(path)}: {saved_kb:.0f} KB, {float_kb:.0f} KB as floats")
    print(f"Loaded into a fresh network: {'the same outputs, bit for bit' if same else 'OTHER OUTPUTS'}")


def times(calls: dict[str, Callable[[], object]], rounds: int = 15) -> Iterator[tuple[str, float]]:
    """Yield the median time of each call in ms, measured in turns."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                seen[name].append(1000 * (time.perf_counter() - begin))
    return ((name, statistics.median(each)) for name, each in seen.items())


def compile_and_time(model: nn.Module, quantized: nn.Module, images: Tensor, labels: Tensor, engine: str) -> None:
    """Compile the quantized network to int8 products; time it beside the float one, and judge its answers."""
    begin = time.perf_counter()
    batch = images[:50]
    fast = ocs.compile(quantized, batch, engine=engine)
    print(f"Compiled by {engine} in {time.perf_counter() - begin:.0f} s")
    calls = {
        "float": lambda: model(batch),
        "4-bit weights, 8-bit inputs": lambda: fast(batch),
    }
    with torch.inference_mode():
        for call in calls.values():
            call()
    for name, took in times(calls):
        print(f"{name:>27} {took:7.1f} ms for {len(batch)} images")
    right = sum(int((fast(x).argmax(1) == y).sum()) for x, y in zip(images.split(50), labels.split(50), strict=True))
    print(f"Top-1 of the integers: {100 * right / len(images):.1f} %")


def shown(path: Path) -> str:
    """Name a path as seen from here."""
    return os.path.relpath(path)


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILD / "demo", help="folder for report, picture and file")
    parser.add_argument("--limit", type=int, default=1000, help="test images")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--engine", default="inductor", help="inductor, onnxruntime or openvino")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model()
    images, labels = (tensor[: args.limit] for tensor in load("t10k"))
    calibration = list(load("calibration")[0].split(64))

    heading("1. A float network, and few bits for its weights")
    accuracy = 100 * count_correct(model, images, labels) / len(images)
    interval = 196 * (accuracy / 100 * (1 - accuracy / 100) / len(images)) ** 0.5
    print(
        f"ResNet-20, {len(images):,} images of Fashion-MNIST, float: {accuracy:.1f} % (95 % interval ± {interval:.1f})"
    )
    rows = recipes(model, images, labels, calibration, args.bits)
    draw(rows, args.bits, accuracy, args.out / "recipes.png")

    heading("2. One of these to deploy: weights in 4 bits, inputs in 8; what is lost, without labels")
    quantized = copy.deepcopy(model)
    report = ocs.quantize(quantized, calibration=calibration, progress=False, **DEPLOYED)
    print(ocs.compare(model, quantized, calibration[:2]))
    report.save(args.out / "report.html")

    heading("3. The file")
    save_and_load(quantized, images[:64], args.out / "resnet20.safetensors")

    heading("4. The integers run")
    compile_and_time(model, quantized, images, labels, args.engine)

    print(f"\nTo look at: {shown(args.out / 'report.html')}, {shown(args.out / 'recipes.png')}")


if __name__ == "__main__":
    main()
