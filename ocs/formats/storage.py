"""Save and load quantized models: one safetensors file, the integers in as many bits as they have.

A file holds, under the names of the model's state_dict, every parameter and persistent buffer as it is, except that of
each quantized weight there are `weight_int` (uint8: the k-bit codes of its integers [O, C + n, ...], see csrc/pack.c),
`scale` and `source` (int32: the original channel of each copy, group by group; the original channels go without
saying), and likewise `input_scale` and `input_source` of a quantized input. Its metadata has, under "ocs", what a
reader needs as JSON: the format and the version that wrote it; of each layer the kind, the settings and the shapes;
which batch norms were folded; of each tensor a CRC-32. And under "crc32" that of this JSON.

Nothing in a file is trusted: the model decides which layers and shapes there may be.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocs.errors import error_context
from ocs.model.batchnorm_folding import FoldedBatchNorm, with_parameters
from ocs.model.rewrite import Slot, exchange, module_slots
from ocs.model.targets import Target, find_targets
from ocs.nn.base import (
    INPUT_NAMES,
    QuantizedLayer,
    input_names,
    problem_of,
    problem_of_input,
    state_names,
    with_originals,
)
from ocs.nn.convolution import CONVOLUTIONS
from ocs.nn.input import InputGrid, QuantizedInput, check_grid
from ocs.nn.registry import replacement_of
from ocs.nn.weights import input_weight
from ocs.progress import with_progress
from ocs.weight.types import QuantizedWeight

FORMAT = 2  # 1 had neither quantized inputs nor folded batch norms


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("files need safetensors: pip install torch-ocs[files]") from None
    return safetensors


# --- What a model holds -----------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    """A parameter or persistent buffer: its first name in the model, and every place where it stands."""

    name: str
    tensor: Tensor
    places: list[tuple[dict[str, Any], str]]


def _entries(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[_Entry]:
    """All but what quantized weights hold, as if the replacements (by id of the old module) were in place."""
    found: dict[int, _Entry] = {}
    for prefix, old in model.named_modules():
        module = replacements.get(id(old), old)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{prefix or 'model'}: it has extra state, which a file of tensors cannot hold")
        held = set()
        if isinstance(module, QuantizedLayer):
            held = {*INPUT_NAMES, *(buffer for weight in module.channels for buffer in state_names(weight))}
        for where in (module._parameters, module._buffers):
            for key, tensor in where.items():
                if tensor is not None and key not in held and key not in module._non_persistent_buffers_set:
                    entry = found.setdefault(id(tensor), _Entry(_full(prefix, key), tensor, []))
                    entry.places.append((where, key))
    return list(found.values())


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else 0


# --- Save -------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str], *, progress: bool | None = None) -> None:
    """Write a quantized model to a safetensors file, k bits for an integer of k bits.

    It is written beside `path` and renamed when complete, so that what was there survives an interruption.

    Args:
        model: with layers that ocs.quantize made, on any device; everything else in it is saved as it is.
        path: any name; ".safetensors" is customary.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Raises:
        OSError: it cannot be written there.
        ValueError: nothing in the model is quantized, or it holds what a file of tensors cannot: extra state, sparse
            tensors, parameters without values.
    """
    _check_module(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer: call ocs.quantize first, or use torch.save")
    if "" in layers:
        raise ValueError(f"model is itself a {type(model).__name__}, which ocs.load could not put in place: wrap it")
    tensors = {entry.name: _as_stored(entry) for entry in _entries(model, {})}
    for name, layer in with_progress(layers.items(), "save", progress):
        tensors.update(_packed(name, layer))
    header = {
        "format": FORMAT,
        "ocs": _version(),
        "layers": {name: _describe(layer) for name, layer in layers.items()},
        "batch_norms": [name for name, module in model.named_modules() if isinstance(module, FoldedBatchNorm)],
        "tensors": {name: _crc32(tensor) for name, tensor in tensors.items()},
    }
    _write(tensors, json.dumps(header), path)


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")


def _write(tensors: dict[str, Tensor], header: str, path: str | os.PathLike[str]) -> None:
    """All of the file under another name, which then becomes its own."""
    safetensors = _safetensors()
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {target.parent}")
    if target.is_dir():
        raise IsADirectoryError(f"{path}: it is a folder")
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.{threading.get_ident()}.partial")
    metadata = {"ocs": header, "crc32": str(zlib.crc32(header.encode()))}
    try:
        partial.touch()
        mode = (target if target.exists() else partial).stat().st_mode  # safetensors would make it private
        safetensors.torch.save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: it cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _version() -> str:
    from ocs import __version__

    return __version__


def _as_stored(entry: _Entry) -> Tensor:
    """On the CPU, in memory of its own."""
    tensor = entry.tensor
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise ValueError(f"{entry.name}: it holds no values yet")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{entry.name}: it is {kind}, which a safetensors file cannot hold")
    try:
        _safetensors().torch.save({"": tensor.new_empty(0, device="cpu")})
    except KeyError:
        raise ValueError(f"{entry.name}: it is {tensor.dtype}, which a safetensors file cannot hold") from None
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _packed(name: str, layer: QuantizedLayer) -> Iterator[tuple[str, Tensor]]:
    for weight in layer.channels:
        ints_name, scale_name, source_name = (_full(name, buffer) for buffer in state_names(weight))
        ints, scale, _ = (tensor.cpu() for tensor in layer.held(weight))
        yield ints_name, torch.ops.ocs.pack(ints, layer.bits)
        yield scale_name, scale.clone()
        yield source_name, layer.copies(weight).to("cpu", torch.int32, copy=True)
    for buffer in input_names(layer.input_grid):
        tensor = layer.input_copies().int() if buffer == "input_source" else layer._buffers[buffer]
        yield _full(name, buffer), tensor.to("cpu", copy=True)


def _describe(layer: QuantizedLayer) -> dict[str, Any]:
    return {
        "kind": layer.float_kind.__name__,
        "bits": layer.bits,
        "expand": layer.expand,
        "settings": layer.settings,
        "input": layer.input_grid and asdict(layer.input_grid),
        "weights": {name: list(layer.held(name)[0].shape) for name in layer.channels},
    }


# --- Load -------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], model: nn.Module, *, progress: bool | None = None) -> nn.Module:
    """Turn a float model into the quantized one that was saved to `path`, in place, and return it.

    Args:
        path: a file that ocs.save wrote.
        model: the float architecture; its weights may be random, or on the meta device. Parameters keep their dtype and
            device, quantized layers those of the layer that they replace; meta tensors become CPU tensors, but for
            non-persistent buffers, which no file holds.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Raises:
        OSError: there is no such file.
        ValueError: the file is damaged, was not written by ocs.save or by a newer version of it, or does not fit the
            model. The model is then as it was.
    """
    safetensors = _safetensors()
    _check_module(model)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: it is a folder")
    with error_context(str(path)), torch.inference_mode(False), torch.no_grad():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                reader = _Reader(file)
                folded = _folded(reader, model)
                replacements = folded | _replacements(reader, model, folded, progress)
                slots, values = _plan_floats(reader, model, replacements)
        except safetensors.SafetensorError as error:
            raise ValueError(f"it is no complete safetensors file ({error})") from error
        _commit([*slots, *module_slots(model, replacements)], values)
    return model


@dataclass(frozen=True)
class _SavedLayer:
    kind: str
    bits: int
    expand: bool
    settings: dict[str, Any]
    weights: dict[str, list[int]]  # the shapes of the integers
    input: dict[str, Any] | None = None  # of an InputGrid

    def __post_init__(self) -> None:
        types = (str, int, bool, dict, dict)
        if tuple(map(type, vars(self).values()))[:5] != types or not 2 <= self.bits <= 8:
            raise TypeError

    def grid(self) -> InputGrid | None:
        """How the input is quantized, None where it is not; a ValueError where it cannot be so."""
        if self.input is None:
            return None
        try:
            grid = InputGrid(**self.input)
            check_grid(grid)
        except (TypeError, ValueError) as error:
            raise ValueError(f"its input is described wrongly ({str(error)[:200]})") from error
        return grid


class _Reader:
    """An open file, every part of which is checked before it is used."""

    def __init__(self, file: Any) -> None:
        self.file = file
        metadata = file.metadata() or {}
        if "ocs" not in metadata:
            raise ValueError("it was not written by ocs.save")
        try:
            header = json.loads(metadata["ocs"])
            if type(header["format"]) is not int or header["format"] < 1:
                raise KeyError("format")
            if header["format"] > FORMAT:
                version, number = str(header["ocs"])[:20], str(header["format"])[:20]
                raise ValueError(f"ocs {version} wrote it in format {number}, newer than {FORMAT}: upgrade torch-ocs")
            if metadata["crc32"] != str(zlib.crc32(metadata["ocs"].encode())):
                raise KeyError("crc32")
            self.layers = {name: _SavedLayer(**saved) for name, saved in header["layers"].items()}
            self.batch_norms = header.get("batch_norms", [])
            self.sums = header["tensors"]
            if {type(self.batch_norms), *map(type, self.batch_norms)} - {list, str}:
                raise TypeError
            if {*map(type, self.sums.values())} - {int}:
                raise TypeError
        except (LookupError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError("its header is damaged") from error
        if set(self.sums) != set(file.keys()):
            raise ValueError("its header is damaged")

    def shape(self, name: str) -> list[int]:
        """Of a tensor that is not read yet."""
        if name not in self.sums:
            raise ValueError(f"it has no {name}")
        return self.file.get_slice(name).get_shape()

    def read(self, name: str, shape: list[int], dtype: str | None = None) -> Tensor:
        """A tensor of just this shape (and safetensors dtype)."""
        found = self.shape(name)
        if found != shape:
            raise ValueError(f"{name} is {found}, the model needs {shape}")
        if dtype not in (None, self.file.get_slice(name).get_dtype()):
            raise ValueError(f"{name} is not {dtype}")
        tensor = self.file.get_tensor(name).clone()  # not a window on a file that may change
        if _crc32(tensor) != self.sums[name]:
            raise ValueError(f"{name} is damaged")
        return tensor


def _folded(reader: _Reader, model: nn.Module) -> dict[int, nn.Module]:
    """What stands for the batch norms that were folded, and for layers that got a bias so, by id of the old modules."""
    modules = dict(model.named_modules())
    replacements: dict[int, nn.Module] = {}
    for name in reader.batch_norms:
        if not isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"it was saved from another model: this one has no batch norm {name[:200]!r} to fold")
        replacements[id(modules[name])] = FoldedBatchNorm()
    for name, module in modules.items():
        gains = replacements and isinstance(module, CONVOLUTIONS)
        gains = gains or (name in reader.layers and reader.layers[name].settings.get("correct_bias") is True)
        gains = gains and isinstance(module, (nn.Linear, *CONVOLUTIONS)) and module.bias is None
        if gains and _full(name, "bias") in reader.sums:
            replacements[id(module)] = _with_bias(module)
    return replacements


def _with_bias(layer: nn.Module) -> nn.Module:
    """A copy of the layer that shares all but a bias of its own, still without values."""
    device = "cpu" if layer.weight.is_meta else layer.weight.device
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    bias = torch.zeros(outputs, dtype=layer.weight.dtype, device=device)
    return with_parameters(layer, bias=nn.Parameter(bias, layer.weight.requires_grad))


def _replacements(
    reader: _Reader, model: nn.Module, folded: Mapping[int, nn.Module], progress: bool | None
) -> dict[int, QuantizedLayer]:
    """The quantized layers of the file, by id of the float ones."""
    layers = {layer.name: layer for layer in find_targets(model)}
    replacements = {}
    for name, saved in with_progress(reader.layers.items(), "load", progress):
        if name not in layers or not name:
            raise ValueError(f"it was saved from another model: this one has no layer {name[:200]!r} to replace")
        old = layers[name].module
        with error_context(name):
            layer = replace(layers[name], module=folded.get(id(old), old))
            replacements[id(old)] = _rebuilt(reader, layer, saved)
    return replacements


def _rebuilt(reader: _Reader, layer: Target, saved: _SavedLayer) -> QuantizedLayer:
    module = layer.module
    if layer.reason_float:
        raise ValueError(f"it was saved quantized, but {layer.reason_float}")
    kind = replacement_of(module)
    if saved.kind != kind.float_kind.__name__ or list(saved.weights) != list(kind.weight_names(module)):
        raise ValueError(f"it was saved from another {saved.kind[:40]} than this {type(module).__name__}")
    quantized = {weight: _read_weight(reader, layer, weight, saved) for weight in saved.weights}
    grid = saved.grid()
    quantized_input = None if grid is None else _read_input(reader, layer, grid)
    replacement = kind(module, quantized, saved.bits, saved.expand and not layer.reason_folded, quantized_input)
    replacement.settings = saved.settings
    return replacement


def _read_weight(reader: _Reader, layer: Target, weight: str, saved: _SavedLayer) -> QuantizedWeight:
    """A weight [O, C + n, ...], of which the model says everything but n <= C."""
    float_weight, groups = layer.module._parameters[weight], getattr(layer.module, "groups", 1)
    if nn.parameter.is_lazy(float_weight):
        raise ValueError("run a batch through the model first, so that its lazy layers have shapes")
    outputs, C, *filters = replacement_of(layer.module).layout(float_weight, groups).shape
    ints_name, scale_name, source_name = (_full(layer.name, buffer) for buffer in state_names(weight))
    copies = math.prod(reader.shape(source_name))
    if copies % groups or copies > groups * C:
        raise ValueError(f"{source_name} has {copies} copies of {groups * C} channels")
    shape = [outputs, C + copies // groups, *filters]
    if saved.weights[weight] != shape:
        raise ValueError(f"{weight} is {str(saved.weights[weight])[:80]}, the model needs {shape}")
    source = with_originals(reader.read(source_name, [copies], "I32").long(), groups, C)
    scale = reader.read(scale_name, [outputs] if reader.shape(scale_name) else [], "F32")
    numel = math.prod(shape)
    packed = reader.read(ints_name, [(numel * saved.bits + 7) // 8], "U8")
    try:
        ints = torch.ops.ocs.unpack(packed, numel, saved.bits).view(shape)
    except RuntimeError as error:
        raise ValueError(f"{ints_name} is not of {saved.bits}-bit integers") from error
    problem = problem_of((ints_name, scale_name, source_name), ints, scale, source, saved.bits, groups, C)
    if problem:
        raise ValueError(problem)
    device = "cpu" if float_weight.is_meta else float_weight.device
    return QuantizedWeight(ints.to(device), scale.to(device), source.to(device), scale)


def _read_input(reader: _Reader, layer: Target, grid: InputGrid) -> QuantizedInput:
    """How a layer quantizes its input; the model says how many channels that has."""
    kind, (_, weight, groups) = replacement_of(layer.module), input_weight(layer.module)
    C = weight.shape[1]
    if layer.reason_float_input or grid.splits > C * kind.splits_input:
        raise ValueError(f"it was saved with an input of {grid}, which this layer cannot have")
    if grid.oracle:
        return QuantizedInput(grid)
    scale, source = reader.read(_full(layer.name, "input_scale"), [], "F32"), None
    if grid.splits:
        copies = reader.read(_full(layer.name, "input_source"), [groups * grid.splits], "I32").long()
        source = with_originals(copies, groups, C)
    problem = problem_of_input(scale, source, groups, C)
    if problem:
        raise ValueError(problem)
    device = "cpu" if weight.is_meta else weight.device
    return QuantizedInput(grid, scale.to(device), source if source is None else source.to(device))


Values = list[tuple[Tensor, Tensor]]  # what is copied into which tensor of the model


def _plan_floats(
    reader: _Reader, model: nn.Module, replacements: Mapping[int, QuantizedLayer]
) -> tuple[list[Slot], Values]:
    """What takes the place of meta tensors, and what is copied into the others; the file has all, and nothing else."""
    entries = _entries(model, replacements)
    expected = {entry.name for entry in entries}
    for name, saved in reader.layers.items():
        expected |= {_full(name, buffer) for weight in saved.weights for buffer in state_names(weight)}
        expected |= {_full(name, buffer) for buffer in input_names(saved.grid())}
    for what, names in (("has no", expected - set(reader.sums)), ("has besides", set(reader.sums) - expected)):
        if names:
            raise ValueError(f"it was saved from another model: it {what} {', '.join(sorted(names)[:3])}")
    slots, values = [], []
    for entry in entries:
        old = entry.tensor
        if nn.parameter.is_lazy(old):
            raise ValueError(f"{entry.name}: run a batch through the model first, so that its lazy layers have shapes")
        saved = reader.read(entry.name, list(old.shape))
        if saved.dtype != old.dtype and not (saved.is_floating_point() and old.is_floating_point()):
            raise ValueError(f"{entry.name} is {saved.dtype}, the model has {old.dtype}")
        new = torch.empty_like(old, device="cpu" if old.is_meta else None).copy_(saved)
        if old.is_meta:
            new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            slots += [(where, key, new) for where, key in entry.places]
        else:
            values.append((old, new))
    return slots, values


def _commit(slots: list[Slot], values: Values) -> None:
    """All of it or, if anything fails, nothing."""
    before: Values = []
    try:
        for old, new in values:
            before.append((old, old.clone()))
            old.copy_(new)
        exchange(slots)
    except BaseException:
        for old, value in before:
            old.copy_(value)
        raise
