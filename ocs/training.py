"""Training a model as the quantized model that it will be: outlier channel splitting during training.

The paper (section 6) names it as future work. `prepare` makes every layer that can be quantized compute with its
quantized weight, and with its quantized input where that is asked for, by the kernels that `ocs.quantize` uses;
gradients pass straight through to the float weights, which any optimizer trains. `convert` then puts the quantized
layers in place, whose outputs are the same bit for bit.

    import ocs.training

    ocs.training.prepare(model, wbits=2, r=0.05, clip="mse")  # before the optimizer is made
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    ...                                                       # train as ever
    report = ocs.training.convert(model)
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ocs.calibration.calibrate import Calibration
from ocs.calibration.run import Data
from ocs.errors import error_context
from ocs.formats.pretrained import refused_slots
from ocs.model.references import Place
from ocs.model.rewrite import NewEntry, Slot, exchange, for_a_while, keeps_grad_mode, module_slots
from ocs.model.targets import Target, find_targets
from ocs.model.wrappers import named_modules, unwrapped
from ocs.nn.input import ActScale
from ocs.nn.prepared import STEPS, Preparation, PreparedLayer, prepared_class, weight_sums
from ocs.nn.state import weight_buffers
from ocs.plan.call import explained_call
from ocs.plan.choose import choose
from ocs.plan.coverage import check_coverage
from ocs.plan.input_facts import InputFacts, learn
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import ActSelect, LayerOptions, Recipe, Request, Thresholds, TrainingOptions
from ocs.plan.quantize_layer import LayerQuantizer, LayerResult, WeightResult, check_range, quantize_layers
from ocs.plan.selectors import FIRST_LAYER, Selector
from ocs.quantization import report_of
from ocs.report.data import Report
from ocs.weight.arguments import check_flag
from ocs.weight.error import weight_error
from ocs.weight.types import Granularity, Quantization, Select, Split

__all__ = ["convert", "prepare"]

TrainedRounding = Literal["nearest", "squant"]


@explained_call
@keeps_grad_mode
def prepare(
    model: nn.Module,
    *,
    wbits: int = 8,
    r: float = 0.0,
    clip: str | float | None = None,
    granularity: Granularity | None = None,
    split: Split = "qa",
    rounding: TrainedRounding | None = None,
    abits: int | None = None,
    act_clip: str | float | None = None,
    act_r: float = 0.0,
    act_select: ActSelect | None = None,
    act_signed: bool | Literal["auto"] | None = None,
    act_scale: ActScale = "static",
    calibration: Data | Calibration | None = None,
    skip: Selector | Collection[Selector] | None = FIRST_LAYER,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    select: Select = "max",
    recipe: Recipe = "paper",
    thresholds: Thresholds = "learned",
    replan: int | None = 100,
    progress: bool | None = None,
) -> Report:
    """Let the layers of a model compute, in place, as they will once they are quantized, so that it is trained as such.

    The model is the same object, with the same parameters under the same names; so are its layers, whose classes
    change: `layer.weight` is then what the layer computes with, and the float weight is in model.parameters() and in
    the state. Give the optimizer model.parameters() after this call: where thresholds are learned, `scale` of each
    weight and `input_scale` of each quantized input are parameters, too. Any loop will do: autocast and a gradient
    scaler, DistributedDataParallel, torch.utils.checkpoint, torch.compile (which breaks the graph at each weight).
    A checkpoint is the model's state_dict; it resumes in a model that was prepared with the same options. Whatever
    fails, the model is as it was.

    BatchNorms train as ever, and are not folded. Embeddings, weights that are tied or standardized at every call, and
    what quantize cannot replace stay float; the report says why.

    Args:
        model: a float model, trained or not, on any device.
        wbits: 2 to 8, this and what is not explained here as of ocs.quantize.
        r: expand ratio in [0, 1]. Weights run folded.
        clip: where thresholds start and, where they are searched, what searches them. For 4 bits and fewer "mse" is a
            better start than the paper's "none".
        granularity: one scale per "tensor", or per output "channel".
        split: "qa", "naive" or "even".
        rounding: "nearest" or "squant".
        abits: 2 to 8 bits for the input of each layer; None keeps inputs float.
        act_clip: where thresholds of inputs start.
        act_r: expand ratio of the inputs.
        act_select: which channels of inputs are split; they stay as calibration chose them.
        act_signed: True, or "auto": unsigned where calibration saw nothing negative.
        act_scale: "static", or "dynamic": a scale for each row, which is never learned.
        calibration: what shows the inputs where abits is given.
        skip: what stays float.
        overrides: options by layer name or pattern.
        select: which channels of weights are split.
        recipe: what the options mean that are None.
        thresholds: "learned": the scale of each weight and input is trained by the gradient of LSQ (Esser et al., ICLR
            2020), times 1 / sqrt(N qmax), N the weights, or the features of one example, that share it. "searched":
            those of weights by `clip` whenever splits are planned, those of inputs by `calibration` once.
        replan: training steps (changes of a layer's weights between calls in train mode) after which its splits are
            planned anew; None keeps the first plan.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        The Report of the model as it would be quantized now, before training.

    Raises:
        ValueError: as ocs.quantize does; an override asks for what does not train (rounding="gptq", wbits="auto",
            correct_bias, Oracle OCS, hidden states that are quantized), or the model is prepared already.
        TypeError: as ocs.quantize does.
    """
    begin, request = time.perf_counter(), Request.of(locals())
    training = TrainingOptions(thresholds, replan)
    model = unwrapped(model)
    _check_fresh(model)
    plans, settings = choose(model, request)
    plans = [_trained(plan) for plan in plans]
    plans, facts, *_ = learn(model, plans, request.model)
    check_coverage(plans)
    with torch.inference_mode(False), torch.no_grad():
        results = quantize_layers(plans, facts, explain=False, progress=progress)
        made = [result for result in results if result.replacement is not None]
        slots = [slot for result in made for slot in _slots(result, facts[result.plan.name], training)]
    replacements = {id(result.plan.module): result.replacement for result in made}
    report = report_of(model, results, replacements, settings | vars(training))
    exchange(slots)
    return replace(report, seconds=time.perf_counter() - begin)


@keeps_grad_mode
def convert(model: nn.Module, *, expand: bool = False) -> Report:
    """Put quantized layers in the place of prepared ones, with their integers as they are now: ocs.quantize's layers.

    In eval mode the outputs are the same, bit for bit (without gradients: with them, torch takes other kernels for its
    encoder layers). Whatever fails, the model is as it was.

    Args:
        model: one that `prepare` prepared, trained or not.
        expand: True for layers that really have C + n channels: the same values to float rounding.

    Returns:
        A Report with a line for every weight, as of ocs.quantize; `clip` is "learned" where thresholds were.

    Raises:
        ValueError: no layer of the model is prepared, or weights or scales hold NaN or Inf.
        TypeError: the model is itself a prepared layer, which cannot replace itself in place.
    """
    begin, model = time.perf_counter(), unwrapped(model)
    check_flag("expand", expand)
    prepared = _prepared_layers(model)
    with torch.inference_mode(False), torch.no_grad():
        twins = {id(layer): layer.float_twin() for layer in prepared.values()}
        steps = [slot.step() for slot in module_slots(model, twins)]
        targets = for_a_while(steps, partial(find_targets, model))
        layers = {id(twins[id(layer)]): layer for layer in prepared.values()}
        results = [_converted(target, layers.get(id(target.module)), expand) for target in targets]
    of_twins = {id(result.plan.module): result.replacement for result in results if result.replacement is not None}
    report = for_a_while(steps, partial(report_of, model, results, of_twins, {"expand": expand}))
    replacements = {id(layers[twin]): replacement for twin, replacement in of_twins.items()}
    exchange([*module_slots(model, replacements), *refused_slots(model, replacements)])
    return replace(report, seconds=time.perf_counter() - begin)


# --- Preparing --------------------------------------------------------------------------------------------------------


def _check_fresh(model: Any) -> None:
    """Refuse a model that is prepared already."""
    modules = named_modules(model) if isinstance(model, nn.Module) else ()
    found = next((name for name, each in modules if isinstance(each, PreparedLayer)), None)
    if found is not None:
        raise ValueError(f"{found or 'model'}: prepared already; train it, then ocs.training.convert(model)")


_NOT_TRAINED = {
    "wbits": ("auto",),
    "granularity": ("group",),
    "rounding": ("gptq", "learned"),
    "correct_bias": (True,),
    "act_split": ("oracle",),
}


def _trained(plan: LayerPlan) -> LayerPlan:
    """Plan to train a layer, folded, or to leave it float where that cannot be; refuse options that do not train."""
    if not plan.quantized:
        return plan
    for name, refused in _NOT_TRAINED.items():
        if (value := getattr(plan.options, name)) in refused:
            raise ValueError(f"{plan.name}: {name}={value!r} is not for training: use ocs.quantize afterwards")
    if plan.rounds_rows and plan.kind.input_if_asked:
        raise ValueError(
            f"{plan.name}: act_scale='dynamic' quantizes hidden states, which is not for training: leave its abits None"
        )
    reason = _reason_not_trained(plan)
    return plan.left("float", reason) if reason else replace(plan, options=replace(plan.options, expand=False))


def _reason_not_trained(plan: LayerPlan) -> str:
    """Say why a layer that can be quantized cannot be trained as such, or ""."""
    module = plan.target.module
    if plan.target.permanent is not None:
        return "its weight is standardized at every call"
    if "forward" in vars(module):
        return f"this {type(module).__name__} has a forward on the instance, as wrappers give it"
    if getattr(module, "sparse", False):
        return "its gradients are sparse"
    if any(p is not None and p.is_inference() for p in module._parameters.values()):
        return "its parameters were made in inference mode, where nothing is trained"
    if hasattr(module, STEPS):
        return f"{type(module).__name__} has an attribute {STEPS}, a name that prepared layers use: rename it"
    return ""


def _slots(result: LayerResult, facts: InputFacts, training: TrainingOptions) -> Iterator[Slot | NewEntry]:
    """List what a layer must have, and the class that it must be of, to be trained as planned."""
    layer, plan, options, quantized = result.plan.target.module, result.plan, result.options, result.replacement
    learned = training.thresholds == "learned"
    scheme = LayerQuantizer(plan, facts).scheme_of_any(result.weights[0].name, options)
    preparation = Preparation(
        layer=plan.name,
        scheme=scheme,
        select=options.select,
        learned=learned,
        replan=training.replan,
        names=tuple(quantized.channels),
        input_grid=quantized.input_grid,
        options=options,
        input_range=quantized.input_range,
        output_range=quantized.output_range,
        overridden=plan.overridden,
    )
    scales = {weight_buffers(each.name)[1]: each.quantization.quantized.scale for each in result.weights}
    sources = {weight_buffers(each.name)[2]: each.quantization.quantized.source for each in result.weights}
    scale, source = (quantized._buffers.get(name) for name in ("input_scale", "input_source"))
    scales |= {"input_scale": scale} if scale is not None else {}
    sources |= {"input_source": source} if source is not None else {}
    trains = any(layer._parameters[name].requires_grad for name in preparation.parameters)
    for name, tensor in scales.items():
        if learned:
            yield NewEntry(layer._parameters, name, nn.Parameter(tensor.clone(), trains))
        else:
            yield NewEntry(layer._buffers, name, tensor.clone())
    device = next(iter(sources.values())).device
    for name, tensor in (*sources.items(), (STEPS, torch.zeros((), dtype=torch.int64, device=device))):
        yield NewEntry(layer._buffers, name, tensor.clone())
    yield NewEntry(vars(layer), "_preparation", preparation)
    yield NewEntry(vars(layer), "_seen", weight_sums(layer, preparation))
    yield Slot(Place(layer, "__class__", object.__setattr__, getattr), prepared_class(type(layer), plan.kind))


# --- Converting -------------------------------------------------------------------------------------------------------


def _prepared_layers(model: Any) -> dict[str, PreparedLayer]:
    """Find the prepared layers of a model by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, PreparedLayer):
        raise TypeError(
            f"model is a {type(model).__name__}, which cannot replace itself in place: give the whole model"
        )
    found = {name: each for name, each in named_modules(model) if isinstance(each, PreparedLayer)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no prepared layer: call ocs.training.prepare first")
    return found


def _converted(target: Target, layer: PreparedLayer | None, expand: bool) -> LayerResult:
    """Make the quantized layer of a prepared one; leave any other as it is."""
    if layer is None:
        options = LayerOptions()
        return LayerResult(LayerPlan(target, options).left("float", target.reason_float or "not prepared"), options)
    preparation = layer._preparation
    options = replace(preparation.options, expand=expand and not target.reason_folded)
    plan = LayerPlan(target, options, overridden=preparation.overridden)
    with error_context(target.name):
        weights = tuple(_weight(layer, name) for name in preparation.names)
        quantized = {each.name: each.quantization.quantized for each in weights}
        replacement = layer.kind(plan.module, quantized, options.wbits, options.expand, layer.quantized_input())
        replacement.settings = options.shown
        replacement.input_range, replacement.output_range = preparation.input_range, preparation.output_range
        check_range(replacement)
    return LayerResult(plan, options, replacement, weights)


def _weight(layer: PreparedLayer, name: str) -> WeightResult:
    """Quantize a weight as it is trained."""
    quantized, plan, w = layer.quantized(name), layer.split_plan(name), layer.part(name).weight.detach().float()
    groups, clip = layer._preparation.scheme.groups, layer._preparation.scheme.clip
    error = weight_error(w, quantized, groups)
    return WeightResult(name, plan, Quantization(quantized, "learned" if layer._preparation.learned else clip, error))
