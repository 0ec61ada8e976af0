"""The tensors of a model that its file holds as they are, their names there and their sums."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocs.model.wrappers import named_modules
from ocs.nn.base import QuantizedLayer
from ocs.nn.state import INPUT_BUFFERS, weight_buffers


class Entry(NamedTuple):
    """A parameter or persistent buffer: its first name in the model, and every place where it stands."""

    name: str
    tensor: Tensor
    places: tuple[tuple[dict[str, Any], str], ...]  # a module's table and the key there


def entries_of(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[Entry]:
    """List all but what quantized weights hold, as if the replacements (by id of the old module) were in place."""
    found: dict[int, Entry] = {}
    for prefix, old in named_modules(model):
        module = replacements.get(id(old), old)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{prefix or 'model'}: it has extra state, which a file of tensors cannot hold")
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
    return {*INPUT_BUFFERS, *(buffer for weight in module.channels for buffer in weight_buffers(weight))}


def full_name(prefix: str, name: str) -> str:
    """Name a tensor of a module in the whole model."""
    return f"{prefix}.{name}" if prefix else name


def crc32(tensor: Tensor) -> int:
    """Compute the CRC-32 of a tensor's bytes; it is on the CPU."""
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else 0
