"""One layer: its weights and its input quantized, the module that replaces it, and its lines of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ocs.calibration.run import Statistics
from ocs.errors import error_context
from ocs.model.targets import Layer, Options
from ocs.nn.base import QuantizedLayer, with_originals
from ocs.nn.input import InputGrid, QuantizedInput
from ocs.nn.registry import replacement_of
from ocs.nn.weights import check_values, input_weight
from ocs.plan.allocate import Measured
from ocs.plan.bias_correction import restore_mean
from ocs.plan.explain import steps_of
from ocs.plan.input_facts import Known, corrects, wants_input
from ocs.report.data import LayerReport
from ocs.weight.apply_plan import quantize_plan
from ocs.weight.error import remaining_error, sqnr_db
from ocs.weight.hessian import Hessian
from ocs.weight.plan import splits_for
from ocs.weight.selection import choose_splits
from ocs.weight.threshold import scale_for
from ocs.weight.types import Quantization, Scheme, SplitPlan


def quantize_layer(
    layer: Layer, options: Options, known: Known, *, explain: bool = False
) -> tuple[QuantizedLayer, list[LayerReport]]:
    """The layer that replaces this one, and a line of the report for each of its weights.

    explain: say there what each option did.
    """
    module, kind = layer.module, replacement_of(layer.module)
    possible = _possible(options, known)
    if possible is not options:
        options, layer.note = possible, "rounded to nearest: calibration never reached it"
    if options.rounding == "gptq":
        layer.note = _few_inputs(known.hessians)
    if layer.only_folded:
        options = replace(options, expand=False)
    steps = {}
    for name in kind.weight_names(module):
        with error_context(*[name] * (name != "weight")):
            steps[name] = _quantize_weight(layer, name, options, known)
    quantized = {name: step.quantized for name, (_, step) in steps.items()}
    quantized_input = quantize_input(layer, options, known.statistics) if wants_input(layer, options) else None
    replacement = kind(module, quantized, options.wbits, options.expand, quantized_input)
    replacement.settings = options.shown
    if known.mean is not None:
        restore_mean(replacement, module.weight, known.mean.mean)
    bias, lines = "" if known.mean is None else known.mean.source, []
    for name, step in steps.items():
        line = _report_weight(layer, options, replacement, bias, name, *step)
        did = _steps_of(layer, name, options, known, step[1]) if explain else ()
        lines.append(replace(line, steps=did))
    return replacement, lines


def _possible(options: Options, known: Known) -> Options:
    """These, with nearest rounding where nothing is known that gptq could round by."""
    if options.rounding == "gptq" and known.hessians is None:
        return replace(options, rounding="nearest")
    return options


def _few_inputs(hessians: Mapping[str, Hessian]) -> str:
    """What to say where fewer vectors were seen than they have numbers."""
    count, columns = min(((each.count, each.second.shape[1]) for each in hessians.values()), key=lambda x: x[0] - x[1])
    return f"rounded by {count} inputs of {columns} numbers: more would be better" if count < columns else ""


def _steps_of(layer: Layer, name: str, options: Options, known: Known, last: Quantization) -> Any:
    """What each option did for a weight."""
    how = how_of(layer, name, options, known)
    return steps_of(
        _weight_of(layer, name), options, how, lambda other: _quantize_weight(layer, name, other, known)[1], last
    )


def _quantize_weight(layer: Layer, name: str, options: Options, known: Known) -> tuple[SplitPlan, Quantization]:
    """The plan of a weight, its integers, and their signal and noise."""
    w, how = _weight_of(layer, name), how_of(layer, name, options, known)
    n = (known.splits or {}).get(name)
    if n is None or not options.r:
        n = splits_for(options.r, w.shape[1], how.groups)
    plan = choose_splits(w, n, options.select, how)
    return plan, quantize_plan(w, plan, how)


def _weight_of(layer: Layer, name: str) -> Tensor:
    """A weight as float32 [O, C, ...]."""
    weight = layer.module._parameters[name]
    check_values(weight)
    groups = getattr(layer.module, "groups", 1)
    return replacement_of(layer.module).layout(weight.detach(), groups).float().contiguous()


def how_of(layer: Layer, name: str, options: Options, known: Known) -> Scheme:
    """How a weight of the layer is quantized."""
    hessian = known.hessians[name] if options.rounding == "gptq" else None
    groups = getattr(layer.module, "groups", 1)
    given = (options.wbits, options.clip, options.granularity, options.split, options.rounding)
    return Scheme(*given, groups, hessian, known.gain)


def measure(layer: Layer, name: str, options: Options, known: Known) -> Measured:
    """What a weight takes and what error is left when it is quantized so."""
    options = _possible(options, known)
    plan, step = _quantize_weight(layer, name, options, known)
    copies = plan.source.numel() - plan.channel_max.numel()
    before, after = (max(each.tolist(), default=0.0) for each in (plan.channel_max, plan.split_max))
    return Measured(
        _packed_bytes(step, options.wbits, copies, _numbers_of_input(layer, options)),
        remaining_error(_weight_of(layer, name), step, how_of(layer, name, options, known)),
        after / before if before else 0.0,
    )


def _packed_bytes(step: Quantization, bits: int, copies: int, others: int) -> int:
    """Of the integers, the scales, the sources of copies, and other numbers of four bytes."""
    return math.ceil(step.quantized.ints.numel() * bits / 8) + 4 * (step.quantized.scale.numel() + copies + others)


def _numbers_of_input(layer: Layer, options: Options) -> int:
    """How many there are of a quantized input: its scale, and the sources of its copies."""
    if not wants_input(layer, options) or options.act_split == "oracle":
        return 0
    _, w, groups = input_weight(layer.module)
    C = w.shape[1]
    splits = splits_for(options.act_r, C, groups) if replacement_of(layer.module).splits_input else 0
    return 1 + groups * splits


def probe(layer: Layer, options: Options, bits: int, gain: float) -> tuple[QuantizedLayer, float]:
    """The layer with its weights quantized, to so many bits where they are still to be chosen, and their error."""
    known = Known(gain=gain)
    options = replace(
        options,
        wbits=bits if options.automatic else options.wbits,
        r=0.0,
        rounding="nearest" if options.rounding == "gptq" else options.rounding,
        abits=None,
        correct_bias=False,
        expand=False,
    )
    replacement, _ = quantize_layer(layer, options, known)
    return replacement, sum(measure(layer, name, options, known).error for name in replacement.channels)


def quantize_input(layer: Layer, options: Options, statistics: Statistics | None) -> QuantizedInput:
    """Its grid, which channels are split (those with most values beyond the layer's 99th percentile), and its scale."""
    kind = replacement_of(layer.module)
    _, weight, groups = input_weight(layer.module)
    C = weight.shape[1]
    grid = InputGrid(
        bits=options.abits,
        signed=options.act_signed is True or statistics.smallest < 0,
        splits=splits_for(options.act_r, C, groups) if kind.splits_input else 0,
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
    scale = scale_for(torch.tensor(threshold, dtype=torch.float32), grid.qmax)
    return QuantizedInput(grid, scale.to(weight.device), source)


def _report_weight(
    layer: Layer,
    options: Options,
    replacement: QuantizedLayer,
    bias_from: str,
    name: str,
    plan: SplitPlan,
    step: Quantization,
) -> LayerReport:
    quantized = step.quantized
    groups, C = replacement.groups, replacement.channels[name]
    sources, of_input = replacement.copies(name).tolist(), _report_input(replacement)
    others = len(of_input.get("act_sources", ())) + ("act_scale" in of_input)
    return LayerReport(
        **common_part(layer, name),
        bits=options.wbits,
        granularity=options.granularity,
        rounding=options.rounding,
        input_mean=layer.input_mean,
        clip=step.clip,
        channels=groups * C,
        splits=len(sources),
        sources=tuple(sources),
        threshold=_numbers(quantized.threshold),
        scale=_numbers(quantized.scale),
        max_before=max(plan.channel_max.tolist(), default=0.0),
        max_after=max(plan.split_max.tolist(), default=0.0),
        sqnr_db=sqnr_db(*step.error),
        packed_bytes=_packed_bytes(step, options.wbits, len(sources), others),
        expanded_shape=replacement.expanded_shape(name),
        **of_input,
        reason=_note(layer, options, C, groups, bool(bias_from)),
        bias_from=bias_from,
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


def _note(layer: Layer, options: Options, channels: int, groups: int, corrected: bool) -> str:
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
    if options.correct_bias and not corrects(layer):
        notes.append(f"bias not corrected: not for {type(layer.module).__name__}")
    elif options.correct_bias and not corrected:
        notes.append("bias not corrected: the mean of its input is not known, or only guessed")
    return "; ".join(notes)


def common_part(layer: Layer, name: str | None = None) -> dict[str, Any]:
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
