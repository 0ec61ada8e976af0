"""Export a quantized model for engines without Python: .pt2 and .onnx."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn
from torch.export import ExportedProgram

from ocs.errors import check_path
from ocs.formats.onnx import write_onnx
from ocs.formats.onnx_recurrent import weights_of
from ocs.formats.pt2 import write_package, write_program
from ocs.model.rewrite import keeps_grad_mode
from ocs.model.wrappers import named_modules
from ocs.progress import steps
from ocs.runtime.arithmetic import arithmetic_of
from ocs.runtime.program import ONE_EXPORT, Additions, as_example, lowered_copy, program_of
from ocs.weight.arguments import check_choice, check_flag

Form = Literal["package", "program"]


@keeps_grad_mode
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    target: str = "this",
    form: Form = "package",
    additions: bool | None = None,
    dynamic_lstm: bool = False,
    progress: bool | None = None,
) -> None:
    """Export a quantized model, its weights and products in integers, by the ending of the path: .pt2 or .onnx.

    The model stays as it is, and a file that is there is replaced as a whole. What is written needs no ocs.

        ocs.export(model, "model.onnx", images)                   # ONNX Runtime, OpenVINO, TensorRT (target="tensorrt")
        ocs.export(model, "model.pt2", images)                    # torch._inductor.aoti_load_package, or C++
        ocs.export(model, "model.pt2", images, form="program")    # torch.export.load, ExecuTorch and others

    Args:
        model: quantized by ocs.quantize or ocs.load, or lowered. Products run in integers where inputs are quantized
            (abits); weights are integers in any case: in ONNX int4 up to 4 bits, but for the few channels
            whose sums of copies take more, else int8.
        path: of the file. ONNX is of opset 21, with QuantizeLinear and DequantizeLinear; the batch size is open.
        example: an input: a tensor, a tuple of arguments, or a dict of arguments by name.
        target: see ocs.lower. "tensorrt" takes int8 inputs with zero point 0 and a scale per tensor, and a scale per
            channel of each weight: inputs must be quantized with act_signed=True, or with at most 7 bits.
        form: of a .pt2: "package", compiled ahead of time for this machine and the example's shapes (AOTInductor), or
            "program", what torch.export gives, with an open batch size.
        additions: round what residual additions add to 8 bits, too, by the ranges that calibration saw, without which
            engines add in floats; by default in all but form="program".
        dynamic_lstm: of an .onnx: write LSTM as ONNX Runtime's DynamicQuantizeLSTM, which multiplies int8 weights by
            inputs and states that it quantizes as they arrive, three to five times as fast there; it runs nowhere else.
            Else LSTM and GRU are ONNX's own, with dequantized int8 weights.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Raises:
        ValueError: the ending is another one, nothing in the model is quantized, or a layer cannot be lowered.
        ImportError: onnx or onnxscript is not installed: pip install torch-ocs[onnx].
        OSError: the file cannot be written, or what torch's compiler writes on the way.
        RuntimeError: torch's compiler fails; what it says is the cause.
    """
    check_path("path", path)
    ending = Path(path).suffix
    if ending not in (".pt2", ".onnx"):
        raise ValueError(f"path={os.fspath(path)!r}: use a name that ends in .pt2 or .onnx")
    check_choice("form", form, get_args(Form))
    if dynamic_lstm and ending != ".onnx":
        raise ValueError(f"dynamic_lstm=True: {os.fspath(path)!r} is no .onnx file")
    if ending == ".onnx" and form != "package":
        raise ValueError(f"form={form!r}: that is of a .pt2, and {os.fspath(path)!r} is none")
    if additions is not None:
        check_flag("additions", additions, "True, False or None")
    package = ending == ".pt2" and form == "package"
    rounded = _terms(bool(additions) if form == "program" else additions, "one" if package else "all")
    with ONE_EXPORT, steps("export", 3, progress) as begin:
        begin("lower")
        lowered = lowered_copy(model, target)
        given = as_example(lowered, example)
        begin("trace")
        program = program_of(lowered, given, target=target, additions=rounded, dynamic=not package)
        begin("write")
        if ending == ".onnx":
            write_lowered(lowered, program, path, dynamic_lstm=dynamic_lstm, target=target)
        elif package:
            write_package(program, path)
        else:
            write_program(program, path)


def write_lowered(
    lowered: nn.Module, program: ExportedProgram, path: str | os.PathLike[str], *, dynamic_lstm: bool, target: str
) -> None:
    """Write the program of a lowered model as ONNX; a ValueError names what ONNX has no operator for."""
    for name, module in named_modules(lowered):
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise ValueError(
                f"{name}: ONNX has no LSTM with projections (proj_size={module.proj_size}): use a .pt2 file"
            )
    changed = program.graph_signature.buffers_to_mutate.values()
    if changed:
        raise ValueError(f"{', '.join(changed)}: forward changes it, and an ONNX file has no state: use a .pt2 file")
    write_onnx(
        program, path, recurrent=weights_of(lowered), dynamic_lstm=dynamic_lstm,
        int8_only=target == "tensorrt", fill_int8=not arithmetic_of(target).saturates, metadata={"ocs": _version()},
    )  # fmt: skip


def _version() -> str:
    from ocs import __version__

    return __version__


def _terms(additions: bool | None, rounded: Additions) -> Additions:
    """Say which terms of additions are rounded, where that is wanted."""
    return "float" if additions is False else rounded
