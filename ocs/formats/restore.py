"""Make of a file what takes the place of a float model's parts, and put it there, all or nothing.

The model decides which layers and shapes there may be; what the file says is compared with it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ocs.errors import error_context
from ocs.formats.contents import Entry, entries_of, full_name
from ocs.formats.reader import Reader, SavedLayer
from ocs.model.batchnorm_folding import FoldedBatchNorm, run_afterwards, with_parameters
from ocs.model.references import Place
from ocs.model.rewrite import Slot
from ocs.model.standardized import made_permanent
from ocs.model.targets import Target, find_targets
from ocs.model.wrappers import named_modules
from ocs.nn.base import QuantizedLayer
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.embedding import share_tied
from ocs.nn.input import InputGrid, QuantizedInput
from ocs.nn.packed.kinds import packed_kind
from ocs.nn.registry import replacement_of
from ocs.nn.state import input_problem, weight_buffers, weight_problem, with_originals
from ocs.nn.weights import Weight, weights_of
from ocs.progress import with_progress
from ocs.weight.blocks import count_blocks
from ocs.weight.types import QuantizedWeight

_LAZY = "run a batch through the model first, so that its lazy layers have shapes"

# --- Batch norms that were folded, layers that got a bias -------------------------------------------------------------


def float_replacements(reader: Reader, model: nn.Module) -> dict[int, nn.Module]:
    """Make what stands for folded batch norms, and for layers that got a bias, by id of the old modules."""
    modules = dict(named_modules(model))
    replacements: dict[int, nn.Module] = {}
    for name in reader.batch_norms:
        is_norm = isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm)
        if not is_norm or (after := run_afterwards(modules[name])) is None:
            raise ValueError(f"it was saved from another model: this one has no batch norm {name[:200]!r} to fold")
        replacements[id(modules[name])] = FoldedBatchNorm(after)
    for name, module in modules.items():
        if _gains_bias(reader, name, module, folded=bool(replacements)):
            replacements[id(module)] = _with_bias(module)
    return replacements


def _gains_bias(reader: Reader, name: str, module: nn.Module, folded: bool) -> bool:
    """Whether quantization gave this layer a bias that it had not: by a folded batch norm, or by bias correction."""
    corrected = name in reader.layers and reader.layers[name].settings.get("correct_bias") is True
    if not corrected and not (folded and isinstance(module, CONVOLUTIONS)):
        return False
    can_gain = isinstance(module, (nn.Linear, *CONVOLUTIONS)) and module.bias is None
    return can_gain and full_name(name, "bias") in reader.sums


def _with_bias(layer: nn.Module) -> nn.Module:
    """Copy a layer that then shares all but a bias of its own, still without values."""
    device = "cpu" if layer.weight.is_meta else layer.weight.device
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    bias = torch.zeros(outputs, dtype=layer.weight.dtype, device=device)
    return with_parameters(layer, bias=nn.Parameter(bias, layer.weight.requires_grad))


# --- Quantized layers -------------------------------------------------------------------------------------------------


def quantized_replacements(
    reader: Reader, model: nn.Module, floats: Mapping[int, nn.Module], packed: bool, progress: bool | None
) -> dict[int, QuantizedLayer]:
    """Make the quantized layers of the file, by id of the old ones, of which `floats` replaces some.

    packed: those that hold no floats.
    """
    layers = {layer.name: layer for layer in find_targets(model)}
    replacements = {}
    for name, saved in with_progress(reader.layers.items(), "load", progress):
        if name not in layers or not name:
            raise ValueError(f"it was saved from another model: this one has no layer {name[:200]!r} to replace")
        old = layers[name].module
        with error_context(name):
            module = floats.get(id(old), old)
            layer = replace(layers[name], module=made_permanent(module) or module)
            replacements[id(old)] = _read_layer(reader, layer, saved, packed)
            for what, ranges in reader.ranges.items():
                setattr(replacements[id(old)], what, ranges.get(name))
    made = {name: replacements[id(layers[name].module)] for name in reader.layers}
    share_tied({name: (layer, layers[name].tied_to) for name, layer in made.items()})
    return replacements


def _read_layer(reader: Reader, layer: Target, saved: SavedLayer, packed: bool) -> QuantizedLayer:
    """Make the quantized layer that replaces this one."""
    module = layer.module
    if layer.reason_float and layer.tied_to not in reader.layers:
        raise ValueError(f"it was saved quantized, but {layer.reason_float}")
    if saved.tied not in ("", layer.tied_to):
        raise ValueError("it was saved from another model: this one is tied to another layer")
    kind = replacement_of(module)
    if any(nn.parameter.is_lazy(module._parameters[name]) for name in kind.weight_names(module)):
        raise ValueError(_LAZY)
    weights = weights_of(module)
    if saved.kind != kind.float_kind.__name__ or [*saved.weights] != [weight.name for weight in weights]:
        raise ValueError(f"it was saved from another {saved.kind[:40]} than this {type(module).__name__}")
    owner = saved.tied or layer.name
    quantized = {weight.name: _read_weight(reader, owner, weight, saved) for weight in weights}
    grid = saved.grid()
    quantized_input = None if grid is None else _read_input(reader, layer, weights[0], grid)
    kind = packed_kind(kind) if packed else kind
    replacement = kind(
        module, quantized, saved.bits, saved.expand and not layer.reason_folded, quantized_input, saved.group
    )
    replacement.settings = saved.settings
    return replacement


def _read_weight(reader: Reader, layer: str, weight: Weight, saved: SavedLayer) -> QuantizedWeight:
    """Read a weight [O, C + n, ...], of which the model says everything but n <= C."""
    ints_name, scale_name, source_name = (full_name(layer, buffer) for buffer in weight_buffers(weight.name))
    groups, C = weight.groups, weight.channels
    copies = math.prod(reader.shape(source_name))
    if copies % groups or copies > weight.in_channels:
        raise ValueError(f"{source_name} has {copies} copies of {weight.in_channels} channels")
    shape = [weight.outputs, C + copies // groups, *weight.tensor.shape[2:]]
    if saved.weights[weight.name] != shape:
        raise ValueError(f"{weight.name} is {str(saved.weights[weight.name])[:80]}, the model needs {shape}")
    source = with_originals(reader.read(source_name, [copies], "I32").long(), groups, C)
    scale = reader.read(scale_name, _shape_of_scale(reader.shape(scale_name), shape, C, saved.group), "F32")
    ints = _read_integers(reader, ints_name, shape, saved.bits)
    problem = weight_problem((ints_name, scale_name, source_name), ints, scale, source, saved.bits, groups, C)
    if problem:
        raise ValueError(problem)
    device = _device_of(weight)
    return QuantizedWeight(ints.to(device), scale.to(device), source.to(device), scale)


def _shape_of_scale(found: list[int], ints: list[int], channels: int, group: int) -> list[int]:
    """Tell the shape that a scale must have, of which a file says only whether there is one for each output channel."""
    if group:
        return [ints[0], count_blocks(channels, ints[1] - channels, group)]
    return [ints[0]] if found else []


def _read_integers(reader: Reader, name: str, shape: list[int], bits: int) -> Tensor:
    """Read integers that are packed in so many bits each."""
    numel = math.prod(shape)
    packed = reader.read(name, [(numel * bits + 7) // 8], "U8")
    try:
        return torch.ops.ocs.unpack(packed, numel, bits).view(shape)
    except RuntimeError as error:
        raise ValueError(f"{name} is not of {bits}-bit integers") from error


def _read_input(reader: Reader, layer: Target, weight: Weight, grid: InputGrid) -> QuantizedInput:
    """Read how a layer quantizes its input, which this weight meets; the model says how many channels that has."""
    possible_splits = weight.channels if replacement_of(layer.module).splits_input else 0
    has_no_rows = grid.dynamic and weight.input_axis != -1
    if layer.reason_float_input or grid.splits > possible_splits or has_no_rows:
        raise ValueError(f"it was saved with an input of {grid}, which this layer cannot have")
    device, scale, source = _device_of(weight), None, None
    if grid.calibrated:
        scale = reader.read(full_name(layer.name, "input_scale"), [], "F32").to(device)
    if grid.split_once:
        copies = reader.read(full_name(layer.name, "input_source"), [weight.groups * grid.splits], "I32").long()
        source = with_originals(copies, weight.groups, weight.channels).to(device)
    problem = input_problem(scale, source, weight.groups, weight.channels)
    if problem:
        raise ValueError(problem)
    return QuantizedInput(grid, scale, source)


def _device_of(weight: Weight) -> torch.device | str:
    """Choose where a weight's integers go: to the device of the float one, or from meta to the CPU."""
    return "cpu" if weight.tensor.is_meta else weight.tensor.device


# --- What stays float -------------------------------------------------------------------------------------------------

Values = list[tuple[Tensor, Tensor]]  # what is copied into which tensor of the model


def plan_floats(reader: Reader, model: nn.Module, replacements: Mapping[int, nn.Module]) -> tuple[list[Slot], Values]:
    """Find what takes the place of meta tensors, and what is copied into others; the file has all and nothing else."""
    entries = entries_of(model, replacements)
    _check_names(reader, {entry.name for entry in entries})
    slots, values = [], []
    for entry in entries:
        old, new = entry.tensor, _read_float(reader, entry)
        if old.is_meta:
            new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            slots += [Slot(Place(table, key), new) for table, key in entry.places]
        else:
            values.append((old, new))
    return slots, values


def _check_names(reader: Reader, floats: set[str]) -> None:
    """Refuse a file that lacks a tensor of the model, or has one more."""
    expected = floats | reader.of_layers()
    for what, names in (("has no", expected - set(reader.sums)), ("has besides", set(reader.sums) - expected)):
        if names:
            raise ValueError(f"it was saved from another model: it {what} {', '.join(sorted(names)[:3])}")


def _read_float(reader: Reader, entry: Entry) -> Tensor:
    """Read a tensor in the dtype, on the device and in the memory format of the model's one; meta becomes CPU."""
    old = entry.tensor
    if nn.parameter.is_lazy(old):
        raise ValueError(f"{entry.name}: {_LAZY}")
    saved = reader.read(entry.name, list(old.shape))
    if saved.dtype != old.dtype and not (saved.is_floating_point() and old.is_floating_point()):
        raise ValueError(f"{entry.name} is {saved.dtype}, the model has {old.dtype}")
    return torch.empty_like(old, device="cpu" if old.is_meta else None).copy_(saved)
