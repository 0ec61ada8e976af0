"""quantize(): plan every layer of a model, then rewrite it in place, all or nothing."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ocs.calibration.calibrate import Calibration
from ocs.calibration.run import Data
from ocs.formats.contents import sizes_of
from ocs.formats.pretrained import refused_slots
from ocs.model.batchnorm_folding import Folding, plan_folding
from ocs.model.equalization import Equalization
from ocs.model.rewrite import exchange, for_a_while, keeps_grad_mode, module_slots
from ocs.model.wrappers import unwrapped
from ocs.nn.input import ActScale, ActSplit
from ocs.nn.weights import weights_of
from ocs.plan.after_learning import after_learning
from ocs.plan.allocate import allocate as allocate_sizes
from ocs.plan.allocate import check_allocation
from ocs.plan.call import explained_call
from ocs.plan.choose import choose
from ocs.plan.coverage import check_coverage
from ocs.plan.equalize import plan_equalization
from ocs.plan.input_facts import InputFacts, learn
from ocs.plan.options import ActSelect, Allocate, Recipe, Request, Rounding
from ocs.plan.quantize_layer import LayerResult, quantize_layers
from ocs.plan.selectors import FIRST_LAYER, Selector
from ocs.report.data import Report
from ocs.report.lines import report_lines
from ocs.tune.learned_rounding import Learnable, Outcome, learn_rounding
from ocs.weight.types import GROUP, Granularity, Select, Split


@explained_call
@keeps_grad_mode
def quantize(
    model: nn.Module,
    *,
    wbits: int | Literal["auto"] = 8,
    r: float = 0.0,
    clip: str | float | None = None,
    granularity: Granularity | None = None,
    group: int = GROUP,
    split: Split = "qa",
    rounding: Rounding | None = None,
    abits: int | None = None,
    act_clip: str | float | None = None,
    act_r: float = 0.0,
    act_split: ActSplit = "static",
    act_select: ActSelect | None = None,
    act_signed: bool | Literal["auto"] | None = None,
    act_scale: ActScale = "static",
    correct_bias: bool = False,
    calibration: Data | Calibration | None = None,
    fold_bn: bool = False,
    equalize: bool = False,
    skip: Selector | Collection[Selector] | None = FIRST_LAYER,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    embeddings: bool = False,
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
    cell, becomes an ocs.nn layer, and so do experts that are held in one parameter, transformers' Conv1D, and what
    ocs.register names; whatever fails, the model is as it was. Sections 3 and 5 of the paper.

    The `weight` of such a layer is there to be read: writes to it are refused. Adapters (of peft, say) and their base
    layers stay float: merge them first.

    Args:
        model: a float model on any device, in train or eval mode.
        wbits: 2 to 8; integers -qmax .. qmax, qmax = 2^(wbits - 1) - 1. Or "auto": each layer gets the bits, and splits
            up to its r, that leave the least error within `budget`.
        r: expand ratio in [0, 1]: a layer of C input channels gets ceil(r C) splits, in each group.
        clip: where the split weights saturate: "none", "mse", "aciq", "kl" ..., or a fraction of the largest |w|, see
            functional.clip_threshold ("mse-release" ..., as the paper's release does, find it in the unsplit weights);
            "auto" is for each layer, or output channel that has a scale, what leaves the least functional.output_error,
            in which gain counts less where a weight passes signals on hardly better than errors, as random ones do;
            with rounding="gptq" by what calibration measured; then a few are tried.
        granularity: one scale per "tensor", or per output "channel"; or per "group", that is per output channel and
            `group` input channels, copies in groups of their own. There a copy rounds what is left of its channel once
            the channel itself is rounded (split="naive": does not). Embeddings have a scale for each row.
        group: with granularity="group", how many input channels share a scale, a multiple of 32.
        split: "qa" (quantization-aware: exact) or "naive" (halves), of weights and inputs alike. Or "even": as exact,
            but a channel split n - 1 times becomes n equal parts, which narrows the grid wherever a channel is split
            more than once; see functional.quantize_weight.
        rounding: "nearest": floor(w / scale + 1/2). Or "squant", but for split="naive": then some integers move a step
            so that rounding errors cancel in each filter and each output channel, see functional.quantize_weight. Or
            "gptq", but for split="naive", with calibration: errors of each column are compensated in those that follow,
            by the second moments of what the weight meets in the float model (4 (C K)^2 bytes for each group of a
            weight with C K columns, and some four times as much for one layer after the other; where that is more than
            ocs.calibrate keeps, in blocks of columns). Layers that calibration never reaches are rounded to nearest.
            The report says so of both. Or "learned", but for split="naive", with calibration, for few bits: from the
            integers of gptq on, up or down by gradient, so that the outputs of each block (a layer, or the outermost
            module of a class that the model has more than once) are those of the float model, then those of a model of
            several blocks and up to four million weights as a whole (Nagel et al. 2020; Li et al. 2021; see
            ocs.tune.learned_rounding); quantized inputs are taken into account. Calibration is then some hundred
            inputs, in batches of some 32, or a callable that does the same each time, but no ocs.Calibration. It takes
            some 120 steps for each block, whose inputs and outputs are held in memory; integers that left less error
            before stay, and the report says so.
        abits: 2 to 8 bits for the input of each quantized layer, one scale per tensor (attention: one for query, key
            and value), rounded half to even; None keeps inputs float. Those of recurrent layers stay float, as in the
            paper, unless an override names their abits.
        act_clip: where inputs saturate, a method or fraction as of `clip`, but for "auto".
        act_r: expand ratio of the inputs: a convolution or linear layer of C input channels gets ceil(act_r C) splits
            of its input, in each group (`split` says how). Then the threshold is found, of the split values.
        act_split: "static" (from calibration), or "oracle": scale and splits for each batch from its own values, the
            largest |x| halved again and again. It bounds what splitting inputs can give, is slow, needs no calibration,
            and can be neither compiled whole nor exported.
        act_select: which channels of inputs are split where calibration chooses: "percentile", those with most values
            beyond the layer's 99th percentile, each once (the paper's rule); "max", again and again the channel with
            the largest |x| that calibration saw, copies included, as the paper does with weights; or "error", where
            act_clip searches a threshold: the splits that lower the expected error of the layer's outputs most, by
            histograms of the channels and the weights that meet them (ocs.plan.input_splits; with act_clip="none" or a
            fraction the same as "max"; an estimate that can mislead, so look at the result). Outlier channels of
            transformers are the same for all inputs; QLLM (Liu et al., ICLR 2024) takes them apart, too: into equal
            parts, by learned thresholds, and merges other channels for them to keep the width. Here the largest part is
            halved, quantization-aware, and nothing is merged.
        act_signed: True for integers -qmax .. qmax, as in the paper; "auto" for 0 .. 2^abits - 1 where calibration saw
            nothing negative.
        act_scale: "static": one scale for the input of a layer, from calibration. Or "dynamic": one for each row of it
            (the vector over the channels: a token, a time step), the row's largest |x| / qmax, measured as it arrives.
            That needs no calibration unless act_r splits channels, which calibration chooses, once; the scale of a row
            is then that of its largest part. act_clip, act_split and act_signed must be as they are by default; it is
            for inputs whose channels are the last axis, not for those of convolutions. A recurrent layer whose abits an
            override names has its hidden states rounded so as well, at each step, as they meet their weights;
            other recurrent layers keep float inputs as with "static", even where a model has nothing else.
        correct_bias: add to the bias of each convolution and linear layer what its errors take from the mean of its
            outputs, (w - w_hat) E[x] (Nagel et al. 2019); a layer without a bias gets one. E[x] is the mean of the
            float inputs: measured where there is calibration, else from the BatchNorms before the layer, where these
            tell it surely (not through a LayerNorm, GroupNorm or max pooling), else unknown, and the layer's bias as it
            was: the report says so. Recurrent and attention layers keep theirs.
        calibration: what shows the inputs: batches, (batch, target) pairs, dicts of arguments by name, which say what
            forward gets where a tuple does not (see ocs.calibrate's data), a callable that runs the model, or what
            ocs.calibrate returned (with moments=True where rounding="gptq"). The model runs in eval mode and without
            gradients. Where torch.distributed is initialized, every rank calls quantize with batches of its
            own and sees those of all.
        fold_bn: fold each BatchNorm into the convolution before it, where torch.fx proves that this is all that it
            sees; the report says of the others why not.
        equalize: before anything is quantized, divide channels of what a convolution, linear layer or norm gives and
            multiply the weights that they meet by as much, so that all have about one range; the function of the model
            stays as it is, to rounding. Done where torch.fx proves that between the two is nothing but ReLU, pooling,
            dropout or flattening and that nothing else sees it (or torch's transformer layers are known to do so); the
            report says of the others why not. Data-free (Nagel et al. 2019); where inputs are quantized, with their
            ranges in calibration (SmoothQuant, Xiao et al. 2023), which so runs twice: batches or a callable, no
            ocs.Calibration. docs/accuracy.md says where it helps.
        skip: what stays float: ocs.FIRST_LAYER (the first convolution, where it has at most four input channels and one
            group and is no patch embedding: the one that sees an image), names, glob patterns, module types, predicates
            (name, module) -> bool, or a list of these. It replaces the default; None skips nothing.
        overrides: options for the layers that fit a name or pattern: {"layer4.*": dict(wbits=8)}.
        embeddings: quantize nn.Embedding and nn.EmbeddingBag, too, with wbits and clip, a scale for each row and no
            splits: they dequantize the rows that are looked up. An override that names the wbits of one does so, too. A
            linear layer that shares its weight with one has its very integers, where this is True and wbits a number.
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
            rounding="nearest", act_clip="none", act_select="percentile", act_signed=True.
            "best": what measurements favour, layer by layer and without data (docs/accuracy.md): granularity="channel",
            clip="auto"; rounding="squant", but "nearest" for split="naive", and in convolutions of larger filters than
            one weight whose inputs are known to have a squared mean of less than a twentieth of their power (after a
            LayerNorm, say); with abits, act_clip="mse" and, but for act_split="oracle", act_signed="auto"
            and act_select="max", which alone goes with act_scale="dynamic".
        explain: say in the report what each option did for the error of each layer's outputs; by default with another
            recipe than the paper's. Quantizing then takes a few times as long. The error is an estimate
            without data, functional.output_error, or with rounding="gptq" what calibration measured.
        progress: show a bar; by default where it takes over two seconds, a terminal looks on and tqdm is installed.

    Returns:
        A Report with a line for every weight, and one for every layer that was left as it is.

    Warns:
        UserWarning: less than half of the matmul weights are quantized, those that `skip` names not counted; it names
            the reason that most weights have.

    Raises:
        ValueError: an option is out of range, a name or pattern fits no layer, a weight or an input holds NaN, Inf or
            nothing yet, calibration is missing or empty, an option has no effect (select or allocate without r, act_
            options without abits, act_select without act_r, calibration that nothing uses, equalize where no scale can
            be moved) or does not go with another or with a layer (act_scale="dynamic"), the model is quantized already
            or has no layer to quantize, or every layer stays float: the error names the reason that most weights have.
        TypeError: the model is no nn.Module, is a ScriptModule, or is itself one of the layers to replace.
    """
    begin, request = time.perf_counter(), Request.of(locals())
    model = unwrapped(model)
    equalization, request = plan_equalization(model, request)
    work = partial(_quantize, model, request, equalization)
    report, replacements = for_a_while(equalization.steps(model), work)  # on the equalized model
    exchange([*module_slots(model, replacements), *refused_slots(model, replacements)])
    return replace(report, seconds=time.perf_counter() - begin)


def _quantize(model: nn.Module, request: Request, equalization: Equalization) -> tuple[Report, dict[int, nn.Module]]:
    """Make all that shall stand in the model, by id of what stands there now, and the report; change nothing."""
    plans, settings = choose(model, request)
    check_allocation(plans, request.model)
    plans, facts, sample, inputs = learn(model, plans, request.model)
    check_coverage(plans)
    with torch.inference_mode(False), torch.no_grad():  # what is made here may take part in training
        folding = plan_folding(model) if request.model.fold_bn else Folding({}, {}, {})
        plans = [replace(plan, norm_folded=folding.layers.get(id(plan.target.module))) for plan in plans]
        plans = allocate_sizes(model, plans, facts, sample, request.model)
        results = quantize_layers(plans, facts, explain=request.model.explained, progress=request.model.progress)
        replacements = _replacements(folding, results)
        folded = {**folding.layers, **folding.norms}
        results = _learned(model, replacements, folded, results, facts, inputs, request.model.progress)
    replacements = equalization.modules | replacements
    report = report_of(model, results, replacements, settings)
    return replace(report, batch_norms=folding.by_name(model), equalized=equalization.by_name), replacements


def report_of(
    model: nn.Module, results: Iterable[LayerResult], replacements: Mapping[int, nn.Module], settings: dict[str, Any]
) -> Report:
    """Say what became of each layer, and how many bytes the model takes once the replacements are in place."""
    lines, sizes = report_lines(results), sizes_of(model, replacements)
    packed = sum(line.packed_bytes or 0 for line in lines)
    return Report(
        tuple(lines), settings, model_bytes=sizes.model, weight_bytes=sizes.weights,
        float_weight_bytes=sizes.float_weights, file_bytes=sizes.beside + packed,
    )  # fmt: skip


def _learned(
    model: nn.Module,
    replacements: Mapping[int, nn.Module],
    folded: Mapping[int, nn.Module],
    results: Sequence[LayerResult],
    facts: Mapping[str, InputFacts],
    inputs: Data | None,
    progress: bool | None,
) -> list[LayerResult]:
    """Learn the integers of the layers that ask for it."""
    asked = [each for each in results if each.replacement is not None and each.plan.options.learned]
    if not asked:
        return list(results)
    layers = [
        Learnable(
            each.plan.name,
            each.plan.target.module,
            each.replacement,
            {weight.name: weight.tensor for weight in weights_of(each.plan.module)},
        )
        for each in asked
    ]
    outcomes = learn_rounding(model, replacements, layers, inputs, progress, folded)
    return [
        after_learning(each, facts[each.plan.name], note=_WHY_NOT[outcomes[each.plan.name]])
        if each.plan.name in outcomes
        else each
        for each in results
    ]


_WHY_NOT = {
    Outcome.LEARNED: "",
    Outcome.TRIED: "not learned: what learning gave left more error",
    Outcome.UNREACHED: "not learned: its outputs are exact, or of other shapes than the float ones, or it has none",
}


def _replacements(folding: Folding, results: Iterable[LayerResult]) -> dict[int, nn.Module]:
    """What stands in the model afterwards, by id of what stands there now."""
    layers = {id(result.plan.target.module): result.replacement for result in results if result.replacement is not None}
    return {**folding.layers, **folding.norms, **layers}
