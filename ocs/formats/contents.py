"""The tensors of a model that its file holds as they are, their names there and their sums."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocs.model.wrappers import named_modules
from ocs.nn.base import QuantizedLayer
from ocs.nn.input import InputGrid
from ocs.nn.state import INPUT_BUFFERS
from ocs.nn.weights import bytes_of, is_weight


class Entry(NamedTuple):
    """A parameter or persistent buffer: its first name in the model, and every place where it stands."""

    name: str
    tensor: Tensor
    places: tuple[tuple[dict[str, Any], str], ...]  # a module's table and the key there


class Sizes(NamedTuple):
    """Bytes of a model before and after quantization, each tensor once; buffers that no state_dict has left out."""

    model: int  # all parameters and buffers of the float model
    weights: int  # of these the weights, that is parameters of two or more dimensions
    float_weights: int  # those that stay float
    beside: int  # all that a file holds beside packed weights, with its header


def entries_of(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[Entry]:
    """List all but what quantized weights hold, as if the replacements (by id of the old module) were in place.

    Raises:
        ValueError: a module has state besides its tensors.
    """
    for name, module in named_modules(model):
        if type(replacements.get(id(module), module)).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{name or 'model'}: it has extra state, which a file of tensors cannot hold")
    return _entries(model, replacements)


def sizes_of(model: nn.Module, replacements: Mapping[int, nn.Module]) -> Sizes:
    """Count the bytes of a float model, and of what stays float in it once the replacements are in place."""
    before, after = ([entry.tensor for entry in _entries(model, each)] for each in ({}, replacements))
    weights, left = ([tensor for tensor in each if _is_weight(tensor)] for each in (before, after))
    quantized = {name: replacements[id(m)] for name, m in named_modules(model) if id(m) in replacements}
    header = _header_bytes({n: m for n, m in quantized.items() if isinstance(m, QuantizedLayer)}, len(after))
    of_model, of_weights, of_left, beside = (sum(map(bytes_of, each)) for each in (before, weights, left, after))
    return Sizes(of_model, of_weights, of_left, beside + header)


def _header_bytes(layers: Mapping[str, QuantizedLayer], others: int) -> int:
    """Estimate the bytes of a header: what it says of these layers, of their tensors and of so many others."""
    tensors = others + sum(3 * len(layer.channels) + (layer.input_grid is not None) for layer in layers.values())
    described = json.dumps({name: describe(layer) for name, layer in layers.items()})
    return len(json.dumps(described)) + 110 * tensors


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and is_weight(tensor)


def _entries(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[Entry]:
    found: dict[int, Entry] = {}
    for prefix, old in named_modules(model):
        module = replacements.get(id(old), old)
        packed = _packed_buffers(module)
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and key not in packed and key not in module._non_persistent_buffers_set:
                    entry = found.get(id(tensor), Entry(full_name(prefix, key), tensor, ()))
                    found[id(tensor)] = entry._replace(places=(*entry.places, (table, key)))
    return list(found.values())


def _packed_buffers(module: nn.Module) -> set[str]:
    """Name the buffers of a quantized layer that a file holds in a form of its own; other modules have none."""
    if not isinstance(module, QuantizedLayer):
        return set()
    return {*INPUT_BUFFERS, *(buffer for weight in module.channels for buffer in module.buffers_of(weight))}


def full_name(prefix: str, name: str) -> str:
    """Name a tensor of a module in the whole model."""
    return f"{prefix}.{name}" if prefix else name


def describe(layer: QuantizedLayer) -> dict[str, Any]:
    """Describe a layer for the header of a file; only one with scales of groups says so, as older readers know none."""
    grouped = {"group": layer.scale_group} if layer.scale_group else {}
    return grouped | {
        "kind": layer.float_kind.__name__,
        "bits": layer.bits,
        "expand": layer.expand,
        "settings": layer.settings,
        "input": None if layer.input_grid is None else _described_grid(layer.input_grid),
        "weights": {name: list(layer.weight_state(name)[0].shape) for name in layer.channels},
    }


def _described_grid(grid: InputGrid) -> dict[str, Any]:
    """Describe a grid; only one of rows says how its scale is found, as readers of older formats know no such field."""
    described = asdict(grid)
    return described if grid.dynamic else {name: value for name, value in described.items() if name != "act_scale"}


def crc32(tensor: Tensor) -> int:
    """Compute the CRC-32 of a tensor's bytes; it is on the CPU."""
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else 0
