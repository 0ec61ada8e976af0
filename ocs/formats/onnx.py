"""ONNX files of exported programs: QuantizeLinear and DequantizeLinear, weights in 4-bit integers where these do."""

import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from ocs.errors import quiet
from ocs.formats.full_range import clip_integers
from ocs.formats.replace_file import replacing

OPSET = 21  # the first that has 4-bit integers


def write_onnx(
    program: ExportedProgram, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a program of quantized_decomposed operators as an ONNX file of opset 21, and check it.

    metadata: goes into the file's metadata_props.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    onnx = _onnx()
    clip_integers(program)
    with quiet(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        model = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, external_data=False, optimize=True, verbose=False
        ).model_proto
    _narrow_weights(onnx, model)
    _name_batch(model)
    onnx.helper.set_model_props(model, dict(metadata or {}))
    with replacing(path) as partial:
        onnx.save(model, str(partial))
        onnx.checker.check_model(str(partial), full_check=True)


def _onnx() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx.export needs it
    except ImportError:
        raise ImportError("ONNX files need onnx and onnxscript: pip install torch-ocs[onnx]") from None
    return onnx


def _narrow_weights(onnx: Any, model: Any) -> None:
    """Hold weights of at most 4 bits as int4, cast to int8 where they are dequantized: engines do that once."""
    graph = model.graph
    weights = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    casts = []
    for tensor in graph.initializer:
        if tensor.name not in weights or tensor.data_type != onnx.TensorProto.INT8:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if not values.size or values.min() < -8 or values.max() > 7:
            continue
        name = f"{tensor.name}.int8"
        for node in graph.node:
            node.input[:] = [name if each == tensor.name else each for each in node.input]
        packed = onnx.helper.make_tensor(tensor.name, onnx.TensorProto.INT4, tensor.dims, _nibbles(values), raw=True)
        tensor.CopyFrom(packed)
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.INT8))
        for value in [each for each in graph.value_info if each.name == tensor.name]:
            graph.value_info.remove(value)
    for cast in reversed(casts):
        graph.node.insert(0, cast)


def _nibbles(values: np.ndarray) -> bytes:
    """Pack integers -8 .. 7 in pairs, the first in the lower half of a byte."""
    codes = values.ravel().astype(np.uint8) & 15
    codes = np.pad(codes, (0, codes.size % 2))
    return (codes[::2] | codes[1::2] << 4).tobytes()


def _name_batch(model: Any) -> None:
    """Call the dimension of any size batch."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    if dims:
        first = dims[0].dim_param
        for dim in dims:
            dim.dim_param = "batch" if dim.dim_param == first else dim.dim_param
