"""Save and load quantized models: one safetensors file, the integers in as many bits as they have.

A file holds, under the names of the model's state_dict, every parameter and persistent buffer as it is, except that of
each quantized weight there are `weight_int` (uint8: the k-bit codes of its integers [O, C + n, ...], see csrc/pack.c),
`scale` and `source` (int32: the original channel of each copy, group by group; the original channels go without
saying), and of a quantized input `input_scale` and `input_source`, the copies in the order of splitting. Its metadata
has, under "ocs", what a reader needs as JSON: the format and the version that wrote it; of each layer the kind, the
settings and the shapes; which batch norms were folded; of each tensor a CRC-32. And under "crc32" that of this JSON.

Nothing in a file is trusted: the model decides which layers and shapes there may be.
"""

import functools
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocs.errors import check_order, check_path, error_context
from ocs.formats.contents import Entry, crc32, describe, entries_of, full_name
from ocs.formats.pretrained import refused_slots
from ocs.formats.reader import RANGES, Reader
from ocs.formats.restore import float_replacements, plan_floats, quantized_replacements
from ocs.formats.shards import header_of, open_shards
from ocs.formats.source import weight_files
from ocs.model.batchnorm_folding import FoldedBatchNorm
from ocs.model.rewrite import exchange, keeps_grad_mode, module_slots
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.nn.embedding import tied_layers
from ocs.nn.state import calibrated_buffers, weight_buffers
from ocs.progress import with_progress
from ocs.replace_file import replacing

# --- Save -------------------------------------------------------------------------------------------------------------


@keeps_grad_mode
def save(model: nn.Module, path: str | os.PathLike[str], *, progress: bool | None = None) -> None:
    """Write a quantized model to a safetensors file, k bits for an integer of k bits.

    It is written beside `path` and renamed when complete and on the disk, so that what was there survives an
    interruption; what a killed process left there goes.

    Args:
        model: with layers that ocs.quantize made, on any device; everything else in it is saved as it is.
        path: any name; ".safetensors" is customary.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Raises:
        OSError: it cannot be written there: `path` is a folder, a device or a pipe, say, or a file that is read-only.
        ValueError: nothing in the model is quantized, or it holds what a file of tensors cannot: extra state, sparse
            tensors, parameters without values.
    """
    check_order("ocs.save(model, path)", model, path)
    check_path("path", path)
    write_model(model, path, {}, progress)


def write_model(
    model: nn.Module, path: str | os.PathLike[str], notes: Mapping[str, str], progress: bool | None = None
) -> None:
    """Save a model as save() does, with more entries in the file's metadata, which load() does not look at."""
    tensors, metadata = stored(unwrapped(model), progress)
    _write(tensors, {**notes, **metadata}, path)


def stored(model: nn.Module, progress: bool | None = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give what a file holds of a quantized model: tensors by name, and the metadata that says how to read them."""
    layers = {name: layer for name, layer in named_modules(model) if isinstance(layer, QuantizedLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer: call ocs.quantize first, or use torch.save")
    if "" in layers:
        raise ValueError(f"model is itself a {type(model).__name__}, which ocs.load could not put in place: wrap it")
    tensors = {entry.name: as_stored(entry) for entry in entries_of(model, {})}
    packed, header = stored_layers(layers, progress)
    header["batch_norms"] = [name for name, module in named_modules(model) if isinstance(module, FoldedBatchNorm)]
    tensors |= packed
    return tensors, sealed(header, {name: crc32(tensor) for name, tensor in tensors.items()})


def stored_layers(
    layers: Mapping[str, QuantizedLayer], progress: bool | None = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give what a file holds of these layers beside what stays float in them, and what its header says of them."""
    tensors, tied = {}, tied_layers(layers)
    for name, layer in with_progress(layers.items(), "save", progress):
        tensors.update(_packed(name, layer, [] if name in tied else [*layer.channels]))
    header = {
        "format": _format(layers, tied),
        "ocs": version(),
        "layers": {n: describe(layer) | ({"tied": tied[n]} if n in tied else {}) for n, layer in layers.items()},
        "batch_norms": [],
        **{f"{what}s": _ranges(layers, what) for what in RANGES},
    }
    return tensors, header


def sealed(header: Mapping[str, Any], sums: Mapping[str, int]) -> dict[str, str]:
    """Make a file's metadata of its header and of the CRC-32 of each tensor."""
    text = json.dumps({**header, "tensors": sums})
    return {"ocs": text, "crc32": str(zlib.crc32(text.encode()))}


def _format(layers: Mapping[str, QuantizedLayer], tied: Mapping[str, str]) -> int:
    """Choose the oldest format that has what these layers need, so that readers as old as that take the file."""
    grids = [layer.input_grid for layer in layers.values() if layer.input_grid is not None]
    if any(grid.dynamic and grid.splits for grid in grids):
        return 7
    if any(layer.scale_group for layer in layers.values()) or any(grid.split == "even" for grid in grids):
        return 6
    if any(_splits_repeatedly(layer) for layer in layers.values()):
        return 5
    if any(grid.dynamic for grid in grids):
        return 4
    return 3 if tied else 2


def _splits_repeatedly(layer: QuantizedLayer) -> bool:
    """Tell whether a channel of the layer's input is split more than once: its copies' order then says how."""
    copies = layer.input_copies()
    return copies.unique().numel() < copies.numel()


def _ranges(layers: Mapping[str, QuantizedLayer], what: str) -> dict[str, tuple[float, float]]:
    """List the ranges of layers' inputs or outputs that calibration saw."""
    return {name: found for name, layer in layers.items() if (found := getattr(layer, what)) is not None}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("files need safetensors: pip install torch-ocs[files]") from None
    return safetensors


@functools.cache  # as models have few
def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as safetensors does; a KeyError where it has none such."""
    content = _safetensors().torch.save({"": torch.empty(0, dtype=dtype, device="cpu")})
    return header_of(io.BytesIO(content))[1][""]["dtype"]


def as_stored(entry: Entry) -> Tensor:
    """Copy a tensor to the CPU, into memory of its own; refuse one that a file cannot hold."""
    tensor = entry.tensor
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise ValueError(f"{entry.name}: it holds no values yet")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{entry.name}: it is {kind}, which a safetensors file cannot hold")
    try:
        dtype_name(tensor.dtype)
    except KeyError:
        raise ValueError(f"{entry.name}: it is {tensor.dtype}, which a safetensors file cannot hold") from None
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _packed(name: str, layer: QuantizedLayer, weights: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Give what a file holds of these weights of a layer, and of its input; of those on the meta device, shapes."""
    for weight in weights:
        ints_name, scale_name, source_name = (full_name(name, buffer) for buffer in weight_buffers(weight))
        ints, scale, _ = layer.weight_state(weight)
        device = "meta" if ints.is_meta else "cpu"
        yield ints_name, torch.ops.ocs.pack(ints.to(device), layer.bits)
        yield scale_name, scale.to(device, copy=True)
        yield source_name, layer.copies(weight).to(device, torch.int32, copy=True)
    for buffer in calibrated_buffers(layer.input_grid):
        tensor = layer.input_copies().int() if buffer == "input_source" else layer.input_scale
        yield full_name(name, buffer), tensor.to("cpu", copy=True)


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Write all of the file under another name, which then becomes its own."""
    safetensors = _safetensors()
    with replacing(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata=metadata)
        _order_metadata(partial)


def _order_metadata(path: Path) -> None:
    """Sort what safetensors wrote in any order, lest the same model give other bytes each time."""
    with open(path, "r+b") as file:
        size, header = header_of(file)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def version() -> str:
    """Tell which version of the package this is."""
    from ocs import __version__

    return __version__


# --- Load -------------------------------------------------------------------------------------------------------------


@keeps_grad_mode
def load(
    path: str | os.PathLike[str], model: nn.Module, *, packed: bool = False, progress: bool | None = None
) -> nn.Module:
    """Turn a float model into the quantized one that was saved to `path`, in place, and return it.

    Args:
        path: a file that ocs.save wrote, or a folder that ocs.quantize_file wrote.
        model: the float architecture; its weights may be random, or on the meta device. Parameters keep their dtype and
            device, quantized layers those of the layer that they replace; meta tensors become CPU tensors, but for
            non-persistent buffers, which no file holds.
        packed: its layers become those of ocs.pack, without float weights on the way.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, was not written by ocs.save or by a newer version of it, or does not fit the
            model. The model is then as it was.
    """
    safetensors = _safetensors()
    check_order("ocs.load(path, model)", model, path)
    check_path("path", path)
    files = weight_files(path)
    with error_context(str(path)), torch.inference_mode(False), torch.no_grad():
        try:
            with open_shards(files) as file:
                reader, inside = Reader(file), unwrapped(model)
                floats = float_replacements(reader, inside)
                replacements = floats | quantized_replacements(reader, inside, floats, packed, progress)
                slots, values = plan_floats(reader, inside, replacements)
        except safetensors.SafetensorError as error:
            raise ValueError(f"it is no complete safetensors file ({error})") from error
        exchange([*slots, *module_slots(model, replacements), *refused_slots(model, replacements)], values)
    return model
