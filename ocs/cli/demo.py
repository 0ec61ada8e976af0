"""A demonstration that needs the package alone: a network trained on the spot, quantized, compared, saved, timed."""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocs.cli.say import Notes, Result
from ocs.formats.storage import load, save
from ocs.quantization import quantize
from ocs.report.text import table
from ocs.runtime.compare import compare
from ocs.runtime.compile import compile
from ocs.runtime.pack import pack

CLASSES, SIZE = 10, 24
RECIPES: dict[str, dict[str, Any]] = {  # by what the table calls them
    "nearest": {},
    "OCS": {"r": 0.05},
    "best, OCS": {"r": 0.05, "recipe": "best"},
}
BITS = (8, 4, 3, 2)


def run_demo(
    args: argparse.Namespace, notes: Notes, *, train: int = 2400, test: int = 2000, width: int = 2048
) -> Result:
    """Show what quantization costs and what OCS and the best recipe bring, on a small network and made-up images.

    train, test: how many images. width: of the linear layers that are timed.
    """
    say = (lambda text: None) if args.json else lambda text: print(text, flush=True)
    values: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        say(f"Training a network of five convolutions on {train} made-up images of {CLASSES} classes ...")
        images, labels = made_up_images(train, 0)
        model = trained(images, labels)
    tested = made_up_images(test, 1)
    values["float"] = share_right(model, *tested)
    say(f"Float: {values['float']:.1f} % of {test} other images are put in the right class. Quantized, without data:\n")
    values["accuracy"] = _accuracies(model, *tested)
    say(_table_of(values["accuracy"]))
    best = copy.deepcopy(model)
    report = quantize(best, wbits=3, **RECIPES["best, OCS"])
    found = compare(model, best, tested[0].split(500), progress=False)
    values["comparison"] = found.to_dict()
    say(f"\nocs.quantize(model, wbits=3, r=0.05, recipe='best'): {report.seconds:.2f} s\n{found.summary()}")
    values["files"] = _files(model, best, args.keep)
    say("\n" + values["files"].pop("said"))
    values["times"], lines = _times(model, images, width)
    say("\n".join(lines))
    return Result("Next: ocs inspect MODEL, ocs quantize MODEL -o FILE; ocs --help", values)


# --- The network and its images ---------------------------------------------------------------------------------------


def made_up_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw float32 [N, 3, SIZE, SIZE], each class a pattern, moved, dimmed and in a clutter, and labels int64 [N]."""
    generator = torch.Generator().manual_seed(seed + 1)
    patterns = _smooth(CLASSES, torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    moves = torch.randint(-5, 6, (count, 2), generator=generator).tolist()
    moved = torch.stack([torch.roll(x, move, (1, 2)) for x, move in zip(patterns[labels], moves, strict=True)])
    light = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.5 * torch.randn(moved.shape, generator=generator)
    images = light * moved + 0.9 * _smooth(count, generator) + noise
    return images / images.std(), labels


def _smooth(count: int, generator: torch.Generator) -> Tensor:
    return F.interpolate(torch.randn(count, 3, 6, 6, generator=generator), size=SIZE, mode="bilinear")


def network() -> nn.Module:
    """Make five convolutions with BatchNorm and a linear layer: images -> logits [N, CLASSES]."""
    layers: list[nn.Module] = []
    for before, channels, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        convolution = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def trained(images: Tensor, labels: Tensor, epochs: int = 2, batch: int = 40) -> nn.Module:
    """Train a network, in a few seconds."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def share_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Count in percent the images that are put in the right class."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / len(images)


# --- What it shows ----------------------------------------------------------------------------------------------------


def _accuracies(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Measure each recipe at each number of bits."""
    found: dict[str, dict[str, float]] = {}
    for bits in BITS:
        for name, options in RECIPES.items():
            quantized = copy.deepcopy(model)
            quantize(quantized, wbits=bits, **options)
            found.setdefault(str(bits), {})[name] = share_right(quantized, images, labels)
    return found


def _table_of(accuracy: dict[str, dict[str, float]]) -> str:
    rows = [["bits", *RECIPES]]
    rows += [[bits, *(f"{value:.1f}" for value in row.values())] for bits, row in accuracy.items()]
    return "\n".join(table(rows, [*RECIPES]))


def _files(model: nn.Module, quantized: nn.Module, keep: str | None) -> dict[str, Any]:
    """Save both, and load the quantized one into a fresh network."""
    if find_spec("safetensors") is None:
        return {"said": "Not saved: files need safetensors (pip install torch-ocs[files])"}
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        before, after = folder / "float.safetensors", folder / "3-bits.safetensors"
        save_file(model.state_dict(), before)
        save(quantized, after)
        again, x = load(after, network().eval()), made_up_images(8, 2)[0]
        with torch.inference_mode():
            same = torch.equal(again(x), quantized(x))
        sizes = before.stat().st_size, after.stat().st_size
    outputs = "the same outputs" if same else "OTHER OUTPUTS"
    said = (
        f"Saved in {sizes[1] / 1000:.0f} KB, {sizes[0] / 1000:.0f} KB as floats; loaded into a fresh network: {outputs}"
    )
    return {"said": said, "float_bytes": sizes[0], "quantized_bytes": sizes[1], "same_outputs": same}


def _times(model: nn.Module, images: Tensor, width: int) -> tuple[dict[str, float], list[str]]:
    """Time packed weights at batch 1, and the network in an integer engine where one is installed."""
    layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4))).eval()
    packed = copy.deepcopy(layers)
    quantize(packed, wbits=4, r=0.02)
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    times = {"packed": ratio_of_times(layers, pack(packed), x)}
    weight = f"{width} x {width}"
    lines = [f"Four linear layers of {weight} at batch 1, packed 4-bit weights: {_speed(times['packed'])} floats"]
    engine = next((each for each in ("openvino", "onnxruntime") if find_spec(each) and find_spec("onnxscript")), None)
    if engine is None:
        return times, [*lines, "No integer engine is installed: pip install torch-ocs[onnxruntime]"]
    integers, x = copy.deepcopy(model), images[:64]
    quantize(integers, wbits=7, abits=8, act_signed="auto", calibration=[images[:256]], fold_bn=True, recipe="best")
    times[engine] = ratio_of_times(model, compile(integers, x, engine=engine), x)
    return times, [
        *lines,
        f"The network in 8-bit integers in {engine}, batch 64: {_speed(times[engine])} floats in torch",
    ]


def _speed(ratio: float) -> str:
    return f"{ratio:.1f} times the speed of"


@torch.inference_mode()
def ratio_of_times(before: Callable[..., Any], after: Callable[..., Any], x: Tensor, rounds: int = 15) -> float:
    """Time both in turns; the median over the rounds of the first one's time, divided by the second's.

    Before each call the caches are filled with other things: weights come from memory, as those of larger models do.
    """
    others = torch.zeros(16 << 20)  # 64 MB

    def seconds(model: Callable[..., Any]) -> float:
        others.add_(1)
        start = time.perf_counter()
        model(x)
        return time.perf_counter() - start

    seconds(before), seconds(after)  # what is done once
    return statistics.median(seconds(before) / seconds(after) for _ in range(rounds))
