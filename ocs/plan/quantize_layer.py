"""Fourth stage of quantize(): a layer's weights and its input quantized, and the module that replaces it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ocs.calibration.statistics import Statistics
from ocs.errors import error_context
from ocs.kernels.constants import qmax
from ocs.nn.base import QuantizedLayer
from ocs.nn.embedding import share_tied
from ocs.nn.input import InputGrid, QuantizedInput
from ocs.nn.state import with_originals
from ocs.nn.weights import check_values, input_weight, parameter_of, weights_of
from ocs.plan.bias_correction import restore_mean
from ocs.plan.explain import explained_steps
from ocs.plan.input_facts import InputFacts
from ocs.plan.input_splits import choose_input_splits
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import LayerOptions
from ocs.progress import with_progress
from ocs.weight.apply_plan import quantize_plan
from ocs.weight.blocks import count_blocks
from ocs.weight.error import gain_share, remaining_error, with_gain_of
from ocs.weight.hessian import Hessian
from ocs.weight.plan import splits_for
from ocs.weight.selection import choose_splits
from ocs.weight.threshold import scale_for
from ocs.weight.types import Quantization, QuantizedWeight, Scheme, SplitPlan


class Measured(NamedTuple):
    """A weight, quantized in some way."""

    packed_bytes: int
    error: float  # see remaining_error
    range_ratio: float  # max|w| after splitting over that before


class WeightResult(NamedTuple):
    """A weight of a layer: its split plan, its integers, and what each option did for it where that was asked for."""

    name: str
    plan: SplitPlan
    quantization: Quantization
    steps: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class LayerResult:
    """A layer as it was planned, and where it is quantized what replaces it."""

    plan: LayerPlan
    options: LayerOptions  # the plan's, but for what was not possible
    replacement: QuantizedLayer | None = None
    weights: tuple[WeightResult, ...] = ()
    rounding_note: str = ""  # what is not as it was asked for
    bias_from: str = ""  # where the mean input came from that corrected its bias
    input_note: str = ""  # what calibration could not tell of the scale of its input


def quantize_layers(
    plans: Sequence[LayerPlan], facts: Mapping[str, InputFacts], *, explain: bool, progress: bool | None
) -> list[LayerResult]:
    """Quantize every layer that the plans say."""
    results = []
    for plan in with_progress(plans, "quantize", progress):
        if not plan.quantized:
            results.append(LayerResult(plan, plan.options))
            continue
        with error_context(plan.name):
            results.append(quantize_layer(plan, facts[plan.name], explain=explain))
    share_tied({result.plan.name: (result.replacement, result.plan.target.tied_to) for result in results})
    return results


def quantize_layer(plan: LayerPlan, facts: InputFacts, *, explain: bool = False) -> LayerResult:
    """Quantize one layer; explain: find out what each option did."""
    quantizer = LayerQuantizer(plan, facts)
    options = possible(facts, plan.options)
    if plan.target.reason_folded:
        options = replace(options, expand=False)
    weights = []
    for name in quantizer.weights:
        context = () if name == "weight" else (name,)
        with error_context(*context):
            weights.append(quantizer.quantize_weight(name, options, plan.splits))
    quantized = {each.name: each.quantization.quantized for each in weights}
    grid = quantize_input(plan, facts.statistics) if plan.quantizes_input else None
    replacement = _replacement(plan, quantized, options, grid)
    _take_ranges(replacement, plan, facts)
    check_range(replacement)
    if facts.mean is not None:
        restore_mean(replacement, plan.module.weight, facts.mean.mean)
    if explain:
        weights = [each._replace(steps=quantizer.steps(each, options, plan.splits)) for each in weights]
    note = quantizer.rounding_note(plan.options)
    bias_from = "" if facts.mean is None else facts.mean.source
    return LayerResult(plan, options, replacement, tuple(weights), note, bias_from, _input_note(grid, facts.statistics))


def possible(facts: InputFacts, options: LayerOptions) -> LayerOptions:
    """Give the options, with nearest rounding where nothing is known that gptq could round by."""
    if options.compensated and not facts.second_moments:
        return replace(options, rounding="nearest")
    return options


def _take_ranges(layer: QuantizedLayer, plan: LayerPlan, facts: InputFacts) -> None:
    """Let a layer whose input has one scale know what calibration saw of its input and output."""
    if layer.input_grid is not None and facts.statistics is not None and not plan.rounds_rows:
        layer.input_range = (facts.statistics.smallest, facts.statistics.highest)
        layer.output_range = facts.output_range if plan.norm_folded is None else facts.normed_range


class LayerQuantizer:
    """Quantizes the weights of one layer, in one way after the other.

    It owns what that takes: a large factorization of the second moments of each weight's inputs, where gptq needs it.
    """

    def __init__(self, plan: LayerPlan, facts: InputFacts) -> None:
        self.plan, self.facts = plan, facts
        self.weights = {weight.name: weight for weight in weights_of(plan.module)}
        self._floats: dict[str, Tensor] = {}
        self._gain_shares: dict[str, float] = {}

    @cached_property
    def hessians(self) -> dict[str, Hessian]:
        """The second moments of what each weight meets; empty where calibration never reached the layer."""
        seen = self.facts.second_moments or {}
        return {name: Hessian(moments.products, moments.count) for name, moments in seen.items()}

    def rounding_note(self, options: LayerOptions) -> str:
        """Say where gptq knew nothing, or little: blocks, or fewer vectors than they have numbers."""
        if not options.compensated:
            return ""
        if not self.facts.second_moments:
            return f"rounded to nearest: {self.plan.kind.unseen(self.plan.module) or 'calibration never reached it'}"
        fewest = min(self.facts.second_moments.values(), key=lambda each: each.count - each.width)
        widest = max(self.facts.second_moments.values(), key=lambda each: each.blocks)
        notes = []
        if widest.blocks > 1:
            whole = f"{4e-9 * widest.groups * widest.columns**2:.3g} GB"
            notes.append(f"second moments in {widest.blocks} blocks of {widest.width} columns: whole they take {whole}")
        if fewest.count < fewest.width:
            notes.append(f"rounded by {fewest.count} inputs of {fewest.width} numbers: more would be better")
        return "; ".join(notes)

    def weight(self, name: str) -> Tensor:
        """A weight as float32 [O, C, ...]."""
        check_values(self.plan.module._parameters[parameter_of(name)])
        if name not in self._floats:
            self._floats[name] = self.weights[name].tensor.float().contiguous()
        return self._floats[name]

    def scheme(self, name: str, options: LayerOptions) -> Scheme:
        """How a weight is quantized by these options."""
        return with_gain_of(self.scheme_of_any(name, options), partial(self._gain_share, name))

    def scheme_of_any(self, name: str, options: LayerOptions) -> Scheme:
        """How it is, but for what its own values say of its gain."""
        hessian = self.hessians[name] if options.compensated else None
        rounding = "gptq" if options.compensated else options.rounding
        given = (options.wbits, options.clip, options.granularity, options.split, rounding)
        return Scheme(*given, self.weights[name].groups, hessian, self.facts.gain, options.group)

    def _gain_share(self, name: str) -> float:
        if name not in self._gain_shares:
            self._gain_shares[name] = gain_share(self.weight(name), self.weights[name].groups)
        return self._gain_shares[name]

    def quantize_weight(
        self, name: str, options: LayerOptions, splits: Mapping[str, int] | None = None, *, few: bool = False
    ) -> WeightResult:
        """Quantize a weight by these options; splits: of the layer's weights, in each group, where not r says it.

        few: see Scheme.
        """
        w, scheme = self.weight(name), self.scheme(name, options)._replace(few=few)
        by_ratio = splits is None or not options.r
        n = splits_for(options.r, w.shape[1], scheme.groups) if by_ratio else splits[name]
        plan = choose_splits(w, n, options.select, scheme)
        return WeightResult(name, plan, quantize_plan(w, plan, scheme))

    def measure(self, name: str, options: LayerOptions, splits: int | None = None, *, few: bool = False) -> Measured:
        """Measure what a weight takes and what error is left when it is quantized so; few: about so, see Scheme."""
        options = possible(self.facts, options)
        result = self.quantize_weight(name, options, None if splits is None else {name: splits}, few=few)
        plan, quantization = result.plan, result.quantization
        before, after = (max(each.tolist(), default=0.0) for each in (plan.channel_max, plan.split_max))
        copies = plan.source.numel() - plan.channel_max.numel()
        return Measured(
            packed_bytes(quantization, options.wbits, copies, self._numbers_of_input(options)),
            self.error(result, options),
            after / before if before else 0.0,
        )

    def error(self, result: WeightResult, options: LayerOptions) -> float:
        """Measure the error that is left in a weight that these options quantized; see remaining_error."""
        return remaining_error(self.weight(result.name), result.quantization, self.scheme(result.name, options))

    def steps(
        self, result: WeightResult, options: LayerOptions, splits: Mapping[str, int] | None
    ) -> tuple[tuple[str, float], ...]:
        """Find out what each option did for a weight; see explained_steps."""

        def quantize(other: LayerOptions) -> Quantization:
            return self.quantize_weight(result.name, other, splits).quantization

        scheme = self.scheme(result.name, options)
        return explained_steps(self.weight(result.name), options, scheme, quantize, result.quantization)

    def _numbers_of_input(self, options: LayerOptions) -> int:
        """Count the numbers that a quantized input takes: its scale, and the sources of its copies."""
        if not self.plan.quantizes_input or options.act_split == "oracle":
            return 0
        weight = input_weight(self.plan.module)
        splits = splits_for(options.act_r, weight.channels, weight.groups) if self.plan.kind.splits_input else 0
        return (options.act_scale == "static") + weight.groups * splits


def _replacement(
    plan: LayerPlan, quantized: Mapping[str, QuantizedWeight], options: LayerOptions, grid: QuantizedInput | None
) -> QuantizedLayer:
    """Make what replaces a layer; of one without weights a shell: it holds integers, and no floats to compute with."""
    group = options.group if options.granularity == "group" else 0
    if plan.shell is None:
        layer = plan.kind(plan.like, quantized, options.wbits, options.expand, grid, group)
        layer.settings = options.shown
        return layer
    held = {name: QuantizedWeight(*(part.to("meta") for part in each)) for name, each in quantized.items()}
    layer = plan.kind(plan.like, held, options.wbits, options.expand, None, group)
    layer.settings = options.shown
    for name, (ints, scale, source, _) in quantized.items():
        layer.hold(name, ints, scale, source)
    if grid is not None:
        layer.hold_input(grid, torch.device("cpu"))
    return layer


def foretold(plan: LayerPlan, facts: InputFacts, quantized_input: QuantizedInput | None) -> QuantizedLayer:
    """Make what will replace a layer, its weights on the meta device: shapes follow from its options."""
    options, held = possible(facts, plan.options), {}
    if plan.target.reason_folded:
        options = replace(options, expand=False)
    for weight in weights_of(plan.like):
        n, C = splits_for(options.r, weight.channels, weight.groups), weight.channels
        scales = {
            "tensor": [],
            "channel": [weight.outputs],
            "group": [weight.outputs, count_blocks(C, n, options.group)],
        }
        ints = torch.empty(weight.outputs, C + n, *weight.tensor.shape[2:], dtype=torch.int8, device="meta")
        scale = torch.empty(scales[options.granularity], dtype=torch.float32, device="meta")
        source = torch.empty(weight.groups * (C + n), dtype=torch.int64, device="meta")
        held[weight.name] = QuantizedWeight(ints, scale, source, scale)
    layer = _replacement(replace(plan, shell=plan.like), held, options, quantized_input)
    _take_ranges(layer, plan, facts)
    if facts.mean is not None:
        like = plan.like.weight if layer.bias is None else layer.bias
        layer.bias = nn.Parameter(torch.empty(input_weight(plan.like).outputs, dtype=like.dtype, device="meta"))
    return layer


def check_range(layer: QuantizedLayer) -> None:
    """Refuse weights that the layer's dtype cannot hold once they are rounded: up, or copies added up."""
    for name in layer.channels:
        weight = layer._buffers[layer.forward_buffer(name)]
        _, scale, source = layer.weight_state(name)
        most = (
            qmax(layer.bits) * float(scale.amax()) * int(source.bincount(minlength=1).amax()) if scale.numel() else 0.0
        )
        if most < torch.finfo(weight.dtype).max / 2:  # as always but in float16
            continue
        if weight.is_meta:  # of a shell
            weight = layer.forward_weight(name).to(weight.dtype)
        if weight.numel() and not all(bool(bound.isfinite()) for bound in weight.aminmax()):
            raise ValueError(
                f"{name} rounded to {layer.bits} bits leaves what {weight.dtype} holds: scale the layer down, use more"
                " bits, or a model in float32"
            )


def _input_note(quantized: QuantizedInput | None, statistics: Statistics | None) -> str:
    """Say where calibration saw nothing that a scale could follow from."""
    if quantized is None or not quantized.grid.calibrated or statistics.largest:
        return ""
    return "its input was all zeros in calibration: its scale is 1, which tells nothing of other inputs"


def packed_bytes(quantization: Quantization, bits: int, copies: int, others: int) -> int:
    """Count the bytes of packed integers, scales, sources of copies, and other numbers of four bytes."""
    quantized = quantization.quantized
    return math.ceil(quantized.ints.numel() * bits / 8) + 4 * (quantized.scale.numel() + copies + others)


def probe(plan: LayerPlan, bits: int, gain: float) -> tuple[nn.Module, float]:
    """Quantize a layer's weights without splits, to so many bits where they are still to be chosen; and their error."""
    options = replace(
        plan.options,
        wbits=bits if plan.options.automatic else plan.options.wbits,
        r=0.0,
        rounding="nearest" if plan.options.compensated else plan.options.rounding,
        abits=None,
        correct_bias=False,
        expand=False,
    )
    plan, facts = replace(plan, options=options), InputFacts(gain=gain)
    result, quantizer = quantize_layer(plan, facts), LayerQuantizer(plan, facts)
    return result.replacement, sum(quantizer.error(each, options) for each in result.weights)


def quantize_input(plan: LayerPlan, statistics: Statistics | None) -> QuantizedInput:
    """Decide an input's grid, its splits and its scale, on the layer's device."""
    device, (grid, scale, source) = input_weight(plan.module).tensor.device, choose_input(plan, statistics)
    return QuantizedInput(grid, *(None if each is None else each.to(device) for each in (scale, source)))


def choose_input(plan: LayerPlan, statistics: Statistics | None) -> QuantizedInput:
    """Decide an input's grid, which channels are split, and then its scale, on the CPU."""
    options, splits_input, weight = plan.options, plan.kind.splits_input, input_weight(plan.module)
    groups, C = weight.groups, weight.channels
    grid = InputGrid(
        bits=options.abits,
        signed=options.act_signed is True or statistics.smallest < 0,
        splits=splits_for(options.act_r, C, groups) if splits_input else 0,
        split=options.split,
        act_split=options.act_split,
        clip=options.act_clip,
        act_scale=options.act_scale,
    )
    if not grid.calibrated and not grid.split_once:
        return QuantizedInput(grid)
    if splits_input and statistics.channels not in (None, groups * C):
        raise ValueError(f"calibration saw {statistics.channels} input channels, this layer has {groups * C}")
    source = split = None
    if grid.splits:
        split = choose_input_splits(statistics, grid, options.act_select, weight).flatten()
        source = with_originals(split, groups, C)
    if grid.dynamic:
        return QuantizedInput(grid, None, source)
    threshold = statistics.threshold(grid.bits, grid.clip, grid.signed, split, grid.split)
    scale = scale_for(torch.tensor(threshold, dtype=torch.float32, device="cpu"), grid.qmax)
    return QuantizedInput(grid, scale, source)
