"""ONNX files of exported programs: QuantizeLinear and DequantizeLinear, weights in 4-bit integers where these do."""

import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from ocs.errors import quiet
from ocs.formats.full_range import clip_floats, clip_integers
from ocs.formats.onnx_recurrent import RowWeight, hold_integers, quantize_dynamically
from ocs.formats.wide_bias import take_wide_biases_out
from ocs.replace_file import replacing

OPSET = 21  # the first that has 4-bit integers
_ANY = 2**31 - 1


def write_onnx(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    recurrent: Mapping[bytes, RowWeight] | None = None,
    dynamic_lstm: bool = False,
    int8_only: bool = False,
    fill_int8: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a program of quantized_decomposed operators as an ONNX file of opset 21, and check it.

    recurrent: the integers of LSTM and GRU layers, from onnx_recurrent. dynamic_lstm: put ONNX Runtime's operator in
    place of LSTM. int8_only: for engines that know quantization to 8 bits and nothing else of integers. fill_int8:
    write weights of 5 to 7 bits times a power of two, with as much finer a scale: the same numbers, and engines round
    biases to that scale. metadata: goes into the file's metadata_props.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    onnx, _ = onnx_module("onnx"), onnx_module("onnxscript")
    _check_float32(program)
    take_wide_biases_out(program)
    clip = clip_floats if int8_only else clip_integers
    clip(program)
    with quiet(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        exported = _exported(program)
        if recurrent:  # their weights are put together of parts, which must be done here
            onnx_module("onnxscript.optimizer").optimize(exported.model, input_size_limit=_ANY, output_size_limit=_ANY)
        model = exported.model_proto
    put_weights = quantize_dynamically if dynamic_lstm else hold_integers
    put_weights(onnx, model, recurrent or {})
    if not int8_only:
        _narrow_weights(onnx, model)
    if fill_int8:
        _fill_int8(onnx, model)
    _remove_unused(model)
    _name_batch(model)
    _name_weights(model)
    _forget_where(model)
    onnx.helper.set_model_props(model, dict(metadata or {}))
    with replacing(path) as partial:
        onnx.save(model, str(partial))
        onnx.checker.check_model(str(partial), full_check=not dynamic_lstm)  # whose types only its engine knows


def _exported(program: ExportedProgram) -> Any:
    """Let torch write the file; a ValueError says in a line what it cannot."""
    try:
        return torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, external_data=False, optimize=True, verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = str(cause).strip().partition("\n")[0]
        raise ValueError(f"torch.onnx.export cannot write this model ({type(cause).__name__}: {first})") from error


def _check_float32(program: ExportedProgram) -> None:
    """Refuse programs that compute in half precision: QuantizeLinear would need scales of that."""
    for node in program.graph.nodes:
        if "dequantize" in str(node.target) and node.meta["val"].dtype != torch.float32:
            raise ValueError(f"the model computes in {node.meta['val'].dtype}: for ONNX use model.float()")


def onnx_module(name: str) -> Any:
    """Import onnx, or what torch.onnx.export needs; an ImportError says what to install."""
    try:
        return import_module(name)
    except ImportError:
        raise ImportError("ONNX files need onnx and onnxscript: pip install torch-ocs[onnx]") from None


def _narrow_weights(onnx: Any, model: Any) -> None:
    """Hold weights of at most 4 bits as int4, made int8 where they are dequantized: engines do that once.

    The few channels of sums that take more, those of a channel and its copies, are held apart in int8.
    """
    graph = model.graph
    weights = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    nodes: list[Any] = []
    for tensor in list(graph.initializer):
        if tensor.name not in weights or tensor.data_type != onnx.TensorProto.INT8:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        axis, wide = _wide_channels(values)
        if axis is None:
            continue
        name, own = tensor.name, f"{tensor.name}.int8"
        for node in graph.node:
            node.input[:] = [own if each == name else each for each in node.input]
        for value in [each for each in graph.value_info if each.name == name]:
            graph.value_info.remove(value)
        narrow = np.compress(~wide, values, axis)
        int4 = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, narrow.shape, _nibbles(narrow), raw=True)
        tensor.CopyFrom(int4)
        if not wide.any():
            nodes.append(onnx.helper.make_node("Cast", [name], [own], to=onnx.TensorProto.INT8))
            continue
        places = np.argsort(np.concatenate([np.flatnonzero(~wide), np.flatnonzero(wide)])).astype(np.int32)
        apart = {f"{name}.wide": np.compress(wide, values, axis), f"{name}.places": places}
        graph.initializer.extend(onnx.numpy_helper.from_array(array, each) for each, array in apart.items())
        cast, joined = f"{name}.narrow", f"{name}.joined"
        nodes += [
            onnx.helper.make_node("Cast", [name], [cast], to=onnx.TensorProto.INT8),
            onnx.helper.make_node("Concat", [cast, f"{name}.wide"], [joined], axis=axis),
            onnx.helper.make_node("Gather", [joined, f"{name}.places"], [own], axis=axis),
        ]
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _wide_channels(values: np.ndarray) -> tuple[int | None, np.ndarray]:
    """Find the axis along which fewest channels take more than 4 bits, and which; None where int4 saves nothing."""
    beyond = (values < -8) | (values > 7)
    found = [(axis, beyond.any(tuple(i for i in range(values.ndim) if i != axis))) for axis in range(values.ndim)[:2]]
    axis, wide = min(found, key=lambda each: each[1].mean(), default=(0, beyond))
    places = 4 * wide.size if wide.any() else 0
    return (axis if (1 + wide.mean()) * values.size / 2 + places < values.size else None), wide


def _fill_int8(onnx: Any, model: Any) -> None:
    """Multiply int8 weights by the power of two that they have room for, and divide their scales by it: exactly.

    A weight that something else than DequantizeLinear reads, too (an embedding that it is tied to), stays as it is.
    """
    graph, constants = model.graph, {each.name: each for each in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for tensor in [each for each in graph.initializer if each.data_type == onnx.TensorProto.INT8]:
        nodes = readers.get(tensor.name, [])
        if any(
            n.op_type != "DequantizeLinear" or n.input[0] != tensor.name or n.input[1] not in constants for n in nodes
        ):
            continue
        ints = onnx.numpy_helper.to_array(tensor)
        factor = 2 ** int(np.log2(127 / max(1, np.abs(ints.astype(int)).max(initial=1))))
        if factor > 1 and nodes:
            tensor.CopyFrom(onnx.numpy_helper.from_array(ints * np.int8(factor), tensor.name))
            for i, node in enumerate(nodes):
                scale = onnx.numpy_helper.to_array(constants[node.input[1]]) / np.float32(factor)
                node.input[1] = f"{tensor.name}.scale.{i}"
                graph.initializer.append(onnx.numpy_helper.from_array(scale, node.input[1]))


def _remove_unused(model: Any) -> None:
    """Remove the initializers that nothing reads."""
    read = {name for node in model.graph.node for name in node.input} | {each.name for each in model.graph.output}
    for tensor in [each for each in model.graph.initializer if each.name not in read]:
        model.graph.initializer.remove(tensor)


def _nibbles(values: np.ndarray) -> bytes:
    """Pack integers -8 .. 7 in pairs, the first in the lower half of a byte."""
    codes = values.ravel().astype(np.uint8) & 15
    codes = np.pad(codes, (0, codes.size % 2))
    return (codes[::2] | codes[1::2] << 4).tobytes()


def _name_weights(model: Any) -> None:
    """Call weights as the float model does."""
    names = {each.name: each.name.removesuffix("_int") for each in model.graph.initializer}
    taken = set(names)
    names = {old: new for old, new in names.items() if new not in taken}
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(each, each) for each in node.input]
    for value in [each for each in model.graph.value_info if each.name in names]:
        model.graph.value_info.remove(value)


def _forget_where(model: Any) -> None:
    """Remove which lines of whose code the nodes are from: folders of this machine, and a third of a small file."""
    for node in model.graph.node:
        kept = [each for each in node.metadata_props if "stack_trace" not in each.key]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def _name_batch(model: Any) -> None:
    """Call the dimension of any size batch."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    if dims:
        first = dims[0].dim_param
        for dim in dims:
            dim.dim_param = "batch" if dim.dim_param == first else dim.dim_param
