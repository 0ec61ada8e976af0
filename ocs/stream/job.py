"""What quantize_file() has to do, decided once: of a model that holds all but the weights of its layers."""

import copy
import ctypes
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ocs.calibration.calibrate import Calibration
from ocs.calibration.ranks import rank_count
from ocs.errors import check_path
from ocs.formats.contents import Entry, entries_of, full_name
from ocs.formats.layout import Layout
from ocs.formats.source import Source, sources_of
from ocs.formats.storage import stored_layers, version
from ocs.model.rewrite import for_a_while
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.base import QuantizedLayer
from ocs.nn.registry import is_quantizable
from ocs.nn.weights import is_weight
from ocs.plan.allocate import check_allocation
from ocs.plan.call import meant
from ocs.plan.choose import choose
from ocs.plan.coverage import check_coverage
from ocs.plan.input_facts import InputFacts
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import ModelOptions, Request
from ocs.plan.quantize_layer import choose_input, foretold
from ocs.quantization import quantize
from ocs.stream.file_weights import FileWeights
from ocs.stream.observed import Observed

CONFIG = "config.json"  # of transformers
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc
_WHOLE = ("fold_bn", "equalize", "allocate", "budget")  # options that need all of a model at once


@dataclass(frozen=True)
class Unit:
    """What is made at once: layers of which no other has the weights, or tensors that stay float."""

    plans: tuple[LayerPlan, ...] = ()
    floats: tuple[Entry, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)  # that layers get anew: their names, and the layers'

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
class Opened:
    """A model on the meta device, its files, and what is asked of each layer."""

    model: nn.Module
    source: Source
    of_file: dict[int, str]  # the names of tensors in the files, by id in the model
    plans: list[LayerPlan]
    request: Request
    settings: dict[str, Any]
    options: dict[str, Any]  # as the caller gave them, but for calibration
    shard_size: int

    @property
    def record(self) -> dict[str, Any]:
        """Say what is made of what, as JSON has it; what is unfinished of another record is of another result."""
        calibrated = self.request.model.calibration is not None
        made = {
            "model": {"class": type(self.model).__name__},
            "files": self.source.stamp(),
            "options": self.settings,
            "calibration": {"ranks": rank_count() if calibrated else 0},
            "version": {"ocs": version()},
        }
        return json.loads(json.dumps(made, default=str))


@dataclass(frozen=True)
class Job(Opened):
    """What is decided of each layer, once all that has to be known of its inputs is."""

    facts: dict[str, InputFacts]
    units: list[Unit]
    layout: Layout

    @property
    def record(self) -> dict[str, Any]:
        """Say what is made of what, and where it is written."""
        places = {name: list(place[:3]) for name, place in self.layout.places.items()}
        return super().record | {"layers": json.loads(json.dumps(self.layout.header["layers"])), "places": places}


def weights_in_files(opened: Opened) -> FileWeights:
    """Let operations find the weights of a model in its files, in their order there, by which they are read ahead."""
    waiting = [entry.tensor for entry in entries_of(opened.model, {}) if entry.tensor.is_meta]
    following = {id(weight): after for weight, after in pairwise(waiting)}

    def read(weight: torch.Tensor) -> torch.Tensor:
        if id(weight) in following:
            opened.source.expect(opened.of_file[id(following[id(weight)])])
        return opened.source.read(opened.of_file[id(weight)], weight.dtype)

    return FileWeights(waiting, read)


def check_values(opened: Opened) -> None:
    """Refuse a model that cannot run, as something has values neither in it nor in the files."""
    if any(kind.__name__ == "PreTrainedModel" for kind in type(opened.model).__mro__):
        from ocs.hf import compute_buffers

        compute_buffers(opened.model)
    for prefix, module in named_modules(opened.model):
        for key, each in module._buffers.items():
            if each is not None and each.is_meta and id(each) not in opened.of_file:
                raise ValueError(
                    f"{full_name(prefix, key)}: calibration runs the model, where this has no values: it is on the meta"
                    " device, and in no file. Give it those that it has where the model is built without meta"
                )


def open_job(model: Any, out: Any, weights: Any, shard_size: Any, options: Mapping[str, Any]) -> Opened:
    """Choose what is done, of a model that holds what is no layer's weight."""
    request = _request(options)
    if type(shard_size) is not int or shard_size < 1:
        raise ValueError(f"shard_size={shard_size!r}: use a positive integer, bytes")
    check_path("out", out)
    model, source = _opened(model, weights)
    of_file = _filled(model, source)
    with blocks_of_their_own():
        plans, settings = choose(model, request)
    _check_plans(plans)
    check_allocation(plans, request.model)
    given = {name: value for name, value in options.items() if name != "calibration"}
    return Opened(model, source, of_file, plans, request, settings, given, shard_size)


def plan_job(opened: Opened, plans: list[LayerPlan], facts: dict[str, InputFacts], observed: Observed) -> Job:
    """Decide everything."""
    check_coverage(plans)
    layers = {plan.name: _foretold(plan, facts[plan.name], observed) for plan in plans if plan.quantized}
    units = _units(opened.model, plans, layers)
    layout = Layout(*_contents(plans, layers, units), opened.shard_size)
    return Job(**{**vars(opened), "plans": plans}, facts=facts, units=units, layout=layout)


def _foretold(plan: LayerPlan, facts: InputFacts, observed: Observed) -> QuantizedLayer:
    """Make what will replace a layer, all of it but the values of its weights."""
    if not plan.quantizes_input:
        return foretold(plan, facts, None)
    choose = partial(choose_input, plan, facts.statistics)
    if plan.options.act_select == "error":  # looks at the weights
        choose = partial(for_a_while, observed.weights.steps(), choose)
    return foretold(plan, facts, observed.with_values((plan.name,), choose))


def _units(model: nn.Module, plans: Iterable[LayerPlan], layers: Mapping[str, QuantizedLayer]) -> list[Unit]:
    """List what is to be done, tensors that stay float first."""
    by_name, of_layers = {plan.name: plan for plan in plans if plan.quantized}, []
    replacements = {id(plan.target.module): layers[plan.name] for plan in plans if plan.quantized}
    left = {id(entry.tensor): entry for entry in entries_of(model, replacements)}
    while by_name:
        plan = by_name.pop(next(iter(by_name)))
        tied = by_name.pop(plan.target.tied_to, None)
        both = (plan,) if tied is None else (plan, tied)
        new = {each.name: bias for each in both if (bias := _new_bias(layers[each.name])) is not None}
        of_layers.append(Unit(both, biases={left.pop(id(bias)).name: name for name, bias in new.items()}))
    held = tuple(entry for entry in left.values() if not entry.tensor.is_meta)
    waiting = (Unit(floats=(entry,)) for entry in left.values() if entry.tensor.is_meta)
    return [*([Unit(floats=held)] if held else []), *waiting, *of_layers]


def _new_bias(layer: QuantizedLayer) -> nn.Parameter | None:
    """Give the bias that a layer gets in place of its own, still without values; None where it keeps that."""
    bias = layer._parameters.get("bias")
    return bias if bias is not None and bias.is_meta else None


def _contents(
    plans: Iterable[LayerPlan], layers: Mapping[str, QuantizedLayer], units: Iterable[Unit]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Tell what the files say of the layers, and which tensors they have, all of it but values."""
    for plan in plans:
        if plan.quantized and plan.target.tied_to and not plan.kind.opt_in:
            layers[plan.name].hold("weight", *layers[plan.target.tied_to].weight_state("weight"))
    packed, header = stored_layers(layers)
    floats = {entry.name: entry.tensor for unit in units for entry in unit.floats}
    biases = {name: layers[layer].bias for unit in units for name, layer in unit.biases.items()}
    return header, floats | biases | packed


@contextmanager
def blocks_of_their_own() -> Iterator[None]:
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
    if isinstance(options.get("calibration"), Calibration):
        raise TypeError(
            "calibration is an ocs.Calibration: give quantize_file the batches, which it runs through files"
        )
    return Request.of(options)


def _check_plans(plans: Iterable[LayerPlan]) -> None:
    """Refuse what needs all layers at once, and rules of the caller's own, by which nothing can go on."""
    for plan in plans:
        needs = {
            "rounding='learned'": plan.options.learned,
            'wbits="auto"': plan.options.automatic,
            "a function as select": callable(plan.options.select),
        }
        for what, asked in needs.items():
            if asked and plan.quantized:
                raise ValueError(
                    f"{plan.name}: {what} is not for quantize_file, which holds one layer at a time: leave it"
                    " (rounding: 'gptq' takes calibration here), or use ocs.quantize and ocs.save"
                )


def _opened(model: Any, weights: Any) -> tuple[nn.Module, Source]:
    """Make the model on the meta device, one of our own, and open its files."""
    if isinstance(model, nn.Module):
        if weights is None:
            raise TypeError("quantize_file(model, out, weights=...): say where the weights are, a folder or a file")
        check_path("weights", weights)
        return copy.deepcopy(unwrapped(model)), Source(weights)
    if weights is not None:
        raise TypeError(f"weights={str(weights)!r} is for a model that is an nn.Module: a folder brings its own")
    check_path("model", model)
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
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]
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
