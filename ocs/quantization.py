"""quantize(): plan every layer of a model, then rewrite it in place, all or nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from ocs.calibration.calibrate import Calibration
from ocs.calibration.run import Data, with_sample
from ocs.errors import error_context
from ocs.model.batchnorm_folding import Folding, plan_folding
from ocs.model.rewrite import exchange, module_slots
from ocs.model.targets import (
    FIRST_LAYER,
    Layer,
    Options,
    Selector,
    apply_overrides,
    apply_skip,
    check_model,
    check_values,
    find_layers,
    selectors,
    show,
)
from ocs.nn.input import ActSplit
from ocs.nn.registry import is_quantizable
from ocs.plan.allocate import Allocate, Measured, Splits, allocate_bits, allocate_splits, check_allocation, mean_bits
from ocs.plan.input_facts import Known, look_at_inputs
from ocs.plan.quantize_layer import common_part, measure, probe, quantize_layer
from ocs.plan.recipe import Recipe, by_recipe, check_recipe
from ocs.plan.sensitivity import sensitivities
from ocs.progress import with_progress
from ocs.report.data import LayerReport, Report
from ocs.weight.types import Granularity, Rounding, Select, Split


def quantize(
    model: nn.Module,
    *,
    wbits: int | Literal["auto"] = 8,
    r: float = 0.0,
    clip: str | float | None = None,
    granularity: Granularity | None = None,
    split: Split = "qa",
    rounding: Rounding | None = None,
    abits: int | None = None,
    act_clip: str | float | None = None,
    act_r: float = 0.0,
    act_split: ActSplit = "static",
    act_signed: bool | Literal["auto"] | None = None,
    correct_bias: bool = False,
    calibration: Data | Calibration | None = None,
    fold_bn: bool = False,
    skip: Selector | Collection[Selector] | None = FIRST_LAYER,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    expand: bool = True,
    select: Select = "max",
    allocate: Allocate = "uniform",
    budget: int | None = None,
    recipe: Recipe = "paper",
    explain: bool | None = None,
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
            functional.clip_threshold; "auto" is for each layer, or output channel that has a scale, what leaves the
            least functional.output_error, with rounding="gptq" by what calibration measured.
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
        correct_bias: add to the bias of each convolution and linear layer what its errors take from the mean of its
            outputs, (w - w_hat) E[x] (Nagel et al. 2019); a layer without a bias gets one. E[x] is the mean of the
            float inputs: measured where there is calibration, else from the BatchNorms before the layer, where these
            tell it surely (not through a LayerNorm, GroupNorm or max pooling), else unknown, and the layer's bias as it
            was: the report says so. Recurrent and attention layers keep theirs.
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
        select: which channels are split: "max", those with the largest |w| (the paper's rule); "error", those whose
            splits lower the remaining error most, which with one scale per tensor and no clipping are the same; or a
            callable (w, n), see functional.plan_splits.
        allocate: which layers get the splits: "uniform", ceil(r C) each. Or, in no more bytes than that takes, each
            weight as many as lower most per byte: with "knapsack" its largest |w|, relative to that before splitting
            (section 3.4 of the paper); with "error" that of the model, the sum over weights of
            functional.remaining_error. The first of calibration's batches (a callable whole) then says how much each
            layer counts: by how far the model's outputs move when it alone is quantized.
        budget: with wbits="auto", the bytes that all packed weights may take (Report.packed_bytes). Layers whose wbits
            an override names keep theirs. The error is that of allocate="error", calibration included.
        recipe: what the options mean that are None here. "paper": clip="none", granularity="tensor",
            rounding="nearest", act_clip="none", act_signed=True.
            "best": what measurements favour, layer by layer and without data (docs/accuracy.md): granularity="channel",
            clip="auto"; rounding="squant" where the squared mean of a layer's inputs is more than a twentieth of their
            power (after ReLU, say: see ocs.moments), and in convolutions of which nothing is known, else "nearest", as
            for split="naive"; with abits act_clip="mse" and, but for act_split="oracle", act_signed="auto".
        explain: say in the report what each option did for the error of each layer's outputs; by default with another
            recipe than the paper's. Quantizing then takes a few times as long. The error is an estimate
            without data, functional.output_error, or with rounding="gptq" what calibration measured.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        A Report with a line for every weight, and one for every layer that was left as it is.

    Raises:
        ValueError: an option is out of range, a name or pattern fits no layer, a weight or an input holds NaN, Inf or
            nothing yet, calibration is missing or empty, an option has no effect (select or allocate without r, act_
            options without abits, calibration that nothing uses), the model is quantized already or has no layer to
            quantize.
        TypeError: the model is no nn.Module, is a ScriptModule, or is itself one of the layers to replace.
    """
    begin = time.perf_counter()
    explain = recipe != "paper" if explain is None else explain
    for name, value in {"fold_bn": fold_bn, "explain": explain}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: use True or False")
    given = {
        "wbits": wbits,
        "r": r,
        "clip": clip,
        "granularity": granularity,
        "split": split,
        "rounding": rounding,
        "abits": abits,
        "act_clip": act_clip,
        "act_r": act_r,
        "act_split": act_split,
        "act_signed": act_signed,
        "correct_bias": correct_bias,
        "expand": expand,
        "select": select,
    }
    given = {name: value for name, value in given.items() if value is not None or name not in LEFT_OPEN}
    layers, chosen, settings = _choose(model, given, recipe, skip, overrides)
    check_allocation(layers, chosen, allocate, budget)
    sample = None
    by_error = budget is not None or allocate == "error"
    if by_error and calibration is not None and not isinstance(calibration, Calibration):
        sample, calibration = with_sample(calibration)
    known = look_at_inputs(model, layers, chosen, calibration, progress, sample is not None)
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        folding = plan_folding(model) if fold_bn else Folding({}, {}, {})
        chosen, splits = _allocated(model, layers, chosen, known, folding, allocate, budget, sample, progress)
        replacements, lines = _quantize_all(layers, chosen, known, splits, folding, explain, progress)
    norms = {name: "" for name, module in model.named_modules() if id(module) in folding.norms} | folding.left
    exchange(list(module_slots(model, replacements)))
    settings |= {"fold_bn": fold_bn, "allocate": allocate, "budget": budget and int(budget), "recipe": recipe}
    return Report(tuple(lines), settings, time.perf_counter() - begin, norms)


LEFT_OPEN = ("clip", "granularity", "rounding", "abits", "act_clip", "act_signed")  # may be None


def _choose(
    model: nn.Module,
    given: dict[str, Any],
    recipe: Recipe,
    skip: Selector | Collection[Selector] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> tuple[list[Layer], dict[str, Options], dict[str, Any]]:
    """The layers, the options of each by name, and what of these the report says."""
    check_recipe(recipe)
    common = Options(**given)  # refuses what is out of range
    check_model(model)
    layers = find_layers(model)
    if not any(is_quantizable(layer.module) for layer in layers):
        raise ValueError(f"{type(model).__name__} has no convolution, linear, recurrent or attention layer to quantize")
    favour = by_recipe(recipe, model, given)
    favoured = {layer.name: favour(layer, common) for layer in layers}
    chosen = apply_overrides(layers, dict.fromkeys(favoured, common), overrides)
    chosen = {layer.name: favour(layer, chosen[layer.name]) for layer in layers}
    apply_skip(layers, skip)
    shown = [favoured[layer.name] for layer in layers if layer.status == "quantized"] or [common]
    return layers, chosen, _settings(shown, skip, overrides)


def _quantize_all(
    layers: list[Layer],
    chosen: Mapping[str, Options],
    known: Mapping[str, Known],
    splits: Mapping[str, Splits],
    folding: Folding,
    explain: bool,
    progress: bool | None,
) -> tuple[dict[int, nn.Module], list[LayerReport]]:
    """What replaces each module, by its id, and the lines of the report."""
    replacements: dict[int, nn.Module] = {**folding.layers, **folding.norms}
    lines = []
    for layer in with_progress(layers, "quantize", progress):
        if layer.status != "quantized":
            lines.append(LayerReport(**common_part(layer), reason=layer.reason))
            continue
        old, layer.module = layer.module, folding.layers.get(id(layer.module), layer.module)
        of_layer = known[layer.name].unfactorized()._replace(splits=splits.get(layer.name))
        with error_context(layer.name):
            replacements[id(old)], weights = quantize_layer(layer, chosen[layer.name], of_layer, explain=explain)
        lines += weights
    return replacements, lines


def _allocated(
    model: nn.Module,
    layers: list[Layer],
    chosen: dict[str, Options],
    known: Mapping[str, Known],
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
    for layer in layers:
        check_values(layer)
    counts = dict.fromkeys(chosen, 1.0)
    if sample is not None:
        bits = 0 if budget is None else mean_bits(layers, budget)

        def probed(layer: Layer) -> tuple[nn.Module, float]:
            return probe(layer, chosen[layer.name], bits, known[layer.name].gain)

        counts = sensitivities(model, layers, sample, probed, progress)
    layers = [replace(layer, module=folding.layers.get(id(layer.module), layer.module)) for layer in layers]

    latest = lru_cache(maxsize=1)(lambda name: known[name].unfactorized())  # one layer after the other is measured

    def measured(layer: Layer, name: str, options: Options, splits: int | None) -> Measured:
        return measure(layer, name, options, latest(layer.name)._replace(splits={name: splits}))

    if budget is not None:
        return chosen | allocate_bits(layers, chosen, budget, measured, counts, progress), {}
    return chosen, allocate_splits(layers, chosen, allocate, measured, counts, progress)


def _settings(
    chosen: Iterable[Options], skip: Any, overrides: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """What was asked for, before overrides; "by layer" where a recipe chose different things."""
    first, *others = [options.shown for options in chosen]
    shared = {name: value if all(o[name] == value for o in others) else "by layer" for name, value in first.items()}
    return {
        **shared,
        "skip": [show(selector) for selector in selectors(skip)],
        "overrides": {pattern: _shown(changes) for pattern, changes in (overrides or {}).items()},
    }


def _shown(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {option: show(value) if callable(value) else value for option, value in changes.items()}
