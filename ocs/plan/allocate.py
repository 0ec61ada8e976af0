"""Which layer gets how many splits (section 3.4 of the paper), and how many bits, where the whole model has a size.

One mechanism for all: each weight, or each layer, may be quantized in several ways, each of which has a size in bytes
and leaves an error, both measured by really doing it. Which way for which one is a multiple-choice knapsack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ocs.errors import error_context
from ocs.model.targets import Layer, Options
from ocs.nn.registry import replacement_of
from ocs.progress import with_progress
from ocs.weight.arguments import check_choice
from ocs.weight.plan import splits_for

Allocate = Literal["uniform", "knapsack", "error"]
BITS = range(2, 9)
SHARES = (0.0, 0.25, 0.5, 1.0)  # of r that wbits="auto" tries
UNITS = 2**14  # that the bytes to spend are counted in, where they are more
MOST = 8  # times the splits of allocate="uniform" that a weight may get


class Measured(NamedTuple):
    """A weight, quantized in some way."""

    packed_bytes: int
    error: float  # functional.remaining_error
    reach: float  # max|w| after splitting over that before


Measure = Callable[[Layer, str, Options, int | None], Measured]  # a weight by name, with so many splits in each group
Floats = NDArray[np.float64]
Splits = dict[str, int]  # of each weight of a layer, in each group


class Way(NamedTuple):
    """One way to quantize something: its size, the error that it leaves, and what it is."""

    packed_bytes: int
    error: float
    what: Any


def check_allocation(layers: Sequence[Layer], chosen: Mapping[str, Options], allocate: Any, budget: Any) -> None:
    """What is asked for has an effect, and does not contradict itself."""
    check_choice("allocate", allocate, get_args(Allocate))
    quantized = {layer.name: chosen[layer.name] for layer in layers if layer.status == "quantized"}
    if quantized and not any(options.r for options in quantized.values()):
        if allocate != "uniform":
            raise ValueError(f"allocate={allocate!r} without r has no effect: set r, too")
        select = next((options.shown["select"] for options in quantized.values() if options.select != "max"), None)
        if select is not None:
            raise ValueError(f"select={select!r} without r has no effect: set r, too")
    automatic = [name for name, options in quantized.items() if options.automatic]
    if automatic and budget is None:
        raise ValueError(f'{automatic[0]}: wbits="auto" needs budget=, the bytes that all packed weights may take')
    if budget is None:
        return
    if not isinstance(budget, Integral) or isinstance(budget, bool) or budget <= 0:
        raise ValueError(f"budget={budget!r}: use a positive integer, bytes")
    if not automatic:
        raise ValueError(f'budget={budget!r} without wbits="auto" has no effect: no layer to quantize has it')
    if allocate != "uniform":
        raise ValueError(
            f'allocate={allocate!r} with wbits="auto" has no effect: budget= pays for bits and splits alike'
        )


def spend(items: Sequence[Sequence[Way]], budget: int) -> list[Way]:
    """One way for each item, so that all fit the budget and the sum of errors is least.

    A knapsack, solved by dynamic programming: `least[b]` is the least error of the items so far in b units of bytes
    beyond their smallest ways. Sizes count in whole units, rounded up; what that leaves over is spent where it lowers
    the error most per byte.
    """
    size, error = ([np.array([way[i] for way in ways], np.float64) for ways in items] for i in (0, 1))
    smallest = [each.min() for each in size]
    spare = budget - sum(smallest)
    unit = max(1, spare / UNITS)
    units = [np.ceil((each - low) / unit).astype(int) for each, low in zip(size, smallest, strict=True)]
    least, taken = np.zeros(int(spare // unit) + 1), []
    for cost, left in zip(units, error, strict=True):
        totals = np.full((len(cost), least.size), np.inf)
        for i, at in enumerate(cost):
            totals[i, at:] = least[: max(least.size - at, 0)] + left[i]
        taken.append(totals.argmin(0))
        least = totals.min(0)
    chosen, b = [], least.size - 1
    for cost, which in zip(reversed(units), reversed(taken), strict=True):
        chosen.append(int(which[b]))
        b -= cost[chosen[-1]]
    return [ways[i] for ways, i in zip(items, _filled(size, error, chosen[::-1], budget), strict=True)]


def _filled(size: list[Floats], error: list[Floats], chosen: list[int], budget: int) -> list[int]:
    """The best step per byte that still fits, again and again."""
    while True:
        left = budget - sum(each[i] for each, i in zip(size, chosen, strict=True))
        steps = []
        for item, (bytes_, errors) in enumerate(zip(size, error, strict=True)):
            more, less = bytes_ - bytes_[chosen[item]], errors[chosen[item]] - errors
            gain = np.where((less > 0) & (more <= left), less / np.maximum(more, 1e-9), 0)
            steps.append((gain.max(), -item, int(gain.argmax())))
        gain, item, way = max(steps, default=(0, 0, 0))
        if not gain > 0:
            return chosen
        chosen[-item] = way


# --- Splits under the overhead of ceil(r C) for each layer ------------------------------------------------------------


def allocate_splits(
    layers: Sequence[Layer],
    chosen: Mapping[str, Options],
    by: Allocate,
    measure: Measure,
    sensitivity: Mapping[str, float],
    progress: bool | None = None,
) -> dict[str, Splits]:
    """Splits for every weight of the layers, by name, that take no more bytes than those of "uniform" do.

    by: "knapsack" lowers the sum over weights of what is left of their range, "error" that of their errors.
    """
    items, uniform = [], []
    for layer in with_progress(layers, "allocate", progress):
        options, count = chosen[layer.name], sensitivity[layer.name]
        for names in _together(layer):
            n = _uniform_splits(layer, names[0], options.r)
            ladder = _ladder(n, _channels(layer, names[0]))
            with error_context(layer.name):
                items.append([_splits_way(layer, names, options, k, by, measure, count) for k in ladder])
            uniform.append(ladder.index(n))
    budget = sum(ways[at].packed_bytes for ways, at in zip(items, uniform, strict=True))
    splits: dict[str, Splits] = {}
    for way in spend(items, budget):
        name, of_weights = way.what
        splits.setdefault(name, {}).update(of_weights)
    return splits


def _splits_way(
    layer: Layer, names: list[str], options: Options, splits: int, by: Allocate, measure: Measure, sensitivity: float
) -> Way:
    found = [measure(layer, name, options, splits) for name in names]
    left = sum(each.reach for each in found) if by == "knapsack" else sensitivity * sum(each.error for each in found)
    return Way(sum(each.packed_bytes for each in found), left, (layer.name, dict.fromkeys(names, splits)))


def _together(layer: Layer) -> list[list[str]]:
    """Its weights; those of both directions of a recurrent layer, which must have one width, together."""
    groups: dict[str, list[str]] = {}
    for name in replacement_of(layer.module).weight_names(layer.module):
        groups.setdefault(name.removesuffix("_reverse"), []).append(name)
    return list(groups.values())


def _channels(layer: Layer, name: str) -> int:
    """C of one group."""
    groups = getattr(layer.module, "groups", 1)
    return replacement_of(layer.module).layout(layer.module._parameters[name], groups).shape[1]


def _uniform_splits(layer: Layer, name: str, r: float) -> int:
    return splits_for(r, _channels(layer, name), getattr(layer.module, "groups", 1))


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


def mean_bits(layers: Sequence[Layer], budget: int) -> int:
    """What the budget gives to each weight, 2 to 8: the bits to measure with how much a layer counts."""
    parameters = (layer.module._parameters for layer in layers)
    names = (replacement_of(layer.module).weight_names(layer.module) for layer in layers)
    count = sum(held[name].numel() for held, of_layer in zip(parameters, names, strict=True) for name in of_layer)
    return min(max(8 * budget // max(count, 1), BITS[0]), BITS[-1])


def allocate_bits(
    layers: Sequence[Layer],
    chosen: Mapping[str, Options],
    budget: int,
    measure: Measure,
    sensitivity: Mapping[str, float],
    progress: bool | None = None,
) -> dict[str, Options]:
    """Every layer's options with its bits, and r up to what it was, so that all packed weights fit the budget."""
    items = []
    for layer in with_progress(layers, "allocate", progress):
        with error_context(layer.name):
            items.append(_layer_ways(layer, chosen[layer.name], measure, sensitivity[layer.name]))
    least = sum(min(way.packed_bytes for way in ways) for ways in items)
    if least > budget:
        raise ValueError(f'budget={budget}: {least} bytes are the least, with 2 bits where wbits="auto"')
    return dict(way.what for way in spend(items, budget))


def _layer_ways(layer: Layer, options: Options, measure: Measure, sensitivity: float) -> list[Way]:
    """Every number of bits with every share of r; one way where the bits are given."""
    tried = [options]
    names = replacement_of(layer.module).weight_names(layer.module)
    if options.wbits == "auto":
        by_splits = {}
        for r in (options.r * share for share in reversed(SHARES)):
            by_splits[tuple(_uniform_splits(layer, name, r) for name in names)] = r
        tried = [replace(options, wbits=bits, r=r) for bits in BITS for r in reversed(by_splits.values())]
    ways = []
    for each in tried:
        found = [measure(layer, name, each, None) for name in names]
        error = sensitivity * sum(weight.error for weight in found)
        ways.append(Way(sum(weight.packed_bytes for weight in found), error, (layer.name, each)))
    return ways
