"""The buffers of a quantized layer: their names, and what may stand in them, as a state may come from a stranger."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ocs.kernels.composite import source_valid
from ocs.kernels.constants import qmax
from ocs.nn.input import InputGrid

INPUT_BUFFERS = ("input_form", "input_scale", "input_source")


def weight_buffers(weight: str) -> tuple[str, str, str]:
    """Name the buffers that hold a weight: its integers, scale and source."""
    stem = weight.replace(".", "_")
    scaled = stem if "weight" in stem else f"{stem}_weight"
    return f"{stem}_int", scaled.replace("weight", "scale"), scaled.replace("weight", "source")


def packed_buffers(weight: str) -> tuple[str, str, str]:
    """Name the buffers that hold a packed weight: its codes, scale and copies."""
    ints, scale, source = weight_buffers(weight)
    return f"{ints.removesuffix('int')}packed", scale, source.replace("source", "copies")


def calibrated_buffers(grid: InputGrid | None) -> tuple[str, ...]:
    """Name the buffers that hold what calibration gave for an input with this grid."""
    if grid is None:
        return ()
    scale = ("input_scale",) if grid.calibrated else ()
    return (*scale, "input_source") if grid.split_once else scale


def encode_grid(grid: InputGrid) -> Tensor:
    """Encode a grid for a state_dict, uint8 [4]: bits, whether signed, how it is split, and its scale.

    Splits are 0 naive, 1 quantization-aware, 2 in equal parts. The scale is 0 from calibration, 1 each batch's own
    (Oracle OCS), 2 each row's own.
    """
    scale = 2 if grid.dynamic else int(grid.oracle)
    split = ("naive", "qa", "even").index(grid.split)
    return torch.tensor([grid.bits, grid.signed, split, scale], dtype=torch.uint8, device="cpu")


def with_originals(copies: Tensor, groups: int, channels: int) -> Tensor:
    """Put each group's original channels before its copies: a source [groups (C + n)] from that of the copies alone."""
    own = torch.arange(groups * channels, device=copies.device).view(groups, channels)
    return torch.cat([own, copies.view(groups, -1)], 1).flatten()


def weight_problem(
    names: Sequence[str], ints: Tensor, scale: Tensor, source: Tensor, bits: int, groups: int, channels: int
) -> str:
    """Say why these values are no quantized weight, or ""."""
    most = qmax(bits)
    if ints.dtype != torch.int8 or bool((ints.short().abs() > most).any()):
        return f"{names[0]} is not of {bits}-bit integers (int8 in [-{most}, {most}])"
    scale = scale.float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        return f"{names[1]} is not positive and finite (in float32)"
    if not _is_source(source, groups, channels):
        return f"{names[2]} is no split plan of this layer"
    return ""


def input_problem(scale: Tensor | None, source: Tensor | None, groups: int, channels: int) -> str:
    """Say why these values cannot be what calibration gave for a layer's input, or ""."""
    if scale is not None and not bool((scale := scale.float()).isfinite() & (scale > 0)):
        return "input_scale is not positive and finite (in float32)"
    if source is None:
        return ""
    return "" if _is_source(source, groups, channels) else "input_source is no split plan of this layer"


def _is_source(source: Tensor, groups: int, channels: int) -> bool:
    return not source.is_floating_point() and source_valid(source.long(), groups, channels)


def tensors_of(
    state: Mapping[str, Any], prefix: str, buffers: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], str]:
    """Pick the tensors of a state that replace these buffers, which belong together, and say what is wrong with them.

    There are none where the state has none of them, or where none has values (all on the meta device).
    """
    given = {name: state.get(prefix + name) for name in buffers}
    if all(tensor is None for tensor in given.values()):
        return {}, ""
    for name, tensor in given.items():
        if tensor is None:
            return {}, f"{name} is missing, without which {', '.join(set(given) - {name})} means nothing"
        problem = _unlike(tensor, buffers[name].shape)
        if problem:
            return {}, f"{name} {problem}"
    valueless = [name for name, tensor in given.items() if tensor.is_meta]
    if 0 < len(valueless) < len(given):
        return {}, f"{', '.join(valueless)} without values (on the meta device), which the rest has"
    return ({} if valueless else given), ""


def _unlike(tensor: Any, shape: torch.Size) -> str:
    """Say why this, of a state, is no plain tensor of the shape that is needed, or ""."""
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, not {type(tensor).__name__}"
    if is_lazy(tensor):
        return "must be a tensor with values: it is of a lazy layer that never ran"
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return f"is {tensor.layout}, {tensor.dtype}: it must be a dense tensor of real numbers"
    found, needed = list(tensor.shape), list(shape)
    return "" if found == needed else f"has a size mismatch: {found}, this layer needs {needed}"
