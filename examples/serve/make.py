"""Serve the bundled ResNet-20 in integers: from C++ by a .pt2 package, and from ONNX Runtime by an .onnx file.

    python examples/serve/make.py [--out build/serve]

Quantizes the network to 5-bit weights and 8-bit inputs, exports it both ways, builds serve.cpp with the C++ compiler at
hand, lets both classify the first 100 test images, and prints how often they are right.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch.utils.cpp_extension import include_paths, library_paths

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fashion_mnist import load, load_model

import ocs

IMAGES = 100


def build(source: Path, program: Path) -> None:
    """Compile and link a C++ program against libtorch."""
    headers = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    flags = ["-std=c++20", "-O1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    links = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, *headers, str(source), *libraries, *links, "-o", str(program)], check=True)


def from_cpp(folder: Path, images: torch.Tensor) -> list[int]:
    """The classes that the C++ program prints."""
    images.contiguous().numpy().tofile(folder / "images.f32")
    build(Path(__file__).with_name("serve.cpp"), folder / "serve")
    command = [folder / "serve", folder / "model.pt2", folder / "images.f32", *map(str, images.shape)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def from_onnxruntime(folder: Path, images: torch.Tensor) -> list[int]:
    """The classes that ONNX Runtime gives; this needs neither torch nor ocs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images.numpy())})
    return scores.argmax(1).tolist()


def main() -> None:
    """Export, build, serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/serve"))
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    (images, labels), (calibration, _) = load("t10k"), load("calibration")
    images, labels = images[:IMAGES], labels[:IMAGES].tolist()
    model = load_model()
    ocs.quantize(
        model, wbits=5, r=0.02, abits=8, act_clip="mse", act_signed="auto", fold_bn=True, calibration=[calibration]
    )
    for name in ("model.pt2", "model.onnx"):
        ocs.export(model, folder / name, images)
        print(f"{name}: {(folder / name).stat().st_size / 1e6:.2f} MB")
    for what, serve in (("C++", from_cpp), ("ONNX Runtime", from_onnxruntime)):
        classes = serve(folder, images)
        print(f"{what}: {sum(a == b for a, b in zip(classes, labels, strict=True))} of {IMAGES} images right")


if __name__ == "__main__":
    main()
