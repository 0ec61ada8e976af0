"""The lines of a report, from what became of each layer."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ocs.kernels.constants import qmax
from ocs.nn.base import QuantizedLayer
from ocs.nn.weights import bytes_of, float_weight, is_weight, weights_of
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.quantize_layer import LayerResult, WeightResult, packed_bytes
from ocs.report.data import Histogram, LayerReport
from ocs.weight.blocks import blocks_of
from ocs.weight.error import sqnr_db
from ocs.weight.types import QuantizedWeight

COUNTED = 4096  # weights that a histogram is of, or all of one output channel
BINS = 64  # of float weights
MOST_BINS = 127  # of integers: 8 bits have three of them in each


def report_lines(results: Iterable[LayerResult]) -> list[LayerReport]:
    """Make a line for each weight, quantized or left as it is, and one for a layer that has none of its own."""
    lines = []
    for result in results:
        if result.replacement is None:
            held = {name: each for name, each in result.plan.module._parameters.items() if is_weight(each)} or {
                "": None
            }
            lines += [
                LayerReport(**_float_weight(result.plan, *each), reason=result.plan.reason) for each in held.items()
            ]
        else:
            floats = {weight.name: weight.tensor for weight in weights_of(result.plan.module)}
            lines += [_quantized_weight(result, weight, floats[weight.name]) for weight in result.weights]
    return lines


def _float_weight(plan: LayerPlan, name: str, weight: Tensor | None) -> dict[str, Any]:
    """What does not depend on quantization; of a layer without weights of its own where there is none."""
    lazy = weight is None or nn.parameter.is_lazy(weight)
    return {
        "name": plan.name,
        "kind": type(plan.module).__name__,
        "weight": name,
        "shape": () if lazy else tuple(weight.shape),
        "status": plan.status,
        "float_bytes": 0 if lazy else bytes_of(weight),
    }


def _quantized_weight(result: LayerResult, weight: WeightResult, w: Tensor) -> LayerReport:
    plan, options, replacement = result.plan, result.options, result.replacement
    quantization, quantized = weight.quantization, weight.quantization.quantized
    sources, of_input = replacement.copies(weight.name).tolist(), _quantized_input(replacement)
    numbers_of_input = len(of_input.get("act_sources", ())) + ("act_scale" in of_input)
    first = not (plan.target.tied_to and not plan.kind.opt_in)  # what is held once counts once, for the embedding
    shown = _float_weight(plan, weight.name, float_weight(plan.like, weight.name))
    return LayerReport(
        **shown | {"float_bytes": shown["float_bytes"] * first},
        bits=options.wbits,
        granularity=options.granularity,
        rounding=options.rounding,
        input_mean="" if plan.input_mean is None else plan.input_mean.reason,
        input_known=None if plan.input_mean is None else plan.input_mean.known,
        clip=quantization.clip,
        channels=replacement.groups * replacement.channels[weight.name],
        splits=len(sources),
        sources=tuple(sources),
        threshold=_numbers(quantized.threshold),
        scale=_numbers(quantized.scale),
        max_before=_largest(weight.plan.channel_max),
        max_after=_largest(weight.plan.split_max),
        sqnr_db=sqnr_db(*quantization.error),
        histogram=_histogram(w, quantized, qmax(options.wbits), options.group),
        steps=weight.steps,
        packed_bytes=first * packed_bytes(quantization, options.wbits, len(sources), numbers_of_input),
        expanded_shape=replacement.expanded_shape(weight.name),
        **of_input,
        reason=_notes(result, replacement.channels[weight.name]),
        bias_from=result.bias_from,
    )


def _histogram(w: Tensor, quantized: QuantizedWeight, most: int, group: int) -> Histogram | None:
    """Count a weight [O, C, ...] before and after in steps of its grid, of some output channels."""
    if not w.numel():
        return None
    step = -(-w.shape[0] // max(COUNTED * w.shape[0] // w.numel(), 1))
    scale = quantized.scale[::step] if quantized.scale.dim() else quantized.scale
    if scale.dim() > 1:  # [O, B]: that of each channel's block
        scale = scale[:, blocks_of(w.shape[1], 0, group)]
    ints = quantized.ints[::step].cpu().numpy().ravel().astype(np.int64)
    channels = w[::step].float().cpu().numpy().reshape(-1, w.shape[1], w[0, 0].numel())
    steps = channels / scale.cpu().numpy().reshape(*scale.shape, *[1] * (3 - scale.dim()))
    reach = max(float(np.abs(steps).max()), most + 0.5)
    places = (steps.ravel() * (BINS / 2 / reach) + BINS / 2).astype(np.int64)
    before = np.bincount(np.minimum(places, BINS - 1), minlength=BINS)
    width = 1 if 2 * most + 1 <= MOST_BINS else 3
    after = np.bincount((ints + most) // width, minlength=(2 * most + 1) // width)
    return Histogram(len(steps), reach, tuple(before.tolist()), tuple(after.tolist()))


def _quantized_input(replacement: QuantizedLayer) -> dict[str, Any]:
    """What is said of a layer's input, where it is quantized."""
    grid = replacement.input_grid
    if grid is None:
        return {}
    found = {
        "act_bits": grid.bits,
        "act_signed": grid.signed,
        "act_clip": grid.clip,
        "act_split": grid.act_split,
        "act_dynamic": grid.dynamic,
        "act_splits": grid.splits * replacement.groups,
        "act_sources": tuple(replacement.input_copies().tolist()),
    }
    scale = replacement._buffers.get("input_scale")
    if scale is not None:
        found |= {"act_scale": float(scale), "act_threshold": float(scale) * grid.qmax}
    return found


def _notes(result: LayerResult, channels: int) -> str:
    """Say what is not as it was asked for."""
    plan, options = result.plan, result.options
    notes = [note for note in (result.rounding_note, result.input_note) if note]
    if (options.r or options.act_r) and result.replacement.groups > 1 and channels == 1:
        notes.append("depthwise: not split")
    if plan.target.tied_to:
        notes.append(f"one set of integers with {plan.target.tied_to}")
    if plan.target.permanent is not None:
        notes.append("its weight as it was standardized, for good")
    if plan.target.reason_folded:
        notes.append(f"runs folded: {plan.target.reason_folded}")
    if options.abits is not None and not plan.quantizes_input:
        notes.append("input stays float: name it in overrides" if plan.kind.input_if_asked else "input stays float")
    elif options.abits is not None and options.act_r and not plan.kind.splits_input:
        notes.append("input not split")
    if options.correct_bias and not plan.can_correct_bias:
        notes.append(f"bias not corrected: not for {type(plan.module).__name__}")
    elif options.correct_bias and not result.bias_from:
        notes.append("bias not corrected: the mean of its input is not known, or only guessed")
    return "; ".join(notes)


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _numbers(x: Tensor) -> float | tuple[float, ...]:
    return tuple(x.flatten().tolist()) if x.dim() else float(x)
