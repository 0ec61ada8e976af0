"""Export a quantized model for engines without Python: .pt2 and .onnx."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ocs.formats.onnx import write_onnx
from ocs.formats.pt2 import write_package, write_program
from ocs.runtime.program import Additions, as_example, check_onnx, lowered_copy, program_of
from ocs.weight.arguments import check_choice

Form = Literal["package", "program"]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Any,
    *,
    target: str = "this",
    form: Form = "package",
    additions: bool | None = None,
) -> None:
    """Export a quantized model, its weights and products in integers, by the ending of the path: .pt2 or .onnx.

    The model stays as it is, and a file that is there is replaced as a whole. What is written needs no ocs.

        ocs.export(model, "model.onnx", images)                   # ONNX Runtime, OpenVINO, TensorRT (target="tensorrt")
        ocs.export(model, "model.pt2", images)                    # torch._inductor.aoti_load_package, or C++
        ocs.export(model, "model.pt2", images, form="program")    # torch.export.load, ExecuTorch and others

    Args:
        model: quantized by ocs.quantize or ocs.load, or lowered. Products run in integers where inputs are quantized
            (abits); weights are integers in any case: in ONNX int4 up to 4 bits, where sums of copies fit, else int8.
        path: of the file. ONNX is of opset 21, with QuantizeLinear and DequantizeLinear; the batch size is open.
        example: an input: a tensor, a tuple of arguments, or a dict of arguments by name.
        target: see ocs.lower. "tensorrt" takes int8 inputs with zero point 0 and a scale per tensor, and a scale per
            channel of each weight: inputs must be quantized with act_signed=True, or with at most 7 bits.
        form: of a .pt2: "package", compiled ahead of time for this machine and the example's shapes (AOTInductor), or
            "program", what torch.export gives, with an open batch size.
        additions: round what residual additions add to 8 bits, too, by the ranges that calibration saw, without which
            engines add in floats; by default in all but form="program".

    Raises:
        ValueError: the ending is another one, nothing in the model is quantized, or a layer cannot be lowered.
        ImportError: onnx or onnxscript is not installed: pip install torch-ocs[onnx].
    """
    ending = Path(path).suffix
    if ending not in (".pt2", ".onnx"):
        raise ValueError(f"path={os.fspath(path)!r}: use a name that ends in .pt2 or .onnx")
    check_choice("form", form, get_args(Form))
    given = as_example(example)
    lowered = lowered_copy(model, target)
    if ending == ".onnx":
        check_onnx(lowered)
        write_onnx(program_of(lowered, given, target=target, additions=_terms(additions, "all")), path)
    elif form == "package":
        program = program_of(lowered, given, target=target, additions=_terms(additions, "one"), dynamic=False)
        write_package(program, path)
    else:
        terms = _terms(bool(additions), "all")
        write_program(program_of(lowered, given, target=target, additions=terms), path)


def _terms(additions: bool | None, rounded: Additions) -> Additions:
    """Say which terms of additions are rounded, where that is wanted."""
    return "float" if additions is False else rounded
