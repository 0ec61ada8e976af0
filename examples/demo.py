"""One setting in full, on the bundled ResNet-20: the report, pictures, and a file that is saved and loaded again.

The tables beside it come from benchmarks/tables; `make demo` runs both.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from fashion_mnist import WEIGHTS, ResNet20, load, load_model
from torch import nn

import ocs
import ocs.plot

BUILD = Path(__file__).resolve().parent.parent / "build"
SETTING = {"wbits": 4, "r": 0.1}
WEIGHTS_OF, INPUTS_OF = "layer1.2.conv1", "layer3.2.conv1"


def draw(model: nn.Module, out: Path) -> None:
    """Where each clip method cuts the weights of one layer, and the inputs of another, before and after OCS."""
    weight = model.get_submodule(WEIGHTS_OF).weight.detach()
    statistics = ocs.calibrate(model, load("calibration")[0].split(64))[INPUTS_OF]
    figures = {
        "clips": ocs.plot.clip_thresholds(weight, SETTING["wbits"], SETTING["r"], title=f"{WEIGHTS_OF}: weights"),
        "inputs": ocs.plot.input_histograms(statistics, 4, 0.05, title=f"Inputs of {INPUTS_OF}"),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)
        print(f"Where each method clips, before and after OCS: {os.path.relpath(out / f'{name}.png')}")


def save_and_load(model: nn.Module, path: Path) -> None:
    """The quantized network as a file, and back into a fresh float one."""
    ocs.save(model, path)
    again = ocs.load(path, ResNet20().eval().to(memory_format=torch.channels_last))
    images = load("calibration")[0]
    with torch.inference_mode():
        same = torch.equal(again(images), model(images))
    float_kb, saved_kb = (round(file.stat().st_size / 1000) for file in (WEIGHTS, path))
    outputs = "the same outputs" if same else "OTHER OUTPUTS"
    print(f"Saved in {os.path.relpath(path)}: {saved_kb} KB, {float_kb} KB as floats; into a fresh network: {outputs}")


def main() -> None:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILD / "demo", help="folder for pictures and file")
    args = parser.parse_args()
    model = load_model()
    draw(model, args.out)
    report = ocs.quantize(model, **SETTING)
    print(f"\nocs.quantize(model, wbits={SETTING['wbits']}, r={SETTING['r']})\n{report}\n")
    save_and_load(model, args.out / "resnet20.safetensors")


if __name__ == "__main__":
    main()
