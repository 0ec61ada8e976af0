"""quantize(): plan every layer of a model, then rewrite it in place, all or nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ocs import functional
from ocs.find import (
    FIRST_LAYER,
    Layer,
    Options,
    Selector,
    apply_skip,
    find_layers,
    is_kind,
    named,
    options_for,
    replacement_of,
    selectors,
    show,
)
from ocs.functional import Granularity, QuantizedWeight, Rounding, Split, SplitPlan
from ocs.layer import QuantizedLayer
from ocs.progress import with_progress
from ocs.report import LayerReport, Report
from ocs.rewrite import exchange, module_slots

# --- One layer --------------------------------------------------------------------------------------------------------


def quantize_layer(layer: Layer, options: Options) -> tuple[QuantizedLayer, list[LayerReport]]:
    """The layer that replaces this one, and a line of the report for each of its weights."""
    module, kind = layer.module, replacement_of(layer.module)
    if layer.only_folded:
        options = replace(options, expand=False)
    steps = {}
    for name in kind.weight_names(module):
        weight = module._parameters[name]
        if nn.parameter.is_lazy(weight) or weight.is_meta:
            raise ValueError("its weight holds no values yet: run a batch through lazy layers, fill meta tensors")
        with named(*[name] * (name != "weight")):
            steps[name] = _quantize_weight(weight.detach(), kind, getattr(module, "groups", 1), options)
    quantized = {name: weight for name, (_, weight, _) in steps.items()}
    replacement = kind(module, quantized, options.wbits, options.expand)
    replacement.settings = dict(vars(options))
    return replacement, [_report_weight(layer, options, replacement, name, *step) for name, step in steps.items()]


def _quantize_weight(
    weight: Tensor, kind: type[QuantizedLayer], groups: int, options: Options
) -> tuple[SplitPlan, QuantizedWeight, tuple[float, float]]:
    """The plan of a weight, its integers, and their signal and noise."""
    w = kind.layout(weight, groups).float().contiguous()
    plan = functional.plan_splits(w, options.r, groups)
    threshold = functional.weight_threshold(w, plan, options.clip, options.granularity, groups)
    quantized = functional.quantize_split(w, plan, threshold, options.wbits, options.split, groups)
    return plan, quantized, functional.weight_error(w, quantized, groups)


def _report_weight(
    layer: Layer,
    options: Options,
    replacement: QuantizedLayer,
    name: str,
    plan: SplitPlan,
    quantized: QuantizedWeight,
    error: tuple[float, float],
) -> LayerReport:
    groups, C = replacement.groups, replacement.channels[name]
    sources = replacement.copies(name).tolist()
    return LayerReport(
        **_common(layer, name),
        bits=options.wbits,
        granularity=options.granularity,
        channels=groups * C,
        splits=len(sources),
        sources=tuple(sources),
        threshold=_numbers(quantized.threshold),
        scale=_numbers(quantized.scale),
        max_before=max(plan.channel_max.tolist(), default=0.0),
        max_after=max(plan.split_max.tolist(), default=0.0),
        sqnr_db=functional.sqnr_db(*error),
        packed_bytes=math.ceil(quantized.ints.numel() * options.wbits / 8)
        + 4 * (quantized.scale.numel() + len(sources)),
        expanded_shape=replacement.expanded_shape(name),
        reason=_note(layer, options, C, groups),
    )


def _note(layer: Layer, options: Options, channels: int, groups: int) -> str:
    """What is not as it was asked for."""
    if options.r and groups > 1 and channels == 1:
        return "depthwise: not split"
    return f"runs folded: {layer.only_folded}" if layer.only_folded else ""


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
    skip: Selector | Collection[Selector] | None = FIRST_LAYER,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    expand: bool = True,
    progress: bool | None = None,
) -> Report:
    """Quantize the weights of a model in place by outlier channel splitting, without data (section 3 of the paper).

    Every convolution (transposed ones too), nn.Linear, nn.MultiheadAttention, and every LSTM, GRU and RNN, layer or
    cell, becomes an ocs.nn layer; whatever fails, the model is as it was.

    Args:
        model: a float model on any device, in train or eval mode.
        wbits: 2 to 8; integers -qmax .. qmax, qmax = 2^(wbits - 1) - 1.
        r: expand ratio in [0, 1]: a layer of C input channels gets ceil(r C) splits, in each group.
        clip: "none", or the fraction in (0, 1] of the largest split |w| that is kept.
        granularity: one scale per "tensor", or per output "channel".
        split: "qa" (quantization-aware: exact) or "naive" (halves).
        rounding: "nearest": floor(w / scale + 1/2).
        skip: what stays float: ocs.FIRST_LAYER (the first convolution), names, glob patterns, module types, predicates
            (name, module) -> bool, or a list of these. It replaces the default; None skips nothing.
        overrides: options for the layers that fit a name or pattern: {"layer4.*": dict(wbits=8)}.
        expand: True for layers that really have C + n channels, False to fold the copies back (same values). Attention,
            whose forward in torch reads its weights itself, always runs folded; the report says so.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        A Report with a line for every weight, and one for every layer that was left as it is.

    Raises:
        ValueError: an option is out of range, a name or pattern fits no layer, a weight holds NaN, Inf or nothing yet,
            the model is quantized already or has no layer to quantize.
        TypeError: the model is no nn.Module, is a ScriptModule, or is itself one of the layers to replace.
    """
    begin = time.perf_counter()
    options = Options(wbits, r, clip, granularity, split, rounding, expand)
    _check_model(model)
    layers = find_layers(model)
    if not any(is_kind(layer.module) for layer in layers):
        raise ValueError(f"{type(model).__name__} has no convolution, linear, recurrent or attention layer to quantize")
    chosen = options_for(layers, options, overrides)
    apply_skip(layers, skip)
    replacements, lines = {}, []
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        for layer in with_progress(layers, "quantize", progress):
            if layer.status != "quantized":
                lines.append(LayerReport(**_common(layer), reason=layer.reason))
                continue
            with named(layer.name):
                replacements[id(layer.module)], of_layer = quantize_layer(layer, chosen[layer.name])
            lines += of_layer
    exchange(list(module_slots(model, replacements)))
    return Report(tuple(lines), _settings(options, skip, overrides), time.perf_counter() - begin)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, whose layers cannot be replaced: quantize the model it was made from")
    if is_kind(model):
        name = type(model).__name__
        raise TypeError(f"model is a {name}, which cannot replace itself in place: wrap it, nn.Sequential({name}(...))")


def _settings(options: Options, skip: Any, overrides: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    return {
        **asdict(options),
        "skip": [show(selector) for selector in selectors(skip)],
        "overrides": {pattern: dict(changes) for pattern, changes in (overrides or {}).items()},
    }
