"""What quantize_file() has to do, decided once: of a model that holds all but the weights of its layers."""

import copy
import ctypes
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ocs.formats.contents import Entry, entries_of, full_name
from ocs.formats.layout import Layout
from ocs.formats.source import Source, sources_of
from ocs.formats.storage import stored_layers
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.registry import is_quantizable
from ocs.nn.weights import is_weight
from ocs.plan.allocate import check_allocation
from ocs.plan.call import meant
from ocs.plan.choose import choose
from ocs.plan.coverage import check_coverage
from ocs.plan.input_facts import InputFacts, learn
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import ModelOptions, Request
from ocs.plan.quantize_layer import foretold
from ocs.quantization import quantize

CONFIG = "config.json"  # of transformers
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc
_WHOLE = ("calibration", "fold_bn", "equalize", "allocate", "budget")  # options that need all of a model at once


@dataclass(frozen=True)
class Unit:
    """What is made at once: layers of which no other has the weights, or tensors that stay float."""

    plans: tuple[LayerPlan, ...] = ()
    floats: tuple[Entry, ...] = ()

    @property
    def quantized(self) -> dict[int, nn.Parameter]:
        """Give the weights that are quantized, by id, each once."""
        found = [plan.like._parameters[name] for plan in self.plans for name in plan.kind.weight_names(plan.like)]
        return {id(parameter): parameter for parameter in found}

    @property
    def waiting(self) -> list[torch.Tensor]:
        """List the tensors that are still in files."""
        tensors = [*self.quantized.values(), *(entry.tensor for entry in self.floats)]
        return [tensor for tensor in tensors if tensor.is_meta]

    @property
    def size(self) -> int:
        """Count the numbers that are read."""
        return sum(tensor.numel() for tensor in self.waiting)


@dataclass(frozen=True)
class Job:
    """A model on the meta device, its files, and what is decided of each layer."""

    model: nn.Module
    source: Source
    of_file: dict[int, str]  # the names of tensors in the files, by id in the model
    plans: list[LayerPlan]
    facts: dict[str, InputFacts]
    units: list[Unit]
    layout: Layout
    request: Request
    settings: dict[str, Any]
    options: dict[str, Any]  # as the caller gave them

    @property
    def record(self) -> dict[str, Any]:
        """Say what is made of what, as JSON has it; what is unfinished of another record is of another result."""
        made = {
            "model": {"class": type(self.model).__name__},
            "files": self.source.stamp(),
            "options": self.settings,
            "layers": self.layout.header["layers"],
            "version": {"ocs": self.layout.header["ocs"]},
            "places": {name: place[:3] for name, place in self.layout.places.items()},
        }
        return json.loads(json.dumps(made, default=str))


def plan_job(model: Any, weights: Any, shard_size: Any, options: Mapping[str, Any]) -> Job:
    """Decide everything, of a model that holds what is no layer's weight."""
    request = _request(options)
    if type(shard_size) is not int or shard_size < 1:
        raise ValueError(f"shard_size={shard_size!r}: use a positive integer, bytes")
    model, source = _opened(model, weights)
    of_file = _filled(model, source)
    with _blocks_of_their_own():
        plans, settings = choose(model, request)
    _check_data_free(plans)
    check_allocation(plans, request.model)
    plans, facts, *_ = learn(model, plans, request.model)
    check_coverage(plans)
    units = _units(model, plans)
    layout = Layout(*_foretold(plans, units), shard_size)
    return Job(model, source, of_file, plans, facts, units, layout, request, settings, dict(options))


def _units(model: nn.Module, plans: Iterable[LayerPlan]) -> list[Unit]:
    """List what is to be done, tensors that stay float first."""
    by_name, of_layers = {plan.name: plan for plan in plans if plan.quantized}, []
    while by_name:
        plan = by_name.pop(next(iter(by_name)))
        tied = by_name.pop(plan.target.tied_to, None)
        of_layers.append(Unit((plan,) if tied is None else (plan, tied)))
    quantized = {tensor for unit in of_layers for tensor in unit.quantized}
    left = [entry for entry in entries_of(model, {}) if id(entry.tensor) not in quantized]
    held = tuple(entry for entry in left if not entry.tensor.is_meta)
    return [*([Unit(floats=held)] if held else []), *(Unit(floats=(e,)) for e in left if e.tensor.is_meta), *of_layers]


def _foretold(plans: Iterable[LayerPlan], units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tell what the files say of the layers, and which tensors they have, all of it but values."""
    layers = {plan.name: foretold(plan) for plan in plans if plan.quantized}
    for plan in plans:
        if plan.quantized and plan.target.tied_to and not plan.kind.opt_in:
            layers[plan.name].hold("weight", *layers[plan.target.tied_to].weight_state("weight"))
    packed, header = stored_layers(layers)
    floats = {entry.name: entry.tensor for unit in units for entry in unit.floats}
    return header, floats | packed


@contextmanager
def _blocks_of_their_own() -> Iterator[None]:
    """Let the C library give back each large block at once: small ones between those of a large graph would keep them.

    Afterwards it is as any process of torch's has it before long: blocks up to 32 MB stay for the next one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _request(options: Mapping[str, Any]) -> Request:
    names = [name for name in inspect.signature(quantize).parameters if name not in ("model", "progress")]
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        raise TypeError(f"quantize_file has no option {unknown!r}: {meant(unknown, names)}")
    for name in _WHOLE:
        default = getattr(ModelOptions, name)
        given = options.get(name, default)
        if given is not default and not (isinstance(given, str) and given == default):
            raise ValueError(
                f"{name}={str(given)[:60]} needs the whole model in memory, which quantize_file does not hold:"
                f" leave {name} out, or use ocs.quantize and ocs.save"
            )
    return Request.of(options)


def _check_data_free(plans: Iterable[LayerPlan]) -> None:
    """Refuse what needs inputs, or all layers at once; and rules of the caller's own, by which nothing can go on."""
    for plan in plans:
        options = plan.options
        needs = {
            f"abits={options.abits} with act_scale={options.act_scale!r}": plan.needs_statistics,
            f"rounding={options.rounding!r}": plan.quantized and options.compensated,
            "correct_bias=True": plan.needs_mean,
            'wbits="auto"': plan.quantized and options.automatic,
            "a function as select": plan.quantized and callable(options.select),
        }
        for what, asked in needs.items():
            if asked:
                raise ValueError(
                    f"{plan.name}: {what} is not for quantize_file, which sees no inputs and one layer at a time: leave"
                    " it (abits: act_scale='dynamic' needs no inputs), or use ocs.quantize and ocs.save"
                )


def _opened(model: Any, weights: Any) -> tuple[nn.Module, Source]:
    """Make the model on the meta device, one of our own, and open its files."""
    if isinstance(model, nn.Module):
        if weights is None:
            raise TypeError("quantize_file(model, out, weights=...): say where the weights are, a folder or a file")
        return copy.deepcopy(unwrapped(model)), Source(weights)
    if weights is not None:
        raise TypeError(f"weights={str(weights)!r} is for a model that is an nn.Module: a folder brings its own")
    source = Source(model)
    if not (source.path / CONFIG).is_file():
        raise ValueError(f"{model}: it has no config.json, which says what model it is: give that, and weights=")
    from ocs.hf import on_meta

    return on_meta(source.path, next((each for each in source.dtypes.values() if each.is_floating_point), None)), source


def _filled(model: nn.Module, source: Source) -> dict[int, str]:
    """Read all that is no weight of a layer; give the names of tensors in the files by their id in the model."""
    entries, names = entries_of(model, {}), _every_name(model)
    found = sources_of(source, {entry.name: names[id(entry.tensor)] for entry in entries}, entries, model)
    waits = _weights_of_layers(model)
    of_file = {}
    for entry in entries:
        tensor, name = entry.tensor, found[entry.name]
        if id(tensor) not in waits:
            new = source.read(name, tensor.dtype)
            tensor = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            for table, key in entry.places:
                table[key] = tensor
        elif not tensor.is_meta:
            raise ValueError(f"{entry.name}: it holds values: build the model on the meta device, torch.device('meta')")
        of_file[id(tensor)] = name
    return of_file


def _every_name(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for prefix, module in named_modules(model, every_name=True):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    names.setdefault(id(tensor), []).append(full_name(prefix, key))
    return names


def _weights_of_layers(model: nn.Module) -> set[int]:
    """Tell the parameters that are large, by id; all others may say what inputs of layers look like."""
    layers = [module for _, module in named_modules(model) if is_quantizable(module)]
    return {id(parameter) for layer in layers for parameter in layer._parameters.values() if is_weight(parameter)}
