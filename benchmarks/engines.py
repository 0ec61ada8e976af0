"""Whole networks in 8-bit integers: ours in each engine against the engine's float and ONNX Runtime's own int8.

    python benchmarks/engines.py [--models resnet50 ...] [--threads 1] [--rounds 11] [--json]

5-bit weights at r = 0.02, 8-bit inputs, batch norms folded, images of 224 x 224; random weights and inputs. Rivals: the
float network in each engine, and the file that onnxruntime.quantization.quantize_static makes of it (QDQ, per channel,
calibrated on the same images) in ONNX Runtime and OpenVINO. All run in one process, in turns. The first convolution
is quantized on both sides (--skip-first leaves ours float, as the paper does).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import Row, at_most, faster, in_turns, publish
from torch import Tensor, nn
from zoo import torchvision_models

import ocs

MODELS = ("resnet50", "vgg16_bn", "mobilenet_v3_large", "vit_b_16")
SEED, IMAGES = 0, 8
Run = Callable[[Tensor], object]


def network(name: str) -> nn.Module:
    """A network with random weights, whose batch norms have statistics as trained ones."""
    torch.manual_seed(SEED)
    model = getattr(torchvision_models(), name)().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 1)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def quantized(model: nn.Module, images: Tensor, skip_first: bool) -> nn.Module:
    """As the paper's Table 3 does it, with inputs after a ReLU unsigned."""
    model = copy.deepcopy(model)
    options: dict[str, Any] = {} if skip_first else {"skip": None}
    ocs.quantize(
        model,
        wbits=5,
        r=0.02,
        abits=8,
        act_signed="auto",
        fold_bn=True,
        calibration=[images],
        progress=False,
        **options,
    )
    return model


def float_file(model: nn.Module, images: Tensor, folder: Path) -> Path:
    """The float network as ONNX."""
    path = folder / "float.onnx"
    torch.onnx.export(
        model, (images,), str(path), dynamo=True, external_data=False, verbose=False, dynamic_shapes={"x": {0: "batch"}}
    )
    return path


def static_file(floats: Path, images: Tensor, folder: Path) -> Path:
    """What ONNX Runtime makes of the float network."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": images.numpy()}]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    prepared, path = folder / "prepared.onnx", folder / "static.onnx"
    quant_pre_process(str(floats), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def onnxruntime_run(path: Path, threads: int) -> Run:
    """A file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def inductor_float(model: nn.Module, x: Tensor) -> Run:
    """The float network as Inductor runs it best, its weights packed."""
    compiled = torch.compile(model)
    with torch._inductor.config.patch(freezing=True):
        compiled(x)
    return compiled


def openvino_run(path: Path, threads: int, shape: list[int], precision: str = "f32") -> Run:
    """A file in OpenVINO, for inputs of one shape; what is not integer in this precision."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(shape)
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda x: request.infer([x.numpy()])


def compare(name: str, batch: int, args: argparse.Namespace) -> list[Row]:
    """Time one network at one batch size, in all engines."""
    images = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
    x, model = images[:batch], network(name)
    ours = quantized(model, images, args.skip_first)
    with tempfile.TemporaryDirectory() as made, torch.no_grad():
        folder = Path(made)
        floats = float_file(model, images[:2], folder)
        static, own = static_file(floats, images, folder), folder / "ocs.onnx"
        ocs.export(ours, own, x)
        package = folder / "ocs.pt2"
        ocs.export(ours, package, x)
        packaged = torch._inductor.aoti_load_package(str(package))
        compiled, shape = ocs.compile(ours, x), list(x.shape)
        runs: dict[str, Run] = {
            "inductor, ocs": compiled,
            "inductor package, ocs": packaged,
            "inductor, float": inductor_float(model, x),
            "onnxruntime, ocs": onnxruntime_run(own, args.threads),
            "onnxruntime, its int8": onnxruntime_run(static, args.threads),
            "onnxruntime, float": onnxruntime_run(floats, args.threads),
            "openvino, ocs": openvino_run(own, args.threads, shape),
            "openvino, int8 of onnxruntime": openvino_run(static, args.threads, shape),
            "openvino, float": openvino_run(floats, args.threads, shape),
            "openvino, bfloat16": openvino_run(floats, args.threads, shape, "bf16"),
        }
        for run in runs.values():
            run(x)
        calls = {what: (lambda run=run: run(x)) for what, run in runs.items()}
        times = in_turns(calls, args.rounds, f"{name}, batch {batch}")
    return rows(f"{name}, batch {batch}: ", times, batch, judged=name == "resnet50")


def rows(title: str, times: dict[str, list[float]], batch: int, *, judged: bool) -> list[Row]:
    """The ratios, with what they should be for the network that they were set for."""
    alone = batch == 1
    by_isa = {"amx": (4, 3, 6), "vnni": (2.5, 2.3, 2.5), "avx2": (1.8, 1.8, 1.8)}[instructions()]
    named = {f"{title}{what}": found for what, found in times.items()}
    static, found = f"{title}onnxruntime, its int8", []
    for ours in ("inductor, ocs", "inductor package, ocs"):
        found.append(at_most(title + ours, named, title + ours, static, 0.9 if alone else 1.0))
        found.append(faster(title + ours, named, title + ours, f"{title}inductor, float", by_isa[0 if alone else 1]))
    ours = f"{title}onnxruntime, ocs"
    found.append(at_most(ours, named, ours, static, 1.05))
    ours = f"{title}openvino, ocs"
    found.append(at_most(ours, named, ours, f"{title}openvino, int8 of onnxruntime", 1.05))
    found.append(faster(ours, named, ours, f"{title}openvino, float", by_isa[2]))
    found.append(faster(ours, named, ours, f"{title}openvino, bfloat16", 1.0))
    found = [Row(row.what, row.against.removeprefix(title), *list(vars(row).values())[2:]) for row in found]
    return found if judged else [Row(*list(vars(row).values())[:5], "", True) for row in found]


def lowered_size(name: str) -> str:
    """What a lowered network holds, relative to the float one."""
    floats = network(name)
    model = quantized(floats, torch.randn(1, 3, 224, 224), skip_first=False)
    held = [
        sum(t.numel() * t.element_size() for t in each.state_dict().values()) for each in (floats, ocs.lower(model))
    ]
    return f"{held[1] / held[0]:.3f}"


def instructions() -> str:
    """What 8-bit products run on here."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx" if "amx_int8" in flags else "vnni" if "vnni" in flags else "avx2"


def main() -> None:
    """Measure, print, and keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--skip-first", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    found = [row for name in args.models for batch in args.batches for row in compare(name, batch, args)]
    notes = {"8-bit products": instructions(), "threads of each engine": args.threads}
    notes |= {f"{name}, lowered: its bytes to those of the float model": lowered_size(name) for name in args.models}
    publish("engines", found, notes)


if __name__ == "__main__":
    main()
