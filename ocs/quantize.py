"""quantize(): plan every layer of a model, then rewrite it in place, all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ocs import functional
from ocs.activation import ActSplit, InputGrid, QuantizedInput
from ocs.allocate import Allocate, Measured, Splits, allocate_bits, allocate_splits, check_allocation, mean_bits
from ocs.batchnorm import Folding, plan_folding
from ocs.calibrate import Calibration, Data, Statistics, observe, reached, statistics_for, with_sample
from ocs.find import (
    FIRST_LAYER,
    Layer,
    Options,
    Selector,
    apply_skip,
    check_lazy,
    check_model,
    find_layers,
    first_weight,
    is_kind,
    named,
    options_for,
    replacement_of,
    selectors,
    show,
)
from ocs.functional import Granularity, Quantization, Rounding, Select, Split, SplitPlan
from ocs.layer import QuantizedLayer, with_originals
from ocs.progress import with_progress
from ocs.report import LayerReport, Report
from ocs.rewrite import exchange, module_slots
from ocs.sensitivity import sensitivities

# --- One layer --------------------------------------------------------------------------------------------------------


def quantize_layer(
    layer: Layer, options: Options, statistics: Statistics | None = None, splits: Mapping[str, int] | None = None
) -> tuple[QuantizedLayer, list[LayerReport]]:
    """The layer that replaces this one, and a line of the report for each of its weights.

    statistics: of its input, where that is to be quantized with a scale of its own. splits: of each weight, in each
    group, instead of what options.r says.
    """
    module, kind = layer.module, replacement_of(layer.module)
    if layer.only_folded:
        options = replace(options, expand=False)
    steps = {}
    for name in kind.weight_names(module):
        with named(*[name] * (name != "weight")):
            steps[name] = _quantize_weight(layer, name, options, (splits or {}).get(name))
    quantized = {name: step.quantized for name, (_, step) in steps.items()}
    quantized_input = quantize_input(layer, options, statistics) if wants_input(layer, options) else None
    replacement = kind(module, quantized, options.wbits, options.expand, quantized_input)
    replacement.settings = options.shown
    return replacement, [_report_weight(layer, options, replacement, name, *step) for name, step in steps.items()]


def _quantize_weight(
    layer: Layer, name: str, options: Options, splits: int | None = None
) -> tuple[SplitPlan, Quantization]:
    """The plan of a weight, its integers, and their signal and noise."""
    w, groups = _weight_of(layer, name)
    how = (options.wbits, options.clip, options.granularity, options.split, options.rounding)
    if splits is None:
        splits = functional.splits_for(options.r, w.shape[1], groups)
    plan = functional.choose_splits(w, splits, groups, options.select, *how)
    return plan, functional.quantize_plan(w, plan, *how, groups)


def _weight_of(layer: Layer, name: str) -> tuple[Tensor, int]:
    """A weight as float32 [O, C, ...], and its groups."""
    weight, groups = layer.module._parameters[name], getattr(layer.module, "groups", 1)
    check_lazy(weight)
    return replacement_of(layer.module).layout(weight.detach(), groups).float().contiguous(), groups


def measure(layer: Layer, name: str, options: Options, splits: int | None = None) -> Measured:
    """What a weight takes and what error is left when it is quantized so."""
    plan, step = _quantize_weight(layer, name, options, splits)
    w, groups = _weight_of(layer, name)
    before, after = (max(each.tolist(), default=0.0) for each in (plan.channel_max, plan.split_max))
    return Measured(
        _packed_bytes(
            step, options.wbits, plan.source.numel() - plan.channel_max.numel(), _numbers_of_input(layer, options)
        ),
        functional.remaining_error(w, step, options.rounding, groups),
        after / before if before else 0.0,
    )


def _packed_bytes(step: Quantization, bits: int, copies: int, others: int) -> int:
    """Of the integers, the scales, the sources of copies, and other numbers of four bytes."""
    return math.ceil(step.quantized.ints.numel() * bits / 8) + 4 * (step.quantized.scale.numel() + copies + others)


def _numbers_of_input(layer: Layer, options: Options) -> int:
    """How many there are of a quantized input: its scale, and the sources of its copies."""
    if not wants_input(layer, options) or options.act_split == "oracle":
        return 0
    _, groups, C = first_weight(layer.module)
    splits = functional.splits_for(options.act_r, C, groups) if replacement_of(layer.module).splits_input else 0
    return 1 + groups * splits


def _probe(layer: Layer, options: Options, bits: int) -> tuple[QuantizedLayer, float]:
    """The layer with its weights quantized, to so many bits where they are still to be chosen, and their error."""
    options = replace(options, wbits=bits if options.automatic else options.wbits, r=0.0, abits=None, expand=False)
    replacement, _ = quantize_layer(layer, options)
    return replacement, sum(measure(layer, name, options).error for name in replacement.channels)


def wants_input(layer: Layer, options: Options) -> bool:
    """Whether its input is to be quantized."""
    if options.abits is None or layer.float_input or layer.status != "quantized":
        return False
    return not replacement_of(layer.module).input_if_asked or "abits" in layer.asked_for


def wants_statistics(layer: Layer, options: Options) -> bool:
    """Whether calibration must tell of its input."""
    known = options.act_split == "oracle" and options.act_signed is True
    return wants_input(layer, options) and not known


def quantize_input(layer: Layer, options: Options, statistics: Statistics | None) -> QuantizedInput:
    """Its grid, which channels are split (those with most values beyond the layer's 99th percentile), and its scale."""
    kind = replacement_of(layer.module)
    weight, groups, C = first_weight(layer.module)
    grid = InputGrid(
        bits=options.abits,
        signed=options.act_signed is True or statistics.smallest < 0,
        splits=functional.splits_for(options.act_r, C, groups) if kind.splits_input else 0,
        split=options.split,
        act_split=options.act_split,
        clip=options.act_clip,
    )
    if grid.oracle:
        return QuantizedInput(grid)
    source = split = None
    if kind.splits_input and statistics.channels not in (None, groups * C):
        raise ValueError(f"calibration saw {statistics.channels} input channels, this layer has {groups * C}")
    if grid.splits:
        split = statistics.most_outliers(grid.splits, groups).flatten()
        source = with_originals(split, groups, C).to(weight.device)
    threshold = statistics.threshold(grid.bits, grid.clip, grid.signed, split)
    scale = functional.scale_for(torch.tensor(threshold, dtype=torch.float32), grid.qmax)
    return QuantizedInput(grid, scale.to(weight.device), source)


def _report_weight(
    layer: Layer,
    options: Options,
    replacement: QuantizedLayer,
    name: str,
    plan: SplitPlan,
    step: Quantization,
) -> LayerReport:
    quantized = step.quantized
    groups, C = replacement.groups, replacement.channels[name]
    sources, of_input = replacement.copies(name).tolist(), _report_input(replacement)
    others = len(of_input.get("act_sources", ())) + ("act_scale" in of_input)
    return LayerReport(
        **_common(layer, name),
        bits=options.wbits,
        granularity=options.granularity,
        clip=step.clip,
        channels=groups * C,
        splits=len(sources),
        sources=tuple(sources),
        threshold=_numbers(quantized.threshold),
        scale=_numbers(quantized.scale),
        max_before=max(plan.channel_max.tolist(), default=0.0),
        max_after=max(plan.split_max.tolist(), default=0.0),
        sqnr_db=functional.sqnr_db(*step.error),
        packed_bytes=_packed_bytes(step, options.wbits, len(sources), others),
        expanded_shape=replacement.expanded_shape(name),
        **of_input,
        reason=_note(layer, options, C, groups),
    )


def _report_input(replacement: QuantizedLayer) -> dict[str, Any]:
    """The part of a report that is about its input."""
    grid = replacement.input_grid
    if grid is None:
        return {}
    scale = replacement._buffers.get("input_scale")
    scales = {} if scale is None else {"act_scale": float(scale), "act_threshold": float(scale) * grid.qmax}
    return {
        "act_bits": grid.bits,
        "act_signed": grid.signed,
        "act_clip": grid.clip,
        "act_split": grid.act_split,
        "act_splits": grid.splits * replacement.groups,
        "act_sources": tuple(replacement.input_copies().tolist()),
        **scales,
    }


def _note(layer: Layer, options: Options, channels: int, groups: int) -> str:
    """What is not as it was asked for."""
    kind, notes = replacement_of(layer.module), []
    if (options.r or options.act_r) and groups > 1 and channels == 1:
        notes.append("depthwise: not split")
    if layer.only_folded:
        notes.append(f"runs folded: {layer.only_folded}")
    if options.abits is not None and not wants_input(layer, options):
        notes.append("input stays float" + (": name it in overrides" if kind.input_if_asked else ""))
    elif options.abits is not None and options.act_r and not kind.splits_input:
        notes.append("input not split")
    return "; ".join(notes)


def _common(layer: Layer, name: str | None = None) -> dict[str, Any]:
    """The part of a report that does not depend on quantization: of one weight, or of all that the layer holds."""
    parameters = layer.module._parameters if name is None else {name: layer.module._parameters[name]}
    weights = {k: p for k, p in parameters.items() if p is not None and not nn.parameter.is_lazy(p) and p.dim() >= 2}
    return {
        "name": layer.name,
        "kind": type(layer.module).__name__,
        "weight": next(iter(weights)) if len(weights) == 1 else "",
        "shape": tuple(next(iter(weights.values())).shape) if len(weights) == 1 else (),
        "status": layer.status,
        "float_bytes": sum(p.numel() * p.element_size() for p in weights.values()),
    }


def _numbers(x: Tensor) -> float | tuple[float, ...]:
    values = x.tolist()
    return values if isinstance(values, float) else tuple(values)


# --- The whole model --------------------------------------------------------------------------------------------------


def quantize(
    model: nn.Module,
    *,
    wbits: int | Literal["auto"] = 8,
    r: float = 0.0,
    clip: str | float = "none",
    granularity: Granularity = "tensor",
    split: Split = "qa",
    rounding: Rounding = "nearest",
    abits: int | None = None,
    act_clip: str | float = "none",
    act_r: float = 0.0,
    act_split: ActSplit = "static",
    act_signed: bool | Literal["auto"] = True,
    calibration: Data | Calibration | None = None,
    fold_bn: bool = False,
    skip: Selector | Collection[Selector] | None = FIRST_LAYER,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    expand: bool = True,
    select: Select = "max",
    allocate: Allocate = "uniform",
    budget: int | None = None,
    progress: bool | None = None,
) -> Report:
    """Quantize a model in place by outlier channel splitting: its weights, without data, and if asked layer inputs.

    Every convolution (transposed ones too), nn.Linear, nn.MultiheadAttention, and every LSTM, GRU and RNN, layer or
    cell, becomes an ocs.nn layer; whatever fails, the model is as it was. Sections 3 and 5 of the paper.

    Args:
        model: a float model on any device, in train or eval mode.
        wbits: 2 to 8; integers -qmax .. qmax, qmax = 2^(wbits - 1) - 1. Or "auto": each layer gets the bits, and splits
            up to its r, that leave the least error within `budget`.
        r: expand ratio in [0, 1]: a layer of C input channels gets ceil(r C) splits, in each group.
        clip: where the split weights saturate: "none", "mse", "aciq", "kl" ..., or a fraction of the largest |w|, see
            functional.clip_threshold; "auto" is for each layer the method that leaves the least squared error, or where
            rounding="squant" the least functional.output_error, then for each output channel by itself.
        granularity: one scale per "tensor", or per output "channel".
        split: "qa" (quantization-aware: exact) or "naive" (halves).
        rounding: "nearest": floor(w / scale + 1/2). Or "squant", for split="qa": then some integers move a step so that
            rounding errors cancel in each filter and each output channel, see functional.quantize_weight.
        abits: 2 to 8 bits for the input of each quantized layer, one scale per tensor (attention: one for query, key
            and value), rounded half to even; None keeps inputs float. Those of recurrent layers stay float, as in the
            paper, unless an override names their abits.
        act_clip: where inputs saturate, a method or fraction as of `clip`, but for "auto".
        act_r: expand ratio of the inputs: ceil(act_r C) channels of a convolution or linear layer are split, in each
            group, those with most values beyond the layer's 99th percentile (`split` says how).
        act_split: "static" (from calibration), or "oracle": scale and splits for each batch from its own values, the
            largest |x| halved again and again. It bounds what splitting inputs can give, is slow, needs no calibration,
            and can be neither compiled whole nor exported.
        act_signed: True for integers -qmax .. qmax, as in the paper; "auto" for 0 .. 2^abits - 1 where calibration saw
            nothing negative.
        calibration: what shows the inputs: batches, (batch, target) pairs, dicts of arguments, a callable that runs the
            model, or what ocs.calibrate returned. The model runs in eval mode and without gradients. Where
            torch.distributed is initialized, every rank calls quantize with batches of its own and sees those of all.
        fold_bn: fold each BatchNorm into the convolution before it, where torch.fx proves that this is all that it
            sees; the report says of the others why not.
        skip: what stays float: ocs.FIRST_LAYER (the first convolution), names, glob patterns, module types, predicates
            (name, module) -> bool, or a list of these. It replaces the default; None skips nothing.
        overrides: options for the layers that fit a name or pattern: {"layer4.*": dict(wbits=8)}.
        expand: True for layers that really have C + n channels, False to fold the copies back (same values). Attention,
            whose forward in torch reads its weights itself, always runs folded; the report says so.
        select: which channels are split: "max", those with the largest |w| (the paper's rule); "error", those whose
            splits lower the remaining error most; or a callable (w, n), see functional.plan_splits.
        allocate: which layers get the splits: "uniform", ceil(r C) each. Or, in no more bytes than that takes, each
            weight as many as lower most per byte: with "knapsack" its largest |w|, relative to that before splitting
            (section 3.4 of the paper); with "error" that of the model, the sum over weights of
            functional.remaining_error. Calibration batches then say how much each layer counts: by how far the model's
            outputs move when it alone is quantized.
        budget: with wbits="auto", the bytes that all packed weights may take (Report.packed_bytes). Layers whose wbits
            an override names keep theirs. The error is that of allocate="error", calibration included.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        A Report with a line for every weight, and one for every layer that was left as it is.

    Raises:
        ValueError: an option is out of range, a name or pattern fits no layer, a weight or an input holds NaN, Inf or
            nothing yet, calibration is missing or empty, the model is quantized already or has no layer to quantize.
        TypeError: the model is no nn.Module, is a ScriptModule, or is itself one of the layers to replace.
    """
    begin = time.perf_counter()
    options = Options(
        wbits, r, clip, granularity, split, rounding, abits, act_clip, act_r, act_split, act_signed, expand, select
    )
    check_model(model)
    if not isinstance(fold_bn, bool):
        raise ValueError(f"fold_bn={fold_bn!r}: use True or False")
    layers = find_layers(model)
    if not any(is_kind(layer.module) for layer in layers):
        raise ValueError(f"{type(model).__name__} has no convolution, linear, recurrent or attention layer to quantize")
    chosen = options_for(layers, options, overrides)
    apply_skip(layers, skip)
    check_allocation(layers, chosen, allocate, budget)
    sample = None
    by_error = budget is not None or allocate == "error"
    if by_error and calibration is not None and not isinstance(calibration, Calibration):
        sample, calibration = with_sample(calibration)
    inputs = _look_at_inputs(model, layers, chosen, calibration, progress, sample is not None)
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        folding = plan_folding(model) if fold_bn else Folding({}, {}, {})
        chosen, splits = _allocated(model, layers, chosen, folding, allocate, budget, sample, progress)
        replacements, lines = {**folding.layers, **folding.norms}, []
        for layer in with_progress(layers, "quantize", progress):
            if layer.status != "quantized":
                lines.append(LayerReport(**_common(layer), reason=layer.reason))
                continue
            old, layer.module = layer.module, folding.layers.get(id(layer.module), layer.module)
            how = (chosen[layer.name], inputs.get(layer.name), splits.get(layer.name))
            with named(layer.name):
                replacements[id(old)], of_layer = quantize_layer(layer, *how)
            lines += of_layer
    norms = {name: "" for name, module in model.named_modules() if id(module) in folding.norms} | folding.left
    exchange(list(module_slots(model, replacements)))
    settings = {**_settings(options, skip, overrides), "fold_bn": fold_bn, "allocate": allocate, "budget": budget}
    return Report(tuple(lines), settings, time.perf_counter() - begin, norms)


def _allocated(
    model: nn.Module,
    layers: list[Layer],
    chosen: dict[str, Options],
    folding: Folding,
    allocate: Allocate,
    budget: int | None,
    sample: Data | None,
    progress: bool | None,
) -> tuple[dict[str, Options], dict[str, Splits]]:
    """Every layer's options, and where not all follow from them, the splits of its weights."""
    if allocate == "uniform" and budget is None:
        return chosen, {}
    layers = [layer for layer in layers if layer.status == "quantized"]
    counts = dict.fromkeys(chosen, 1.0)
    if sample is not None:
        bits = 0 if budget is None else mean_bits(layers, budget)
        counts = sensitivities(model, layers, sample, lambda layer: _probe(layer, chosen[layer.name], bits), progress)
    layers = [replace(layer, module=folding.layers.get(id(layer.module), layer.module)) for layer in layers]
    if budget is not None:
        return chosen | allocate_bits(layers, chosen, budget, measure, counts, progress), {}
    return chosen, allocate_splits(layers, chosen, allocate, measure, counts, progress)


def _look_at_inputs(
    model: nn.Module,
    layers: list[Layer],
    chosen: Mapping[str, Options],
    calibration: Data | Calibration | None,
    progress: bool | None,
    has_use: bool,
) -> Mapping[str, Statistics]:
    """What calibration tells of the layers whose inputs are quantized; those it never reaches stay float.

    has_use: whether calibration is used for something else, too.
    """
    of_inputs = [layer for layer in layers if chosen[layer.name].abits is not None]
    for layer in layers:
        options = chosen[layer.name]
        if options.abits is None and options.of_inputs and "abits" not in layer.asked_for:
            raise ValueError(f"{layer.name}: an act_ option without abits has no effect: set abits, too")
    watched = [layer for layer in layers if wants_statistics(layer, chosen[layer.name])]
    if calibration is None:
        if watched:
            raise ValueError(
                f"{watched[0].name}: abits={chosen[watched[0].name].abits} needs calibration=: batches of inputs, say"
            )
        return {}
    if not of_inputs and not has_use:
        raise ValueError("calibration= without abits has no effect: set abits, too")
    if not watched:
        return {}
    if not isinstance(calibration, Calibration):
        statistics = {}
        for layer in watched:
            options = chosen[layer.name]
            split = options.act_r > 0 and options.act_split == "static"
            statistics[layer.name] = (layer.module, statistics_for(layer, channels=split))
        observe(model, calibration, statistics, progress)
        calibration = reached(statistics)
    elif not any(layer.name in calibration for layer in watched):
        raise ValueError(f"calibration is of another model: it has {', '.join([*calibration][:3])} ...")
    for layer in watched:
        if layer.name not in calibration:
            layer.leave("float", "calibration never reached it")
    return calibration


def _settings(options: Options, skip: Any, overrides: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    return {
        **options.shown,
        "skip": [show(selector) for selector in selectors(skip)],
        "overrides": {pattern: _shown(changes) for pattern, changes in (overrides or {}).items()},
    }


def _shown(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {option: show(value) if callable(value) else value for option, value in changes.items()}
