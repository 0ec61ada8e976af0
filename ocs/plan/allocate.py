"""Third stage of quantize(): splits of each layer (section 3.4 of the paper), and bits, where the model has a size.

One mechanism for all: each weight, or each layer, may be quantized in several ways, each of which has a size in bytes
and leaves an error, both measured by really doing it. Which way for which one is a multiple-choice knapsack.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ocs.calibration.run import Data
from ocs.errors import error_context
from ocs.kernels.constants import MAX_BITS, MIN_BITS
from ocs.model.targets import Target, check_values
from ocs.nn.weights import Weight, weights_of
from ocs.plan.input_facts import InputFacts
from ocs.plan.knapsack import Candidate, solve_knapsack
from ocs.plan.layer_plan import LayerPlan
from ocs.plan.options import Allocate, ModelOptions
from ocs.plan.quantize_layer import LayerQuantizer, probe
from ocs.plan.sensitivity import sensitivities
from ocs.progress import with_progress
from ocs.weight.plan import splits_for

BITS = range(MIN_BITS, MAX_BITS + 1)
SHARES = (0.0, 0.25, 0.5, 1.0)  # of r that wbits="auto" tries
MOST = 8  # times the splits of allocate="uniform" that a weight may get

Facts = Mapping[str, InputFacts]


def check_allocation(plans: Sequence[LayerPlan], options: ModelOptions) -> None:
    """Refuse what has no effect or contradicts itself, with a ValueError."""
    quantized = [plan for plan in plans if plan.quantized]
    if quantized and not any(plan.options.r for plan in quantized):
        if options.allocate != "uniform":
            raise ValueError(f"allocate={options.allocate!r} without r has no effect: set r, too")
        select = next((plan.options.shown["select"] for plan in quantized if plan.options.select != "max"), None)
        if select is not None:
            raise ValueError(f"select={select!r} without r has no effect: set r, too")
    automatic = [plan.name for plan in quantized if plan.options.automatic]
    if options.budget is None:
        if automatic:
            raise ValueError(f'{automatic[0]}: wbits="auto" needs budget=, the bytes that all packed weights may take')
        return
    if not automatic:
        raise ValueError(f'budget={options.budget!r} without wbits="auto" has no effect: no layer to quantize has it')
    if options.allocate != "uniform":
        raise ValueError(
            f'allocate={options.allocate!r} with wbits="auto" has no effect: budget= pays for bits and splits alike'
        )


def allocate(
    model: nn.Module, plans: Sequence[LayerPlan], facts: Facts, sample: Data | None, options: ModelOptions
) -> list[LayerPlan]:
    """Give every plan its bits and splits, where these do not follow from its own options."""
    if options.allocate == "uniform" and options.budget is None:
        return list(plans)
    quantized = [plan for plan in plans if plan.quantized]
    for plan in quantized:
        check_values(plan.target)
    counts = _counts(model, quantized, facts, sample, options)
    if options.budget is not None:
        allocated = allocate_bits(quantized, facts, counts, options)
    else:
        allocated = allocate_splits(quantized, facts, counts, options)
    by_name = {plan.name: plan for plan in allocated}
    return [by_name.get(plan.name, plan) for plan in plans]


def _counts(
    model: nn.Module, plans: Sequence[LayerPlan], facts: Facts, sample: Data | None, options: ModelOptions
) -> dict[str, float]:
    """How much the error of each layer counts: 1 where no sample tells."""
    if sample is None:
        return {plan.name: 1.0 for plan in plans}
    targets, by_name = [plan.target for plan in plans], {plan.name: plan for plan in plans}
    bits = BITS[0] if options.budget is None else mean_bits(targets, options.budget)

    def probed(target: Target) -> tuple[nn.Module, float]:
        return probe(by_name[target.name], bits, facts[target.name].gain)

    return sensitivities(model, targets, sample, probed, options.progress)


# --- Splits under the overhead of ceil(r C) for each layer ------------------------------------------------------------


def allocate_splits(
    plans: Sequence[LayerPlan], facts: Facts, sensitivity: Mapping[str, float], options: ModelOptions
) -> list[LayerPlan]:
    """Plan splits for every weight that take no more bytes than those of "uniform" do.

    allocate="knapsack" lowers the sum over weights of what is left of their range, "error" that of their errors.
    """
    items, uniform = [], []
    for plan in with_progress(plans, "allocate", options.progress):
        quantizer = LayerQuantizer(plan, facts[plan.name])
        for weights in _together(plan):
            n = splits_for(plan.options.r, weights[0].channels, weights[0].groups)
            ladder = _ladder(n, weights[0].channels)
            with error_context(plan.name):
                items.append([_splits_candidate(quantizer, weights, k, options.allocate, sensitivity) for k in ladder])
            uniform.append(ladder.index(n))
    budget = sum(candidates[at].packed_bytes for candidates, at in zip(items, uniform, strict=True))
    splits: dict[str, dict[str, int]] = {plan.name: {} for plan in plans}
    for candidate in solve_knapsack(items, budget):
        name, of_weights = candidate.what
        splits[name].update(of_weights)
    return [replace(plan, splits=splits[plan.name]) for plan in plans]


def _splits_candidate(
    quantizer: LayerQuantizer, weights: list[Weight], splits: int, by: Allocate, sensitivity: Mapping[str, float]
) -> Candidate:
    plan, names = quantizer.plan, [weight.name for weight in weights]
    found = [quantizer.measure(name, plan.options, splits) for name in names]
    if by == "knapsack":
        error = sum(each.range_ratio for each in found)
    else:
        error = sensitivity[plan.name] * sum(each.error for each in found)
    return Candidate(sum(each.packed_bytes for each in found), error, (plan.name, dict.fromkeys(names, splits)))


def _together(plan: LayerPlan) -> list[list[Weight]]:
    """The weights of a layer; those of both directions of a recurrent layer, which must have one width, together."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights_of(plan.module):
        groups.setdefault(weight.name.removesuffix("_reverse"), []).append(weight)
    return list(groups.values())


def _ladder(splits: int, channels: int) -> list[int]:
    """What to try around so many splits: a quarter, a half ... of them, and none."""
    if not splits:
        return [0]
    steps, most = {0, splits}, min(channels, MOST * splits)
    step = max(1, splits // 4)
    while step <= most:
        steps.add(step)
        step *= 2
    return sorted(steps)


# --- Bits and splits under a size -------------------------------------------------------------------------------------


def mean_bits(targets: Sequence[Target], budget: int) -> int:
    """What the budget gives to each weight, 2 to 8: the bits to measure with how much a layer counts."""
    count = sum(weight.tensor.numel() for target in targets for weight in weights_of(target.module))
    return min(max(8 * budget // max(count, 1), BITS[0]), BITS[-1])


def allocate_bits(
    plans: Sequence[LayerPlan], facts: Facts, sensitivity: Mapping[str, float], options: ModelOptions
) -> list[LayerPlan]:
    """Plan the bits of every layer, and r up to what it was, so that all packed weights fit the budget."""
    items = []
    for plan in with_progress(plans, "allocate", options.progress):
        with error_context(plan.name):
            items.append(_bits_candidates(LayerQuantizer(plan, facts[plan.name]), sensitivity[plan.name]))
    least = sum(min(each.packed_bytes for each in candidates) for candidates in items)
    if least > options.budget:
        raise ValueError(f'budget={options.budget}: {least} bytes are the least, with 2 bits where wbits="auto"')
    return [
        replace(plan, options=each.what)
        for plan, each in zip(plans, solve_knapsack(items, options.budget), strict=True)
    ]


def _bits_candidates(quantizer: LayerQuantizer, sensitivity: float) -> list[Candidate]:
    """Every number of bits with every share of r; one candidate where the bits are given."""
    options, weights = quantizer.plan.options, weights_of(quantizer.plan.module)
    tried = [options]
    if options.automatic:
        by_splits = {}
        for r in (options.r * share for share in reversed(SHARES)):
            by_splits[tuple(splits_for(r, weight.channels, weight.groups) for weight in weights)] = r
        tried = [replace(options, wbits=bits, r=r) for bits in BITS for r in reversed(by_splits.values())]
    candidates = []
    for each in tried:
        found = [quantizer.measure(weight.name, each, few=True) for weight in weights]
        error = sensitivity * sum(measured.error for measured in found)
        candidates.append(Candidate(sum(measured.packed_bytes for measured in found), error, each))
    return candidates
