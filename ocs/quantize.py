"""quantize(): plan every layer of a model, then rewrite it in place, all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ocs import functional
from ocs.activation import ActSplit, InputGrid, QuantizedInput
from ocs.batchnorm import Folding, plan_folding
from ocs.calibrate import Calibration, Data, Statistics, moments_for, observe, reached, statistics_for
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
from ocs.functional import Granularity, Quantization, Rounding, Split, SplitPlan
from ocs.layer import QuantizedLayer, with_originals
from ocs.progress import with_progress
from ocs.report import LayerReport, Report
from ocs.rewrite import exchange, module_slots
from ocs.second_moments import LayerMoments

# --- One layer --------------------------------------------------------------------------------------------------------


def quantize_layer(
    layer: Layer, options: Options, statistics: Statistics | None = None, moments: LayerMoments | None = None
) -> tuple[QuantizedLayer, list[LayerReport]]:
    """The layer that replaces this one, and a line of the report for each of its weights.

    statistics: of its input, where that is to be quantized with a scale of its own. moments: of what its weights meet.
    """
    module, kind = layer.module, replacement_of(layer.module)
    if options.rounding == "gptq" and moments is None:
        options, layer.note = replace(options, rounding="nearest"), "rounded to nearest: calibration never reached it"
    if layer.only_folded:
        options = replace(options, expand=False)
    steps = {}
    for name in kind.weight_names(module):
        weight = module._parameters[name]
        check_lazy(weight)
        with named(*[name] * (name != "weight")):
            second = moments[name].products if options.rounding == "gptq" else None
            steps[name] = _quantize_weight(weight.detach(), kind, getattr(module, "groups", 1), options, second)
    quantized = {name: step.quantized for name, (_, step) in steps.items()}
    quantized_input = quantize_input(layer, options, statistics) if wants_input(layer, options) else None
    replacement = kind(module, quantized, options.wbits, options.expand, quantized_input)
    replacement.settings = dict(vars(options))
    return replacement, [_report_weight(layer, options, replacement, name, *step) for name, step in steps.items()]


def _quantize_weight(
    weight: Tensor, kind: type[QuantizedLayer], groups: int, options: Options, second: Tensor | None
) -> tuple[SplitPlan, Quantization]:
    """The plan of a weight, its integers, and their signal and noise."""
    w = kind.layout(weight, groups).float().contiguous()
    plan = functional.plan_splits(w, options.r, groups)
    return plan, functional.quantize_plan(
        w, plan, options.wbits, options.clip, options.granularity, options.split, options.rounding, groups, second
    )


def wants_input(layer: Layer, options: Options) -> bool:
    """Whether its input is to be quantized."""
    if options.abits is None or layer.float_input or layer.status != "quantized":
        return False
    return not replacement_of(layer.module).input_if_asked or "abits" in layer.asked_for


def wants_statistics(layer: Layer, options: Options) -> bool:
    """Whether calibration must tell of its input."""
    known = options.act_split == "oracle" and options.act_signed is True
    return wants_input(layer, options) and not known


def wants_moments(layer: Layer, options: Options) -> bool:
    """Whether calibration must tell of what its weights meet."""
    return layer.status == "quantized" and options.rounding == "gptq"


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
    numbers = quantized.scale.numel() + len(sources) + len(of_input.get("act_sources", ())) + ("act_scale" in of_input)
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
        packed_bytes=math.ceil(quantized.ints.numel() * options.wbits / 8) + 4 * numbers,
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
    kind, notes = replacement_of(layer.module), [layer.note] * bool(layer.note)
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
    wbits: int = 8,
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
    progress: bool | None = None,
) -> Report:
    """Quantize a model in place by outlier channel splitting: its weights, without data, and if asked layer inputs.

    Every convolution (transposed ones too), nn.Linear, nn.MultiheadAttention, and every LSTM, GRU and RNN, layer or
    cell, becomes an ocs.nn layer; whatever fails, the model is as it was. Sections 3 and 5 of the paper.

    Args:
        model: a float model on any device, in train or eval mode.
        wbits: 2 to 8; integers -qmax .. qmax, qmax = 2^(wbits - 1) - 1.
        r: expand ratio in [0, 1]: a layer of C input channels gets ceil(r C) splits, in each group.
        clip: where the split weights saturate: "none", "mse", "aciq", "kl" ..., or a fraction of the largest |w|, see
            functional.clip_threshold; "auto" is for each layer the method that leaves the least squared error, or where
            rounding="squant" the least functional.output_error, or where rounding="gptq" the least measured error, then
            for each output channel by itself.
        granularity: one scale per "tensor", or per output "channel".
        split: "qa" (quantization-aware: exact) or "naive" (halves).
        rounding: "nearest": floor(w / scale + 1/2). Or "squant", for split="qa": then some integers move a step so that
            rounding errors cancel in each filter and each output channel, see functional.quantize_weight. Or "gptq",
            for split="qa", with calibration: errors of each column are compensated in those that follow, by the second
            moments of what the weight meets in the float model (ocs.second_moments says what that is, and what it
            takes). Layers that calibration never reaches are rounded to nearest; the report says so.
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
            model, or what ocs.calibrate returned (with moments=True where rounding="gptq"). The model runs in eval mode
            and without gradients. Where torch.distributed is initialized, every rank calls quantize with batches of its
            own and sees those of all.
        fold_bn: fold each BatchNorm into the convolution before it, where torch.fx proves that this is all that it
            sees; the report says of the others why not.
        skip: what stays float: ocs.FIRST_LAYER (the first convolution), names, glob patterns, module types, predicates
            (name, module) -> bool, or a list of these. It replaces the default; None skips nothing.
        overrides: options for the layers that fit a name or pattern: {"layer4.*": dict(wbits=8)}.
        expand: True for layers that really have C + n channels, False to fold the copies back (same values). Attention,
            whose forward in torch reads its weights itself, always runs folded; the report says so.
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
        wbits, r, clip, granularity, split, rounding, abits, act_clip, act_r, act_split, act_signed, expand
    )
    check_model(model)
    if not isinstance(fold_bn, bool):
        raise ValueError(f"fold_bn={fold_bn!r}: use True or False")
    layers = find_layers(model)
    if not any(is_kind(layer.module) for layer in layers):
        raise ValueError(f"{type(model).__name__} has no convolution, linear, recurrent or attention layer to quantize")
    chosen = options_for(layers, options, overrides)
    apply_skip(layers, skip)
    inputs = _look_at_inputs(model, layers, chosen, calibration, progress)
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        folding = plan_folding(model) if fold_bn else Folding({}, {}, {})
        replacements, lines = {**folding.layers, **folding.norms}, []
        for layer in with_progress(layers, "quantize", progress):
            if layer.status != "quantized":
                lines.append(LayerReport(**_common(layer), reason=layer.reason))
                continue
            old, layer.module = layer.module, folding.layers.get(id(layer.module), layer.module)
            with named(layer.name):
                seen = inputs.get(layer.name), inputs.moments.get(layer.name)
                replacements[id(old)], of_layer = quantize_layer(layer, chosen[layer.name], *seen)
            lines += of_layer
    norms = {name: "" for name, module in model.named_modules() if id(module) in folding.norms} | folding.left
    exchange(list(module_slots(model, replacements)))
    settings = {**_settings(options, skip, overrides), "fold_bn": fold_bn}
    return Report(tuple(lines), settings, time.perf_counter() - begin, norms)


def _look_at_inputs(
    model: nn.Module,
    layers: list[Layer],
    chosen: Mapping[str, Options],
    calibration: Data | Calibration | None,
    progress: bool | None,
) -> Calibration:
    """What calibration tells of the layers that need it; those whose input it never reaches stay float."""
    of_inputs = [layer for layer in layers if chosen[layer.name].abits is not None]
    for layer in layers:
        options = chosen[layer.name]
        if options.abits is None and options.of_inputs and "abits" not in layer.asked_for:
            raise ValueError(f"{layer.name}: an act_ option without abits has no effect: set abits, too")
    watched = [layer for layer in layers if wants_statistics(layer, chosen[layer.name])]
    compensated = [layer for layer in layers if wants_moments(layer, chosen[layer.name])]
    if calibration is None:
        for layer, need in [*((each, f"abits={chosen[each.name].abits}") for each in watched),
                            *((each, "rounding='gptq'") for each in compensated)]:  # fmt: skip
            raise ValueError(f"{layer.name}: {need} needs calibration=: batches of inputs, say")
        return Calibration()
    if not of_inputs and not any(options.rounding == "gptq" for options in chosen.values()):
        raise ValueError("calibration= without abits has no effect: set abits, too, or rounding='gptq'")
    if not watched and not compensated:
        return Calibration()
    if not isinstance(calibration, Calibration):
        calibration = _run_calibration(model, watched, compensated, chosen, calibration, progress)
    elif not any(layer.name in calibration for layer in [*watched, *compensated]):
        raise ValueError(f"calibration is of another model: it has {', '.join([*calibration][:3])} ...")
    elif compensated and not calibration.moments:
        raise ValueError("rounding='gptq': calibration has no second moments; use ocs.calibrate(..., moments=True)")
    for layer in watched:
        if layer.name not in calibration:
            layer.leave("float", "calibration never reached it")
    return calibration


def _run_calibration(
    model: nn.Module,
    watched: list[Layer],
    compensated: list[Layer],
    chosen: Mapping[str, Options],
    data: Data,
    progress: bool | None,
) -> Calibration:
    """What these layers need and no more."""
    statistics = {}
    for layer in watched:
        options = chosen[layer.name]
        split = options.act_r > 0 and options.act_split == "static"
        statistics[layer.name] = (layer.module, statistics_for(layer, channels=split))
    moments = {layer.name: moments_for(model, layer) for layer in compensated}
    observe(model, data, statistics, progress, moments)
    return reached(statistics, moments)


def _settings(options: Options, skip: Any, overrides: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    return {
        **asdict(options),
        "skip": [show(selector) for selector in selectors(skip)],
        "overrides": {pattern: dict(changes) for pattern, changes in (overrides or {}).items()},
    }
