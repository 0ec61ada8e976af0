"""Figure 1: a layer's weights under linear quantization, clipping and OCS, as histograms with the grid.

By default of the layer whose largest weight is the most standard deviations out, the first layer left out.

    python benchmarks/tables/figure1.py --dataset fashion-mnist
    python benchmarks/tables/figure1.py --models ResNet-50 --layer layer3.0.conv2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import paths  # isort: split

import data
from networks import RESNET20, load_network
from torch import Tensor, nn

import ocs.functional
import ocs.plot


def weights(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The weight and groups of every convolution and linear layer but the first."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    found = {n: (m.weight.detach(), getattr(m, "groups", 1)) for n, m in layers.items()}
    return dict(list(found.items())[1:])


def worst_outlier(layers: dict[str, tuple[Tensor, int]]) -> str:
    """The layer whose largest weight is the most standard deviations out."""
    return max(layers, key=lambda name: sigmas(layers[name][0]))


def sigmas(weight: Tensor) -> float:
    """The largest weight in standard deviations."""
    return float(weight.abs().max() / weight.std())


def main() -> None:
    """Parse the options, draw, say what is to be seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=data.NAMES, default="imagenet")
    parser.add_argument("--models", default=None, help="one network, by the paper's or torchvision's name")
    parser.add_argument("--weights", help="torchvision's name of weights, or a file")
    parser.add_argument("--layer", help="its name; default: the one with the worst outlier")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--r", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=paths.OUT)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args()
    model = args.models or ("ResNet-50" if args.dataset == "imagenet" else RESNET20)
    try:
        layers = weights(load_network(model, args.dataset, args.weights).model)
    except (ValueError, OSError) as error:
        raise SystemExit(f"figure1: {error}") from None
    name = args.layer or worst_outlier(layers)
    if name not in layers:
        raise SystemExit(f"figure1: --layer {name}: there is none; choose from {', '.join(layers)}")
    weight, groups = layers[name]
    title = f"{model}, {name}: largest weight {sigmas(weight):.0f} standard deviations out"
    try:
        figure = ocs.plot.weight_histograms(weight, args.bits, args.r, groups=groups, title=title)
    except ValueError as error:
        raise SystemExit(f"figure1: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "figure1.png"
    figure.savefig(path, dpi=120)
    if args.json:
        print(json.dumps({"model": model, "layer": name, "sigmas": sigmas(weight), "picture": str(path)}))
        return
    print(f"{title}: {paths.shown(path)}")
    for panel in figure.axes:
        print(f"  {panel.get_title(loc='left')}")


if __name__ == "__main__":
    main()
