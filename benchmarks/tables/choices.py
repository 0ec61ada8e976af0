"""Does recipe="best" lose to its parts? The best and the worst choice of each row beside the recipe's.

Choices: one scale per tensor or per output channel, nearest or squant, no clipping, mse or auto; with --gptq likewise,
where it sees other inputs of the same kind. Decibels of a network's outputs against the float network's, each scaled
once to fit best, as a change of all outputs by one factor changes no decision. Besides the bundled networks it tries
small ones of random weights on random inputs.

    python benchmarks/tables/choices.py [--bits 4 3 2] [--r 0 0.05] [--out build/tables] [NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import paths
import torch
from bench import machine
from command import footnote
from fashion_mnist import VIT_WEIGHTS, WEIGHTS, load, load_model
from language_model import ASSETS as TEXT
from language_model import encode, read_words
from language_model import load_model as load_language_model
from layout import aligned
from torch import Tensor, nn
from tqdm import tqdm
from zoo import torchvision_models

import ocs

INPUTS = 64  # that are scored, and twice as many that gptq sees
CLIPS, ROUNDINGS, GRANULARITIES = ("none", "mse", "auto"), ("nearest", "squant"), ("tensor", "channel")


class Network(NamedTuple):
    """A float network, inputs to score, and others."""

    model: nn.Module
    inputs: Tensor
    others: Tensor


class Recurrent(nn.Module):
    """Two LSTM layers and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 96, 2, batch_first=True), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, steps, 64] -> [N, steps, 32]."""
        return self.head(self.lstm(x)[0])


def encoder() -> nn.Module:
    """Four transformer layers and a linear one."""
    layer = nn.TransformerEncoderLayer(96, 4, 384, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Linear(96, 32))


def mlp() -> nn.Module:
    """Three hidden layers of 256."""
    hidden = [part for width in (64, 256, 256) for part in (nn.Linear(width, 256), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(256, 32))


def random_networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """By name: what makes a small network, and the shape of an input."""
    models = torchvision_models()
    convnext, resnet = models.convnext, models.resnet
    widths = [
        convnext.CNBlockConfig(32, 64, 1),
        convnext.CNBlockConfig(64, 128, 1),
        convnext.CNBlockConfig(128, None, 1),
    ]
    return {
        "resnet": (lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=32), (3, 48, 48)),
        "mobilenet": (lambda: models.mobilenet_v2(width_mult=0.5, num_classes=32), (3, 48, 48)),
        "convnext": (lambda: convnext.ConvNeXt(widths, num_classes=32), (3, 48, 48)),
        "vit": (lambda: models.VisionTransformer(32, 8, 4, 4, 96, 384, num_classes=32), (3, 32, 32)),
        "swin": (lambda: models.SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=32), (3, 48, 48)),
        "encoder": (encoder, (16, 96)),
        "lstm": (Recurrent, (20, 64)),
        "mlp": (mlp, (64,)),
    }


def bundled(name: str) -> Network:
    """A network that comes with this repository, on its test data."""
    if name == "LSTM-200":
        model, vocabulary = load_language_model()
        words = encode(read_words(TEXT, "test"), vocabulary)
        return Network(model, words[: 10 * INPUTS].view(-1, 10), words[10 * INPUTS : 50 * INPUTS].view(-1, 10))
    weights = VIT_WEIGHTS if name == "ViT" else WEIGHTS
    images, others = (load(split)[0] for split in ("t10k", "calibration"))
    return Network(load_model(weights), images[:INPUTS], others)


def random_network(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Network:
    """A network of random weights, the same each time; heads that start as zeros get some, too."""
    torch.manual_seed(0)
    model = make().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    return Network(model, torch.randn(INPUTS, *shape), torch.randn(2 * INPUTS, *shape))


@torch.no_grad()
def decibels(network: Network, **options: Any) -> float:
    """How far the outputs of a quantized copy are from the float network's."""
    quantized = copy.deepcopy(network.model)
    if options.get("rounding") == "gptq":
        options["calibration"] = [network.others]
    ocs.quantize(quantized, expand=False, explain=False, progress=False, **options)
    y, y_hat = (model(network.inputs) for model in (network.model, quantized))
    y, y_hat = (each[0] if isinstance(each, tuple) else each for each in (y, y_hat))
    fitted = y_hat * (y * y_hat).sum() / y_hat.square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(y.square().sum() / (y - fitted).square().sum()))


def cells(network: Network, wbits: int, r: float, roundings: tuple[str, ...], **recipe: Any) -> list[str]:
    """The best and the worst choice, and the recipe."""
    found = {}
    for granularity, rounding, clip in itertools.product(GRANULARITIES, roundings, CLIPS):
        options = {"granularity": granularity, "rounding": rounding, "clip": clip}
        found[f"{granularity} {rounding} {clip}"] = decibels(network, wbits=wbits, r=r, **options)
    best, worst = max(found, key=found.get), min(found, key=found.get)
    ours = decibels(network, wbits=wbits, r=r, recipe="best", **recipe)
    return [f"{ours:.1f}", f"{found[best]:.1f}, {best}", f"{found[worst]:.1f}, {worst}", f"{ours - found[best]:+.1f}"]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--bits", nargs="+", type=int, default=(4, 3, 2))
    parser.add_argument("--r", nargs="+", type=float, default=(0.0, 0.05))
    parser.add_argument("--gptq", action="store_true", help="the choices of gptq instead")
    parser.add_argument("--out", type=Path, default=paths.OUT)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    made = {name: lambda name=name: bundled(name) for name in ("ResNet-20", "ViT", "LSTM-200")}
    made |= {name: lambda each=each: random_network(*each) for name, each in random_networks().items()}
    unknown = set(args.names) - made.keys()
    if unknown:
        raise SystemExit(f"choices: no network {', '.join(sorted(unknown))}; use {', '.join(made)}")
    roundings, recipe = (("gptq",), {"rounding": "gptq"}) if args.gptq else (ROUNDINGS, {})
    lines = [["", "recipe best", "the best choice", "the worst", "recipe against the best"]]
    for name, wbits, r in tqdm([*itertools.product(args.names or made, args.bits, args.r)], "rows", disable=None):
        row = cells(made[name](), wbits, r, roundings, **recipe)
        lines.append([f"{name}, {wbits} bits, r = {r:g}", *row])
        print(*lines[-1], sep=" | ", flush=True)
    command = f"python benchmarks/tables/choices.py{' --gptq' if args.gptq else ''}"
    text = f"{aligned(lines)}\n\n{footnote({'command': command, 'machine': machine()})}\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ("choices-gptq.md" if args.gptq else "choices.md")).write_text(text)


if __name__ == "__main__":
    main()
